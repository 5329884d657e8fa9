# SPDX-License-Identifier: Apache-2.0
"""The literature's masks and SLiM, each against its formula written out one weight at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from lynx_compile.solve.low_rank import low_rank, slim
from lynx_compile.solve.masks import BAWA_START, bawa_mask, magnitude_mask, ria_mask, wanda_mask
from lynx_compile.solve.moments import LayerStatistics

K, N, RIDGE = 16, 12, 1e-6
Score = Callable[[int, int], float]


def _layer() -> tuple[torch.Tensor, torch.Tensor, LayerStatistics]:
    """Tokens of channels with very different sizes and a mean, W [N, K] with uneven channels, the moments of x."""
    torch.manual_seed(3)
    x = torch.randn(400, K) @ torch.randn(K, K) * torch.logspace(-1, 1, K)[torch.randperm(K)] + torch.randn(K)
    weight = torch.randn(N, K) * (torch.rand(N, 1) * 3 + 0.2) * (torch.rand(K) * 3 + 0.2)
    mean = x.mean(0)
    return x, weight, LayerStatistics(len(x), mean, (x - mean).T @ (x - mean) / len(x))


def _best(score: Score) -> torch.Tensor:
    """Of every 4 neighbours the pair with the largest sum, by trying all six."""
    keep = torch.zeros(N, K, dtype=torch.bool)
    for i, first in itertools.product(range(N), range(0, K, 4)):
        pair = max(
            itertools.combinations(range(first, first + 4), 2), key=lambda two: sum(score(i, j) for j in two)
        )
        keep[i, list(pair)] = True
    return keep


def test_the_metrics_are_their_formulas() -> None:
    x, weight, moments = _layer()
    size, rms = weight.abs().double(), x.double().square().mean(0).sqrt()
    rows, columns = size.sum(1), size.sum(0)
    expected: dict[str, Score] = {
        "magnitude": lambda i, j: float(size[i, j]),
        "wanda": lambda i, j: float(size[i, j] * rms[j]),
        "ria": lambda i, j: float((size[i, j] / columns[j] + size[i, j] / rows[i]) * rms[j] ** 0.5),
    }
    found = {
        "magnitude": magnitude_mask(weight),
        "wanda": wanda_mask(weight, moments),
        "ria": ria_mask(weight, moments),
    }
    for name, score in expected.items():
        assert torch.equal(found[name], _best(score)), name
    assert len({tuple(mask.flatten().tolist()) for mask in found.values()}) == 3, "they tell methods apart"


def test_bawa_loses_no_more_than_the_exponents_that_it_starts_from_and_some_grid_point_is_no_better() -> None:
    x, weight, moments = _layer()
    size, rms = weight.abs().double(), x.double().square().mean(0).sqrt()

    def lost(keep: torch.Tensor) -> float:
        return float((x.double() @ (weight * ~keep).double().T).square().sum())

    def mask(first: float, second: float, third: float) -> torch.Tensor:
        columns, rows = size.norm(dim=0) ** first, size.norm(dim=1) ** second
        return _best(lambda i, j: float((size[i, j] / columns[j] + size[i, j] / rows[i]) * rms[j] ** third))

    found = bawa_mask(weight, moments)
    assert found.unflatten(-1, (-1, 4)).sum(-1).eq(2).all()
    assert lost(found) < lost(mask(*BAWA_START)), "the search has moved"
    grid = [lost(mask(*powers)) for powers in itertools.product((0.0, 1.0, 2.0), repeat=3)]
    assert lost(found) < sorted(grid)[len(grid) // 4]


@pytest.mark.parametrize("rank", [2, 4])
def test_the_low_rank_is_the_best_in_its_metric(rank: int) -> None:
    _, weight, moments = _layer()
    down, up = low_rank(weight.T, moments.xx, rank, 1e-9, "x")
    root = torch.linalg.cholesky(moments.xx.double())
    singular = torch.linalg.svdvals(root.T @ weight.T.double())
    lost = (root.T @ (weight.T - down.T @ up.T).double()).norm()
    assert float(lost) == pytest.approx(float(singular[rank:].norm()), rel=1e-3)  # Eckart-Young


def test_slim_errs_only_where_it_pruned_and_its_branch_is_the_svd_of_the_weighed_loss() -> None:
    x, weight, moments = _layer()
    rank = 3
    kept, down, up = slim(weight, moments, rank, RIDGE, "x")
    keep = wanda_mask(weight, moments)
    whole = kept + up @ down
    torch.testing.assert_close(whole[keep], weight[keep])
    assert not kept[~keep].any()
    rms = x.double().square().mean(0).sqrt()
    left, singular, right = torch.linalg.svd((weight * ~keep).double() * rms, full_matrices=False)
    branch = (left[:, :rank] * singular[:rank]) @ right[:rank] / rms
    torch.testing.assert_close((up @ down).double(), branch, rtol=1e-2, atol=1e-2)
    lost = [((weight - made) * rms).norm() for made in (whole, weight * keep)]
    assert lost[0] < 0.8 * lost[1]
