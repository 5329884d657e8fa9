# SPDX-License-Identifier: Apache-2.0
"""Which 2 of every 4 neighbouring weights stay, by the metrics of the literature: nothing is refitted here."""

from __future__ import annotations

import torch

from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.solve.moments import LayerStatistics

RIA_POWER = 0.5  # the authors' a
BAWA_START: tuple[float, ...] = (1.0, 1.0, 0.5)  # RIA's, with l2 norms
BAWA_STEPS = (0.5, 0.25, 0.125)
BAWA_LARGEST = 2.0
TINY = 1e-30


def magnitude_mask(weight: torch.Tensor) -> torch.Tensor:
    """Keep the 2 largest |W| of every 4 neighbouring input channels. W: [N, K] -> bool [N, K]."""
    return keep_mask(weight)


def wanda_mask(weight: torch.Tensor, moments: LayerStatistics) -> torch.Tensor:
    """Keep the 2 largest |W| * rms(x) of every 4 (Wanda, arXiv 2306.11695, section 3). W: [N, K] -> bool [N, K]."""
    return keep_mask(weight, _rms(moments))


def ria_mask(weight: torch.Tensor, moments: LayerStatistics) -> torch.Tensor:
    """Keep the 2 largest by relative importance and activations (RIA, "Plug-and-Play", ICLR 2024, section 3.1).

    S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * rms(x_j)^a with a = 1/2: a weight counts by its share of
    its input channel and of its output channel. Without the paper's permutation of channels, which none of the
    methods here has. W: [N, K] -> bool [N, K].
    """
    size = weight.abs()
    shares = size / size.sum(0).clamp_min(TINY) + size / size.sum(1, keepdim=True).clamp_min(TINY)
    return keep_mask(shares, _rms(moments) ** RIA_POWER)


def bawa_mask(weight: torch.Tensor, moments: LayerStatistics) -> torch.Tensor:
    """Keep the 2 largest by balanced weights and activations (BaWA, ICML 2025, PMLR 267:40134).

    S_ij = (|W_ij| / |W_:j|^t1 + |W_ij| / |W_i:|^t2) * rms(x_j)^t3, with l2 norms of the input and of the output
    channel: magnitude normalisation and outlier regularisation. The paper finds its exponents without gradients, to
    lower what a block's output loses; here a pattern search lowers what each linear loses, (W - V) C (W - V)^T, from
    RIA's exponents on, and never ends above them. (From the paper's abstract and its public reviews.)
    W: [N, K] -> bool [N, K].
    """

    def mask_of(powers: tuple[float, ...]) -> torch.Tensor:
        return keep_mask(*_bawa_scores(weight, moments, powers))

    def lost_by(powers: tuple[float, ...]) -> float:
        lost = weight * ~mask_of(powers)
        return float(((lost @ moments.xx) * lost).sum() + (lost @ moments.x_mean).square().sum())

    best = BAWA_START
    least = lost_by(best)
    for step in BAWA_STEPS:
        for which in range(len(best)):
            for change in (step, -step):
                tried = tuple(
                    min(max(power + change * (number == which), 0.0), BAWA_LARGEST)
                    for number, power in enumerate(best)
                )
                if (lost := lost_by(tried)) < least:
                    best, least = tried, lost
    return mask_of(best)


def _bawa_scores(
    weight: torch.Tensor, moments: LayerStatistics, powers: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What of S belongs to the weight [N, K], and to its input channel [K]."""
    of_input, of_output, of_activation = powers
    size = weight.abs()
    norms_in = weight.norm(dim=0).clamp_min(TINY) ** of_input
    norms_out = weight.norm(dim=1, keepdim=True).clamp_min(TINY) ** of_output
    return size / norms_in + size / norms_out, _rms(moments) ** of_activation


def _rms(moments: LayerStatistics) -> torch.Tensor:
    """sqrt(E[x^2]) of every channel, [K]."""
    return (moments.xx.diagonal() + moments.x_mean.square()).clamp_min(0).sqrt()
