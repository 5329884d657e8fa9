# SPDX-License-Identifier: Apache-2.0
"""Rounding with error feedback: against all e4m3 values of tiny rows, plain rounding, and GPTQ's sweep."""

from __future__ import annotations

import itertools

import pytest
import torch

from lynx_compile.ops.fp8 import E4M3, Rounded, round_rows, to_e4m3
from lynx_compile.solve import rounding
from lynx_compile.solve.moments import LayerStatistics
from lynx_compile.solve.rounding import round_weights
from lynx_compile.solve.weight_refit import _inverse_factor as inverse_factor
from lynx_compile.solve.weight_refit import prune
from tests.solve.test_weight_refit import _layer as layer
from tests.solve.test_weight_refit import _moments as moments_of

RIDGE = 1e-3


def _lost(target: torch.Tensor, rounded: Rounded, covariance: torch.Tensor) -> torch.Tensor:
    lost = (target - rounded.dequantized()).double()
    return ((lost @ covariance.double()) * lost).sum(1)


def _problem(channels: int, out_channels: int = 48) -> tuple[torch.Tensor, torch.Tensor, LayerStatistics]:
    """Tokens, weights and the moments of the first half of the tokens; the others are held out."""
    x, weight, _ = layer(channels, out_channels)
    return x[len(x) // 2 :], weight, moments_of(x[: len(x) // 2])


def test_tiny_rows_are_near_the_best_of_all_neighbours() -> None:
    """Every choice of the 24 nearest e4m3 values of 3 weights, for the scale that was chosen."""
    torch.manual_seed(0)
    x = torch.randn(200, 2) @ torch.randn(2, 3) + 0.2 * torch.randn(200, 3)
    weight, covariance = torch.randn(40, 3), x.T @ x / len(x)
    rounded = round_weights(weight, weight, covariance, 1e-9)
    grid = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    grid = grid[grid.isfinite()].unique()
    best = []
    for row in range(len(weight)):
        values = grid * rounded.scale[row]
        near = [values[(values - w).abs().argsort()[:24]].tolist() for w in weight[row]]
        lost = (weight[row] - torch.tensor(list(itertools.product(*near)))).double()
        best.append(((lost @ covariance.double()) * lost).sum(1).min())
    found, plain, least = (
        _lost(weight, rounded, covariance),
        _lost(weight, round_rows(weight), covariance),
        torch.stack(best),
    )
    assert (found >= least * (1 - 1e-4)).all()
    assert found.sum() - least.sum() < 0.3 * (plain.sum() - least.sum())
    assert (found <= 1.01 * least).sum() > len(weight) // 2, "most are the best"


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("channels", [64, 192])
def test_feedback_beats_plain_rounding_and_gptq_also_on_tokens_that_it_has_not_seen(
    channels: int, sparse: bool
) -> None:
    x, weight, moments = _problem(channels)
    start = prune(weight, moments, RIDGE, "x")[0] if sparse else weight
    fed, plain = round_weights(start, weight, moments.xx, RIDGE), round_rows(start)
    swept = _gptq(start, fed.scale, moments.xx)

    def added(rounded: Rounded) -> float:
        return float(_lost(start, rounded, moments.xx).sum().sqrt())

    held_out = moments_of(x).xx
    assert added(fed) < (0.7 if sparse else 0.45) * added(plain)
    assert added(fed) < 0.9 * added(swept)
    assert _lost(weight, fed, held_out).sum() < _lost(weight, plain, held_out).sum()
    assert _lost(weight, fed, held_out).sum() < _lost(weight, swept, held_out).sum()
    assert ((fed.values.float() != 0) <= (start != 0)).all(), "what is pruned stays pruned"


def _gptq(weight: torch.Tensor, scale: torch.Tensor, covariance: torch.Tensor) -> Rounded:
    """The sweep as published, dropping what is 0 as SparseGPT's joint form does."""
    factor, keep, values = inverse_factor(covariance, RIDGE, "x"), weight.T != 0, weight.T.clone()
    for j in range(len(values)):
        rounded = to_e4m3(values[j] / scale).float() * scale * keep[j]
        values[j + 1 :].addr_(factor[j, j + 1 :], (values[j] - rounded) / factor[j, j], alpha=-1)
        values[j] = rounded
    return Rounded(to_e4m3(values.T / scale[:, None]), scale)


def test_no_row_is_worse_than_rounded_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the descent is spoiled: then the plain row is kept, with its own scale."""
    _, weight, moments = _problem(64)
    plain = round_rows(weight)
    fed = round_weights(weight, weight, moments.xx, RIDGE)
    assert (_lost(weight, fed, moments.xx) <= _lost(weight, plain, moments.xx)).all()
    honest = rounding._descend

    def spoiled(*arguments: torch.Tensor) -> torch.Tensor:
        values = honest(*arguments)
        values.view(torch.uint8)[::2] = 0
        return values

    monkeypatch.setattr(rounding, "_descend", spoiled)
    mixed = round_weights(weight, weight, moments.xx, RIDGE)
    for rows, wanted in ((slice(0, None, 2), plain), (slice(1, None, 2), fed)):
        assert torch.equal(mixed.dequantized()[rows], wanted.dequantized()[rows])
        assert torch.equal(mixed.scale[rows], wanted.scale[rows])


@pytest.mark.parametrize("rounded_at_once", [1, 24, 1000])
def test_it_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch, rounded_at_once: int) -> None:
    _, weight, moments = _problem(64)
    weight, covariance = weight.double().float(), moments.xx
    wanted = round_weights(weight, weight, covariance, RIDGE)
    monkeypatch.setattr(rounding, "ROUNDED_AT_ONCE", rounded_at_once)
    found = round_weights(weight, weight, covariance, RIDGE)
    # Sums in another order decide close calls the other way.
    lost = [_lost(weight, rounded, covariance).sum() for rounded in (wanted, found)]
    assert float(lost[1]) == pytest.approx(float(lost[0]), rel=0.02)
    assert (found.values.float() == wanted.values.float()).float().mean() > 0.9


def test_scales_are_searched_and_a_row_of_zeros_is_harmless() -> None:
    _, weight, moments = _problem(64)
    weight[3] = 0
    fed, plain = round_weights(weight, weight, moments.xx, RIDGE), round_rows(weight)
    relative = (fed.scale / plain.scale)[torch.arange(len(weight)) != 3]
    assert len(relative.unique()) > 3 and relative.min() >= 1 and relative.max() < 2
    assert not fed.values[3].float().any() and fed.dequantized().isfinite().all()
