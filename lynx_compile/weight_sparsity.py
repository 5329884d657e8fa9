# SPDX-License-Identifier: Apache-2.0
"""2:4 sparsity of the weights instead of the activations: masks, and the least-squares refit of what is kept."""

from __future__ import annotations

import torch

from lynx_compile.calibrate import LayerStatistics
from lynx_compile.sparsity import keep_mask

SOLVED_AT_ONCE = 64  # rows of W; each brings a K/2 x K/2 system


def magnitude_mask(weight: torch.Tensor) -> torch.Tensor:
    """Keep the 2 largest |W| of every 4 neighbouring input channels. W: [N, K] -> bool [N, K]."""
    return keep_mask(weight)


def wanda_mask(weight: torch.Tensor, moments: LayerStatistics) -> torch.Tensor:
    """Keep the 2 largest |W| * rms(x) of every 4 (Wanda, arXiv 2306.11695, section 3). W: [N, K] -> bool [N, K]."""
    rms = (moments.xx.diagonal() + moments.x_mean.square()).sqrt()
    return keep_mask(weight, rms)


def refit(
    weight: torch.Tensor, keep: torch.Tensor, moments: LayerStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares over the kept weights of each row, exactly (SparseGPT approximates this), and the bias.

    Minimises E|x w^T - x v^T|^2 over v with v = 0 where not kept, means taken off: v_S = C_SS^-1 C_S: w, for
    every row on its own kept set S (K / 2 channels). ``ridge``, times the mean diagonal of C, pulls v_S to w_S.

    Args:
        weight: [N, K] float32. keep: bool [N, K] with K / 2 kept in each row.

    Returns:
        The refitted weights [N, K], and what to add to the bias [N].
    """
    out_channels, channels = weight.shape
    kept = keep.nonzero()[:, 1].reshape(out_channels, channels // 2)
    cross = weight @ moments.xx  # C_S: w for all channels at once
    damping = moments.xx.diagonal().mean() * ridge
    refitted = torch.zeros_like(weight)
    for rows in torch.arange(out_channels).split(SOLVED_AT_ONCE):
        index = kept[rows]
        system = moments.xx[index[:, :, None], index[:, None, :]]
        system = system + damping * torch.eye(channels // 2)
        target = cross[rows].gather(1, index) + damping * weight[rows].gather(1, index)
        solved = torch.cholesky_solve(target[..., None], torch.linalg.cholesky(system))[..., 0]
        refitted[rows] = torch.zeros(len(rows), channels).scatter(1, index, solved)
    return refitted, (weight - refitted) @ moments.x_mean
