# SPDX-License-Identifier: Apache-2.0
"""Pruned weights against brute force, and the sweep and the descent against the exact solve."""

from __future__ import annotations

import itertools

import pytest
import torch

from lynx_compile.errors import StageError
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.solve import weight_refit
from lynx_compile.solve.masks import magnitude_mask, wanda_mask
from lynx_compile.solve.moments import LayerStatistics
from lynx_compile.solve.weight_refit import descend, prune, refit, sweep

RIDGE = 1e-3


def _moments(x: torch.Tensor) -> LayerStatistics:
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    return LayerStatistics(len(x), mean, covariance)


def _layer(
    channels: int, out_channels: int = 48, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens with strongly correlated channels of different sizes and a mean, weights, bias."""
    torch.manual_seed(seed)
    inner = channels // 3
    x = torch.randn(20 * channels, inner) @ torch.randn(inner, channels) / inner**0.5
    x = (x + 0.2 * torch.randn_like(x)) * (torch.rand(channels) * 2 + 0.1) + torch.randn(channels)
    return x, torch.randn(out_channels, channels), torch.randn(out_channels)


def _error(weight: torch.Tensor, sparse: torch.Tensor, moments: LayerStatistics) -> float:
    lost = weight - sparse
    return float((((lost @ moments.xx) * lost).sum() / ((weight @ moments.xx) * weight).sum()).sqrt())


def _is_two_of_four(weight: torch.Tensor) -> bool:
    return bool((weight.ne(0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())


def test_refit_is_the_least_squares_fit_of_what_is_kept() -> None:
    x, weight, bias = _layer(32)
    moments = _moments(x)
    keep = wanda_mask(weight, moments)
    refitted, offset = refit(weight, keep, moments, ridge=1e-9)
    target = (x @ weight.T + bias).double()
    for row in (0, 17, 47):
        design = torch.cat((x[:, keep[row]], torch.ones(len(x), 1)), 1).double()
        best = torch.linalg.lstsq(design, target[:, row]).solution
        assert torch.allclose(refitted[row, keep[row]].double(), best[:-1], atol=1e-3)
        assert (bias + offset)[row].item() == pytest.approx(best[-1].item(), abs=1e-3)
    assert not refitted[~keep].any()


def test_a_ridge_below_rounding_is_told() -> None:
    """Of few tokens: the sweep tries larger ones by itself, the exact solve of what is kept has this one alone."""
    x, weight, _ = _layer(96)
    with pytest.raises(StageError, match="moments of 'proj' cannot be factorised.*raise sparsity.ridge"):
        prune(weight, _moments(x[:8]), 1e-9, "proj")


@pytest.mark.parametrize("swept_at_once", [4, 12, 128])
def test_the_sweep_does_not_depend_on_its_blocks_and_is_sparsegpt(
    monkeypatch: pytest.MonkeyPatch, swept_at_once: int
) -> None:
    """Against the algorithm as published: the inverse of what is left of H, one column at a time."""
    x, weight, _ = _layer(40)
    moments = _moments(x)
    monkeypatch.setattr(weight_refit, "SWEPT_AT_ONCE", swept_at_once)
    got = sweep(weight, moments.xx, RIDGE, "x")
    hessian = moments.xx.double() + torch.eye(40) * moments.xx.diagonal().mean() * RIDGE
    expected = weight.double().clone()
    for group in range(0, 40, 4):
        # [H^-1]_jj once the columns before j are gone
        diagonal = torch.stack([hessian[j:, j:].inverse()[0, 0] for j in range(group, group + 4)])
        loss = expected[:, group : group + 4].square() / diagonal
        keep = torch.zeros_like(loss, dtype=torch.bool).scatter(
            1, loss.argsort(1, descending=True)[:, :2], True
        )
        for j in range(4):
            left = hessian[group + j :, group + j :].inverse()
            lost = torch.where(keep[:, j], 0.0, expected[:, group + j])
            expected[:, group + j :] -= lost[:, None] * left[0] / left[0, 0]
        expected[:, group : group + 4] *= keep
    assert _is_two_of_four(got)
    assert torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [64, 192])
def test_the_sweep_beats_its_mask_and_the_exact_solve_beats_the_sweep(channels: int) -> None:
    x, weight, _ = _layer(channels)
    moments = _moments(x)
    swept = sweep(weight, moments.xx, RIDGE, "x")
    keep = keep_mask(swept)
    exact, _ = refit(weight, keep, moments, RIDGE)
    errors = [
        _error(weight, v, moments) for v in (exact, swept, weight * keep, weight * magnitude_mask(weight))
    ]
    assert errors == sorted(errors) and errors[1] < 0.9 * errors[2]
    by_wanda, _ = refit(weight, wanda_mask(weight, moments), moments, RIDGE)
    assert errors[0] < _error(weight, by_wanda, moments)


@pytest.mark.parametrize("start", ["sweep", "mask"])
@pytest.mark.parametrize("channels", [64, 192, 384])
def test_the_descent_reaches_the_exact_solve(channels: int, start: str) -> None:
    x, weight, _ = _layer(channels)
    moments = _moments(x)
    swept = sweep(weight, moments.xx, RIDGE, "x")
    keep = keep_mask(swept)
    exact, _ = refit(weight, keep, moments, RIDGE)
    first = swept if start == "sweep" else weight * keep
    descended = descend(weight, first, keep, moments.xx, RIDGE)
    assert not descended[~keep].any()
    assert _error(weight, descended, moments) <= 1.01 * _error(weight, exact, moments)
    assert _error(weight, descended, moments) < 0.9 * _error(weight, first, moments)


@pytest.mark.parametrize("exact_channels", [0, 1024])
def test_prune_repairs_weights_and_bias(monkeypatch: pytest.MonkeyPatch, exact_channels: int) -> None:
    """Both ways to solve, judged on the tokens themselves."""
    monkeypatch.setattr(weight_refit, "EXACT_CHANNELS", exact_channels)
    x, weight, bias = _layer(96)
    moments = _moments(x)
    sparse, offset = prune(weight, moments, RIDGE, "x")
    assert _is_two_of_four(sparse)
    y = x @ weight.T + bias

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        return float((x @ w.T + b - y).square().mean())

    wanda = weight * wanda_mask(weight, moments)
    assert loss(sparse, bias + offset) < 0.3 * loss(wanda, bias)
    assert loss(sparse, bias + offset) < 0.9 * loss(sparse, bias)
    assert float((x @ sparse.T + bias + offset - y).mean(0).abs().max()) < 1e-3


def test_no_mask_of_a_small_layer_is_much_better() -> None:
    """All 6^3 masks of 12 channels, each with its best weights: the chosen one is near the best."""
    x, weight, _ = _layer(12, out_channels=20)
    moments = _moments(x)
    pairs = [torch.tensor(p) for p in itertools.combinations(range(4), 2)]
    masks = []
    for choice in itertools.product(pairs, repeat=3):
        mask = torch.zeros(12, dtype=torch.bool)
        mask[torch.cat([4 * i + pair for i, pair in enumerate(choice)])] = True
        masks.append(mask)
    best = torch.full((20,), torch.inf)
    for mask in masks:
        fitted, _ = refit(weight, mask.expand(20, 12), moments, RIDGE)
        best = torch.minimum(best, (((weight - fitted) @ moments.xx) * (weight - fitted)).sum(1))
    sparse, _ = prune(weight, moments, RIDGE, "x")
    found = (((weight - sparse) @ moments.xx) * (weight - sparse)).sum(1)
    assert (found >= best * 0.999).all()
    assert found.sum() < 1.5 * best.sum()


def test_a_constant_input_keeps_the_output() -> None:
    x, weight, bias = torch.randn(1, 64).expand(100, 64), torch.randn(8, 64), torch.randn(8)
    sparse, offset = prune(weight, _moments(x), RIDGE, "x")
    assert torch.allclose(x @ sparse.T + bias + offset, x @ weight.T + bias, atol=1e-3)
