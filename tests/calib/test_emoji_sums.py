# SPDX-License-Identifier: Apache-2.0
"""The emulated sums of FP8 tensor cores: exact while nothing is cut, and short of what is."""

from __future__ import annotations

import pytest
import torch

from calib.emoji_flux.sums import added

ONE = torch.ones(1, 1)


def test_short_sums_are_exact() -> None:
    torch.manual_seed(0)
    x, weight = torch.randint(-8, 9, (3, 96)).float(), torch.randint(-8, 9, (5, 96)).float()
    assert torch.equal(added(x, weight, bits=23, step=32), x @ weight.T)


@pytest.mark.parametrize(("small", "kept"), [(2.0**-13, 1.0), (2.0**-14, 0.0), (-(2.0**-14), 0.0)])
def test_what_is_smaller_than_the_last_bit_of_the_largest_is_lost(small: float, kept: float) -> None:
    x = torch.cat([ONE, torch.full((1, 63), small)], 1)
    found = float(added(x, torch.ones(1, 64), bits=13, step=32))
    assert found == 1 + kept * 63 * small


def test_the_sum_before_is_cut_where_a_larger_product_comes() -> None:
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 32] = 1 + 2.0**-10, 16.0
    assert float(added(x, torch.ones(1, 64), bits=8, step=32)) == 17.0
    assert float(added(x, torch.ones(1, 64), bits=14, step=32)) == 17 + 2.0**-10
