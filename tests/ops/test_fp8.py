# SPDX-License-Identifier: Apache-2.0
"""The definition of FP8 linears, and the packing of 2:4 operands."""

from __future__ import annotations

import math

import pytest
import torch

from lynx_compile.ops.fp8 import (
    E4M3,
    LARGEST,
    Rounded,
    fp8_linear,
    pack,
    pack_dense,
    round_rows,
    to_e4m3,
    unpack,
)
from lynx_compile.ops.sparse_linear import keep_mask


def _nearest(value: float) -> float:
    """The nearest e4m3 by its definition: all 127 magnitudes, ties to the even mantissa."""
    if math.isnan(value):
        return value
    magnitudes = [m / 8 * 2.0**-6 for m in range(8)]
    magnitudes += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    bounded = min(abs(value), magnitudes[-1])
    best = min(enumerate(magnitudes), key=lambda each: (abs(each[1] - bounded), each[0] % 2))
    return math.copysign(best[1], value)


def test_rounding_is_to_the_nearest_even() -> None:
    torch.manual_seed(0)
    table = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    table = table[table.isfinite()].sort().values
    ties = (table[1:] + table[:-1]) / 2
    values = torch.cat(
        (table, ties, torch.randn(500) * 100, torch.tensor([449.0, 464.0, 1e30, -1e30, math.inf]))
    )
    wanted = torch.tensor([_nearest(float(value)) for value in values])
    assert torch.equal(to_e4m3(values).float(), wanted)
    assert to_e4m3(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tokens_largest_value_becomes_448(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = (torch.randn(40, 64) * torch.logspace(-4, 3, 40)[:, None]).to(dtype)
    rounded = round_rows(x)
    assert torch.equal(rounded.values.float().abs().amax(-1), torch.full((40,), LARGEST))
    error = (rounded.dequantized() - x.float()).abs()
    normal = x.float().abs() > rounded.scale[:, None] * 2.0**-6
    assert (error <= x.float().abs() * (2.0**-4 * (1 + 1e-6)))[normal].all()
    assert (error <= rounded.scale[:, None] * (2.0**-10 * (1 + 1e-6)))[~normal].all()


def test_zeros_infinities_and_nans() -> None:
    x = torch.randn(5, 32)
    x[0], x[1, 3], x[2, 5], x[3] = 0.0, math.inf, math.nan, 1e-38
    weight, bias = round_rows(torch.randn(8, 32)), torch.randn(8)
    y = fp8_linear(x, weight, bias)
    assert torch.equal(y[0], bias)
    assert y[1].isnan().all() and y[2].isnan().all()
    assert torch.equal(y[3], bias)  # too small to matter, and nothing divides by zero
    assert y[4].isfinite().all()


def test_a_linear_is_close_to_the_dense_one() -> None:
    torch.manual_seed(2)
    x, weight, bias = (
        torch.randn(3, 50, 256).double(),
        torch.randn(96, 256).double() / 16,
        torch.randn(96).double(),
    )
    exact = torch.nn.functional.linear(x, weight, bias)
    y = fp8_linear(x, round_rows(weight), bias)
    assert 0.01 < (y - exact).norm() / exact.norm() < 0.04  # e4m3 has 3 bits of mantissa
    gelu = fp8_linear(x, round_rows(weight), bias, activation=1, activation_from=64)
    assert torch.equal(gelu[..., :64], y[..., :64])
    assert torch.allclose(gelu[..., 64:], torch.nn.functional.gelu(y[..., 64:], approximate="tanh"))
    pruned = fp8_linear(x, round_rows(weight), bias, prune=True)
    kept = torch.where(keep_mask(x), x, 0.0)
    assert torch.equal(pruned, fp8_linear(kept, round_rows(weight), bias))


@pytest.mark.parametrize(("rows", "channels"), [(64, 128), (70, 192), (8, 32), (200, 384)])
def test_packing_can_be_undone(rows: int, channels: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(rows, channels)
    keep = keep_mask(weight)
    rounded = round_rows(weight, keep)
    values, metadata = pack(rounded.values, keep)
    padded_rows, width = -(-rows // 64) * 64, -(-channels // 128) * 128
    assert values.shape == (padded_rows, width // 2) and values.dtype == E4M3
    assert metadata.shape == (width // 128, padded_rows, 4) and metadata.dtype == torch.int32
    found = unpack(values, metadata).float()
    assert torch.equal(found[:rows, :channels], rounded.values.float())
    assert not found[rows:].any() and not found[:, channels:].any()
    assert pack_dense(rounded.values).shape == (rows, width)


def test_metadata_by_hand() -> None:
    """Channels 1 and 3 of group 0, and 2 and 3 of group 7, of row 5; 0 and 1 of all others."""
    keep = torch.zeros(64, 128, dtype=torch.bool)
    keep[:, 0::4] = keep[:, 1::4] = True
    keep[5, :4] = torch.tensor([False, True, False, True])
    keep[5, 28:32] = torch.tensor([False, False, True, True])
    weight = Rounded(to_e4m3(torch.arange(128.0).repeat(64, 1)), torch.ones(64))
    values, metadata = pack(weight.values, keep)
    words = metadata[0].long() & 0xFFFFFFFF
    assert words[5].tolist() == [0xE444444D, 0x44444444, 0x44444444, 0x44444444]
    assert (words[torch.arange(64) != 5] == 0x44444444).all()
    assert values[5, :2].float().tolist() == [1.0, 3.0]
    assert values[5, 14:16].float().tolist() == weight.values[5, 30:32].float().tolist()
