# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lynx_compile.ops.sparse_linear import (
    collapse_low_rank,
    expand_low_rank,
    keep_mask,
    norm_scale_of,
    padded_width,
    sparse_linear,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("group", "kept"),
    [
        ([1.0, 2.0, 3.0, 4.0], [2, 3]),
        ([-4.0, 3.0, -2.0, 1.0], [0, 1]),
        ([1.0, 1.0, 1.0, 1.0], [0, 1]),
        ([1.0, -2.0, 2.0, -2.0], [1, 2]),
        ([0.0, -0.0, 0.0, -0.0], [0, 1]),
        ([-0.0, 0.0, 0.0, 1e-30], [0, 3]),
        ([INF, 1.0, -INF, INF], [0, 2]),
        ([INF, 1.0, NAN, INF], [0, 2]),
        ([1.0, 2.0, NAN, NAN], [2, 3]),
        ([NAN, NAN, NAN, INF], [0, 1]),
    ],
)
def test_two_largest_are_kept_and_ties_keep_the_lower_index(group: list[float], kept: list[int]) -> None:
    assert keep_mask(torch.tensor(group)).nonzero().flatten().tolist() == kept


def test_mask_equals_a_stable_sort() -> None:
    z = torch.randint(-3, 4, (500, 16)).float()  # many ties
    keep = torch.zeros(500, 4, 4, dtype=torch.bool)
    best = z.abs().unflatten(-1, (4, 4)).argsort(dim=-1, descending=True, stable=True)[..., :2]
    keep.scatter_(-1, best, True)
    assert torch.equal(keep_mask(z), keep.flatten(-2))


def test_saliency_decides() -> None:
    z = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert keep_mask(z, torch.tensor([0.1, 1.0, 1.0, 10.0])).tolist() == [False, True, False, True]


def test_norm_scale_restores_the_norm() -> None:
    z = torch.randn(5, 32)
    keep = keep_mask(z)
    scale = norm_scale_of(z, keep)
    assert torch.allclose((scale * z * keep).norm(dim=-1), z.norm(dim=-1), rtol=1e-5)
    assert ((scale >= 1) & (scale <= math.sqrt(2) + 1e-6)).all()
    assert norm_scale_of(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("rank", [0, 16, 32])
@pytest.mark.parametrize("norm_scale", [False, True])
def test_sparse_linear_is_its_formula(rank: int, norm_scale: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    refit, up = torch.randn(24, 64, dtype=torch.float64), torch.randn(24, rank, dtype=torch.float64)
    down, bias = torch.randn(max(rank, 1), 64, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    y = sparse_linear(x, expand_low_rank(refit, up), down, bias, rank=rank, norm_scale=norm_scale)
    keep = keep_mask(x)
    scale = norm_scale_of(x, keep).double() if norm_scale else 1.0
    expected = scale * ((x * keep) @ refit.T) + (x @ down[:rank].T) @ up.T + bias
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-10)


def _gelu_tanh(y: torch.Tensor) -> torch.Tensor:
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def _gelu_erf(y: torch.Tensor) -> torch.Tensor:
    return 0.5 * y * torch.special.erfc(-y / math.sqrt(2))


@pytest.mark.parametrize("start", [0, 8, 24])
@pytest.mark.parametrize(("activation", "formula"), [(1, _gelu_tanh), (2, _gelu_erf)])
def test_activation_is_a_gelu_of_the_last_channels(
    activation: int, formula: Callable[[torch.Tensor], torch.Tensor], start: int
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 64).double(), torch.randn(24, 64).double(), torch.randn(24).double()
    down = torch.zeros(1, 64).double()
    y = sparse_linear(x, weight, down, bias)
    expected = torch.cat((y[:, :start], formula(y)[:, start:]), 1)
    got = sparse_linear(x, weight, down, bias, activation=activation, activation_from=start)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse_linear(x, weight, down, bias, activation_from=start), y)


def test_activation_is_computed_before_rounding() -> None:
    x, weight = torch.randn(50, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    zero = torch.zeros(1, 16).bfloat16()
    got = sparse_linear(x, weight, zero, zero[0, :8], activation=1)
    full = sparse_linear(x.float(), weight.float(), zero.float(), zero[0, :8].float(), activation=1)
    assert torch.equal(got, full.bfloat16())


def test_a_token_of_zeros_gives_the_bias() -> None:
    weight = expand_low_rank(torch.randn(8, 16), torch.randn(8, 16))
    bias = torch.randn(8)
    y = sparse_linear(torch.zeros(1, 16), weight, torch.randn(16, 16), bias, rank=16, norm_scale=True)
    assert torch.equal(y[0], bias)


def test_expanded_weight_is_padded_with_zeros_and_collapses_again() -> None:
    weight, up = torch.randn(8, 48), torch.randn(8, 16)
    wide = expand_low_rank(weight, up)
    assert wide.shape == (8, padded_width(48, 16)) == (8, 128)
    assert torch.equal(wide[:, :48], weight) and torch.equal(collapse_low_rank(wide, 48, 16), up)
    assert not wide[:, 80:].any() and not wide[:, 48:80].unflatten(-1, (8, 4))[..., 2:].any()
