# SPDX-License-Identifier: Apache-2.0
"""2:4 weights that make up for what is pruned: masks, and the least-squares refit of what is kept.

With V the sparse weights of a linear W and C the covariance of its inputs, ``prune`` minimises E|x W^T - x V^T|^2
over V and the bias, means taken off: the trace of (W - V) C (W - V)^T. A ridge on C's diagonal pulls V to W.

SparseGPT's sweep (arXiv 2301.00774) chooses the mask. Its weights leave about twice the error of the best weights for
that mask (mean over the linears of digits-flux: 0.073 and 0.036; Wanda's mask with its best weights: 0.042). Those come
from one exact solve per row up to ``EXACT_CHANNELS`` input channels (work in the order of N K^3), and beyond from
conjugate gradients on all rows together (K^3 + N K^2), starting at the sweep's.
"""

from __future__ import annotations

import torch

from lynx_compile.ops.sparse_linear import GROUP, keep_mask
from lynx_compile.solve.linalg import cholesky, not_factorised
from lynx_compile.solve.moments import LayerStatistics
from lynx_compile.solve.replayed import replayed

EXACT_CHANNELS = 1024
SOLVED_AT_ONCE = 64  # rows of W; each brings a K/2 x K/2 system
SWEPT_AT_ONCE = 128  # columns of W, a multiple of 4
TINY = 1e-30
DESCENT_STEPS = 64  # on digits-flux 32 came within 3 % of the exact solve's mean error, 64 within 0.5 %


def prune(
    weight: torch.Tensor, moments: LayerStatistics, ridge: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best 2:4 weights found for W [N, K], float32, and what to add to the bias [N].

    Raises:
        StageError: the moments of ``name`` cannot be factorised.
    """
    swept = sweep(weight, moments.xx, ridge, name)
    keep = keep_mask(swept)
    if weight.shape[1] <= EXACT_CHANNELS:
        try:
            return refit(weight, keep, moments, ridge)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise not_factorised(name) from None  # few tokens, and a ridge below float32's rounding
    descended = descend(weight, swept, keep, moments.xx, ridge)
    return descended, (weight - descended) @ moments.x_mean


def refit(
    weight: torch.Tensor, keep: torch.Tensor, moments: LayerStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares over the kept weights of each row, exactly, and the bias.

    v_S = C_SS^-1 C_S: w for every row on its own kept set S (K / 2 channels). ``ridge``, times the mean diagonal
    of C, pulls v_S to w_S.

    Args:
        weight: [N, K] float32. keep: bool [N, K] with K / 2 kept in each row.

    Returns:
        The refitted weights [N, K], and what to add to the bias [N].
    """
    out_channels, channels = weight.shape
    kept = keep.nonzero()[:, 1].reshape(out_channels, channels // 2)
    cross = weight @ moments.xx  # C_S: w for all channels at once
    damping = moments.xx.diagonal().mean().clamp_min(1e-12) * ridge
    identity = torch.eye(channels // 2, device=weight.device)
    refitted = torch.zeros_like(weight)
    for start in range(0, out_channels, SOLVED_AT_ONCE):
        rows = slice(start, start + SOLVED_AT_ONCE)
        index = kept[rows]
        system = moments.xx[index[:, :, None], index[:, None, :]] + damping * identity
        target = cross[rows].gather(1, index) + damping * weight[rows].gather(1, index)
        solved = torch.cholesky_solve(target[..., None], torch.linalg.cholesky(system))[..., 0]
        refitted[rows] = torch.zeros_like(weight[rows]).scatter(1, index, solved)
    return refitted, (weight - refitted) @ moments.x_mean


def sweep(weight: torch.Tensor, covariance: torch.Tensor, ridge: float, name: str) -> torch.Tensor:
    """SparseGPT: prune column after column, each time moving the error into the columns not yet visited.

    Of every group of 4 the two weights go whose loss w^2 / [H^-1]_jj is least (section 3.3), H being C with its
    ridge, inverted over the columns not yet visited, and w the weights as updated so far.

    Args:
        weight: [N, K] float32. covariance: C [K, K].

    Returns:
        The sparse weights [N, K].
    """
    factor = _inverse_factor(covariance, ridge, name)
    swept = weight.T.clone()  # [K, N]: a column of W is a contiguous row
    for start in range(0, len(swept), SWEPT_AT_ONCE):
        end = min(start + SWEPT_AT_ONCE, len(swept))
        swept[start:end], errors = replayed(_sweep_block, swept[start:end], factor[start:end, start:end])
        swept[end:] -= factor[start:end, end:].T @ errors
    return swept.T.contiguous()


def _sweep_block(columns: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``columns`` [B, N] pruned, and their errors [B, N], each divided by its diagonal element of ``factor``."""
    columns, errors = columns.clone(), torch.zeros_like(columns)
    diagonal = factor.diagonal()
    for j in range(len(columns)):
        if j % GROUP == 0:
            group = slice(j, j + GROUP)
            keep = keep_mask((columns[group] / diagonal[group, None]).T).T
        kept = columns[j] * keep[j % GROUP]
        errors[j] = (columns[j] - kept) / diagonal[j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        columns[j] = kept
    return columns, errors


def _inverse_factor(covariance: torch.Tensor, ridge: float, name: str) -> torch.Tensor:
    """Upper U [K, K] with U^T U = H^-1; row j holds column j's update over the columns behind it.

    From H = R R^T with R upper, which is the Cholesky factor of H turned by 180 degrees, U = R^-1: half the work of
    inverting H and factorising the inverse, and no loss of digits in between.
    """
    upper = cholesky(covariance.flip(0, 1), ridge, name).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)


def descend(
    weight: torch.Tensor, start: torch.Tensor, keep: torch.Tensor, covariance: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Conjugate gradients towards what ``refit`` solves, for all rows at once, from ``start`` [N, K] on.

    Each row is a problem of its own; they share the products with C. Scaled by the diagonal.
    """
    diagonal = covariance.diagonal()
    damping = diagonal.mean().clamp_min(1e-12) * ridge
    scale = diagonal + damping
    refitted = start.clone()
    gradient = keep * ((weight - start) @ covariance + damping * (weight - start))
    direction = gradient / scale
    slope = (gradient * direction).sum(1, keepdim=True)
    for _ in range(DESCENT_STEPS):
        image = keep * (direction @ covariance + damping * direction)
        length = slope / (direction * image).sum(1, keepdim=True).clamp_min(TINY)
        refitted += length * direction
        gradient -= length * image
        scaled = gradient / scale
        steeper = (gradient * scaled).sum(1, keepdim=True)
        direction = scaled + steeper / slope.clamp_min(TINY) * direction
        slope = steeper
    return refitted
