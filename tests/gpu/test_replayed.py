# SPDX-License-Identifier: Apache-2.0
"""Loops over columns as CUDA graphs: the bits that they have when Python launches every kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lynx_compile.solve import replayed, rounding, weight_refit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OUT, CHANNELS = 96, 272  # blocks of 128 columns, and one of 16


@pytest.fixture
def problem() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(4 * CHANNELS, CHANNELS, device="cuda") * torch.rand(CHANNELS, device="cuda")
    yield torch.randn(OUT, CHANNELS, device="cuda"), x.T @ x / len(x)
    replayed.forget()


def test_a_sweep_is_the_same(
    problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, covariance = problem
    found = [weight_refit.sweep(weight * scale, covariance, 1e-3, "node") for scale in (1.0, 2.0, 1.0)]
    monkeypatch.setattr(weight_refit, "replayed", _launched)
    assert torch.equal(found[0], weight_refit.sweep(weight, covariance, 1e-3, "node"))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_rounding_is_the_same(
    problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, covariance = problem
    start = weight_refit.sweep(weight, covariance, 1e-3, "node")
    found = rounding.round_weights(start, weight, covariance, 1e-3)
    monkeypatch.setattr(rounding, "replayed", _launched)
    wanted = rounding.round_weights(start, weight, covariance, 1e-3)
    assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(found.scale, wanted.scale)


def _launched(loop: replayed.Loop, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return loop(*(tensor.clone() for tensor in given))
