# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from lynx_compile.tools.support import configurations, pipelines


def test_every_class_has_a_pipeline_or_a_reason() -> None:
    classes = configurations.classes()
    assert {name for name in classes if not pipelines.names(name)} == pipelines.WITHOUT.keys()
    assert pipelines.names("WanTransformer3DModel") == ["Wan", "Wan22", "WanImageToVideo"]


def test_a_pipeline_is_the_same_every_time() -> None:
    first, second = pipelines.prepare("Wan22"), pipelines.prepare("Wan22")
    for name in ("transformer", "transformer_2"):
        states = (prepared.pipe.components[name].state_dict() for prepared in (first, second))
        assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    one, two = (first.pipe.components[name].proj_out.weight for name in ("transformer", "transformer_2"))
    assert not torch.equal(one, two)
    embeds = [row["prompt_embeds"] for row in first.inputs]
    assert torch.equal(embeds[0], second.inputs[0]["prompt_embeds"]) and not torch.equal(*embeds)
