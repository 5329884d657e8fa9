# SPDX-License-Identifier: Apache-2.0
"""The linears of real classes, found without weights: against a run with weights, and against known numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from diffusers import FluxTransformer2DModel

from lynx_compile.errors import InputError
from lynx_compile.models.structure import Structure, find_structure, is_linear
from lynx_compile.models.weightless import Weightless
from lynx_compile.tools.support.configurations import TINY, classes, example
from lynx_compile.tools.support.draws import drawn
from tests.conftest import FLUX_DEV

# Those that look at values which depend on weights: routing by counts.
LOOKS_AT_WEIGHTS = {"HiDream"}

# {configuration: (linears in blocks, candidates, rows of the largest tensor)}
KNOWN = {
    "Flux": (20, 17, 28), "Flux2": (14, 14, 28), "QwenImage": (28, 24, 16), "ZImage": (31, 28, 96),
    "SD35": (29, 25, 32), "Wan": (20, 20, 32), "LTX2": (56, 56, 64), "HunyuanImage": (27, 23, 36),
    "HunyuanVideo15": (35, 30, 32), "CogView4": (14, 12, 28), "DiT": (18, 12, 32), "Chroma": (19, 17, 28),
    "Sana": (20, 20, 128), "OmniGen": (12, 12, 58), "Mochi": (25, 15, 32), "GlmImage": (14, 12, 28),
}  # fmt: skip


def _without_weights(name: str) -> Structure:
    tiny = TINY[name]
    with torch.device("meta"):
        module = classes()[tiny.class_name](**tiny.config).eval()
    return find_structure(module, _arguments(name), lambda: example(name).module)


def _arguments(name: str) -> dict[str, Any]:
    forward = inspect.signature(classes()[TINY[name].class_name].forward)
    constants = {"return_dict": False} if "return_dict" in forward.parameters else {}
    return drawn(TINY[name].inputs | constants, "first", 0)


def _in_blocks(found: Structure) -> list[str]:
    return [x.path for x in found.linears if any(x.path.startswith(f"{list_}.") for list_ in found.blocks)]


@pytest.mark.parametrize("name", KNOWN)
def test_known_numbers(name: str) -> None:
    found = _without_weights(name)
    assert (len(_in_blocks(found)), len(found.candidates), found.tokens) == KNOWN[name]


@pytest.mark.parametrize(
    "name", [name if name in KNOWN else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)
def test_without_weights_is_as_with_weights(name: str) -> None:
    """What reads what, how often and how much; and nothing but the exceptions has to be loaded for it."""
    found = _without_weights(name)
    assert found.with_weights == (name in LOOKS_AT_WEIGHTS)
    loaded = example(name).module
    known = find_structure(loaded, _arguments(name))
    assert [(g.name, g.tokens, g.calls, [x.path for x in g.linears]) for g in found.groups] == [
        (g.name, g.tokens, g.calls, [x.path for x in g.linears]) for g in known.groups
    ]
    every = {path for path, module in loaded.named_modules() if is_linear(module)}
    assert {x.path for x in found.linears} | set(found.idle) == every
    assert {x.path for x in found.candidates} <= set(_in_blocks(found))
    assert {x.path for x in found.candidates} <= {x.path for x in known.candidates}
    assert not any(module._forward_pre_hooks for module in loaded.modules())


def test_flux_dev_without_weights() -> None:
    with torch.device("meta"):
        module = FluxTransformer2DModel(**FLUX_DEV).eval()
    arguments = {
        "hidden_states": torch.zeros(1, 4096, 64), "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "pooled_projections": torch.zeros(1, 768), "timestep": torch.ones(1), "guidance": torch.ones(1),
        "img_ids": torch.zeros(4096, 3), "txt_ids": torch.zeros(512, 3),
    }  # fmt: skip
    found = find_structure(module, arguments)
    assert len(found.candidates) == 19 * 12 + 38 * 5 and found.tokens == 4096 + 512
    assert found.blocks == ("transformer_blocks", "single_transformer_blocks")
    groups = {group.name: group for group in found.groups}
    assert (groups["transformer_blocks.7.ff_context.net.2"].tokens, len(groups)) == (512, 314)
    single = groups["single_transformer_blocks.37.proj_mlp"]
    assert [x.path.rsplit(".", 1)[1] for x in single.linears] == ["proj_mlp", "to_q", "to_k", "to_v"]


def test_a_linear_called_twice_is_in_one_group_with_both_calls() -> None:
    groups = {group.name: group for group in _without_weights("CogView4").groups}
    twice = groups["transformer_blocks.0.ff.net.0.proj"]
    assert (twice.calls, twice.tokens, len(twice.linears)) == ((16, 12), 16, 1)  # image and text
    once = groups["transformer_blocks.0.attn1.to_q"]
    assert (once.calls, once.tokens, len(once.linears)) == ((), 28, 3)


def test_convolutions_of_kernel_1_are_linears_and_those_of_groups_are_not() -> None:
    found = {linear.path: linear for linear in _without_weights("Sana").linears}
    inverted = found["transformer_blocks.0.ff.conv_inverted"]
    assert inverted.convolution and inverted.refusal is None and inverted.bias
    assert not found["transformer_blocks.0.attn1.to_q"].convolution
    assert "transformer_blocks.0.ff.conv_depth" not in found


def test_modulation_is_refused_for_what_it_reads() -> None:
    chroma = {linear.path: linear.refusal for linear in _without_weights("Chroma").linears}
    assert (
        chroma["distilled_guidance_layer.layers.0.linear_1"] == "reads what depends on no tokens: modulation"
    )
    assert chroma["x_embedder"] == "outside of the repeated blocks: embedder, modulation or final projection"
    pooled = {linear.path: linear.refusal for linear in _without_weights("HunyuanDiT").linears}
    assert pooled["blocks.0.norm1.linear"] == "reads 2 rows, one a sample or fewer: modulation"


class Odd(torch.nn.Module):
    """Blocks of K = 24 and N = 12, one of them behind a decision."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [torch.nn.Sequential(torch.nn.Linear(24, 12), torch.nn.Linear(12, 24)) for _ in range(2)]
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, by_weight: bool = False) -> torch.Tensor:
        x = self.blocks[0](x)
        if mask.all() or (by_weight and x.sum() > 0):
            x = self.blocks[1](x)
        return x


