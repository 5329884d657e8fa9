# SPDX-License-Identifier: Apache-2.0
"""The best low-rank branch for a metric, and SLiM, which pairs one with pruned weights."""

from __future__ import annotations

import torch

from lynx_compile.solve.linalg import cholesky
from lynx_compile.solve.masks import wanda_mask
from lynx_compile.solve.moments import LayerStatistics


def low_rank(
    target: torch.Tensor, metric: torch.Tensor, rank: int, ridge: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K], B [N, r] whose A^T B^T is the best rank-r fit of ``target`` [K, N] in ``metric``^(1/2).

    Raises:
        StageError: the metric of ``name`` cannot be factorised.
    """
    if not rank:
        return target.new_zeros(0, target.shape[0]), target.new_zeros(target.shape[1], 0)
    factor = cholesky(metric, ridge, name)  # metric = L L^T, so |metric^(1/2) X| = |L^T X|
    image = factor.T @ target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the range finder is random; its result must not be
        left, _, _ = torch.svd_lowrank(image, q=min(rank + 16, *image.shape), niter=6)
    left = left[:, :rank]
    lora_down = torch.linalg.solve_triangular(factor.T, left, upper=True).T
    lora_up = (left.T @ image).T
    # Both halves get the same size, so that neither leaves the range of a 16-bit type.
    balance = (lora_up.norm(dim=0) / lora_down.norm(dim=1).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    return lora_down * balance[:, None], lora_up / balance


def slim(
    weight: torch.Tensor, moments: LayerStatistics, rank: int, ridge: float, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SLiM without its quantisation (arXiv 2410.09615, section 3): Wanda's mask, and a low-rank branch for the loss.

    With D = diag(rms(x)) the branch B A is the best rank-r fit of W - W_s in the norm |(.) D|, which is an SVD of
    (W - W_s) D whose right half is divided by D again. Then the kept weights make room for the branch,
    V = W_s - mask * (B A), as the authors' code does (github.com/Paramathic/slim), so that only what was pruned
    errs. The authors' r is a tenth of K.

    Args:
        weight: [N, K] float32. rank: r.

    Returns:
        V [N, K] with 2 of every 4 kept, A [r, K] and B [N, r]: y = x V^T + (x A^T) B^T + b.
    """
    keep = wanda_mask(weight, moments)
    saliency = torch.diag(moments.xx.diagonal() + moments.x_mean.square())
    lora_down, lora_up = low_rank((weight * ~keep).T, saliency, rank, ridge, name)
    return (weight - lora_up @ lora_down) * keep, lora_down, lora_up
