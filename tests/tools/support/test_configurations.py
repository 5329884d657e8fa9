# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lynx_compile.engine.arguments import flatten
from lynx_compile.tools.support import configurations


def outputs(module: torch.nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    with torch.no_grad():
        flat = flatten(module(**inputs), "output")
    return torch.cat([tensor.flatten() for tensor in flat.tensors.values()])


@pytest.mark.parametrize("name", configurations.TINY)
def test_every_input_counts(name: str) -> None:
    example = configurations.example(name)
    first = outputs(example.module, example.inputs)
    assert torch.isfinite(first).all() and first.any()
    assert not torch.equal(first, outputs(example.module, example.second))
    again = configurations.example(name)  # an input may be a cache, which the first call filled
    assert torch.equal(first, outputs(again.module, again.inputs))
    if example.masked is not None:
        assert not torch.equal(first, outputs(example.module, example.masked))


def test_no_block_is_switched_off_by_zeros() -> None:
    example = configurations.example("DiT")  # its gates start at zero
    before = outputs(example.module, example.inputs)
    with torch.no_grad():
        example.module.transformer_blocks[1].ff.net[2].weight.zero_()
    assert not torch.allclose(before, outputs(example.module, example.inputs), rtol=1e-3)


def test_every_installed_class_has_one() -> None:
    assert {tiny.class_name for tiny in configurations.TINY.values()} == configurations.classes().keys()
    assert configurations.names("SD3Transformer2DModel") == ["SD3", "SD35"]