def _odd(mask: bool, by_weight: bool = False, with_weights: bool = False) -> Structure:
    with torch.device("meta"):
        module = Odd()
    arguments = {"x": torch.ones(2, 5, 24), "mask": torch.full((5,), mask), "by_weight": by_weight}
    return find_structure(module, arguments, Odd if with_weights else None)


def test_sizes_that_the_kernels_do_not_take_are_refused_with_the_reason() -> None:
    refusals = [linear.refusal for linear in _odd(True).linears]
    assert refusals[:2] == ["K = 24 is not divisible by 16", "K = 12 is not divisible by 16"]


def test_what_the_call_does_not_run_is_idle() -> None:
    assert _odd(True).idle == ()
    assert _odd(False).idle == ("blocks.1.0", "blocks.1.1")  # the mask's values are there without weights


def test_a_module_that_looks_at_weights_is_run_with_them_or_refused() -> None:
    assert _odd(False, by_weight=True, with_weights=True).with_weights
    assert not _odd(True, by_weight=True, with_weights=True).with_weights
    with pytest.raises(InputError, match="Odd cannot be run without its weights"):
        _odd(False, by_weight=True)


def test_values_stay_real_until_they_meet_a_weight() -> None:
    weight = torch.empty(4, 4, device="meta")
    x, mask = torch.ones(1, 3, 4), torch.tensor([True, False, True])
    with Weightless({"x": x}) as run:
        y = x @ weight
        assert y.is_meta and y[0, mask].shape == (2, 4)
        assert torch.arange(3, device=y.device).tolist() == [0, 1, 2]
        assert mask.to(y.device).sum().item() == 2
        filled = torch.zeros(3, 4)
        filled[1:] = y[0, 1:]
        assert (filled + 1).is_meta, "what was written into it has no values"
        assert run.is_of_tokens(y) and run.is_of_tokens(filled) and not run.is_of_tokens(mask * 2)
        with torch.autocast(y.device.type, dtype=torch.bfloat16):
            assert (y + 1).shape == y.shape


class Flexible(torch.nn.Module):
    """Attention under a mask that is code; its own function refuses tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(2)))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device=x.device)
        y = self.blocks[0](x)[:, None]
        return flex.flex_attention(y, y, y, block_mask=mask)


def test_attention_under_a_mask_that_is_code() -> None:
    with torch.device("meta"):
        module = Flexible()
    found = find_structure(module, {"x": torch.randn(1, 8, 16)})
    assert [linear.path for linear in found.candidates] == ["blocks.0.0", "blocks.0.1"]
