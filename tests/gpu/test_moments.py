# SPDX-License-Identifier: Apache-2.0
"""Moments by tensor cores against float64: what TF32 loses of them is below what bf16 lost of the activations."""

from __future__ import annotations

import pytest
import torch

from lynx_compile.solve.moments import Moments, PrunedStatistics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CHANNELS, TOKENS, CALLS = 256, 2048, 4
TF32 = 2.0**-11  # relative error of a factor, at most


def test_moments_are_those_of_float64() -> None:
    torch.manual_seed(0)
    size = torch.logspace(-2, 1, CHANNELS)  # a few channels dominate, as in models
    x = (torch.randn(CALLS * TOKENS, CHANNELS) * size + 3 * size).bfloat16().float()
    s = x * (torch.rand_like(x) < 0.5)
    moments = Moments(CHANNELS, torch.device("cuda"), pruned=True)
    for some, kept in zip(x.cuda().split(TOKENS), s.cuda().split(TOKENS), strict=True):
        moments.add(some, kept)
    found = moments.finish()
    assert isinstance(found, PrunedStatistics)
    xs = torch.cat([x, s], 1).double()
    off = xs - xs.mean(0)
    wanted = off.T @ off / len(xs)
    scale = wanted.diagonal().sqrt()
    for name, rows, columns in (("xx", 0, 0), ("xs", 0, 1), ("ss", 1, 1)):
        row, column = (slice(at * CHANNELS, (at + 1) * CHANNELS) for at in (rows, columns))
        lost = (getattr(found, name).double() - wanted[row, column]).abs() / scale[row, None] / scale[column]
        assert float(lost.max()) < 2 * TF32
        assert float(lost.square().mean().sqrt()) < TF32 / 8
    symmetric = torch.linalg.eigvalsh(found.xx.double())
    assert float(symmetric[0]) > 0
