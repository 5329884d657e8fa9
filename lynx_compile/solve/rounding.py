# SPDX-License-Identifier: Apache-2.0
"""Rounding of weights to e4m3 that hands each weight's error on to the others of its row.

With W the weights to stand for, C the covariance of their inputs and V the rounded ones, ``round_weights`` lowers
(W - V) C (W - V)^T of every row: coordinate descent over the input channels (as QuantEase, arXiv 2309.01885), each time
to the e4m3 value that is best while the others stand. What is 0 stays 0, so 2:4 weights stay 2:4. It starts from the
nearest values, never rises, and ends well below GPTQ's single sweep (arXiv 2210.17323), which besides hands errors on
to weights that are pruned; tests/solve/test_rounding.py holds both against each other.
"""

from __future__ import annotations

import torch

from lynx_compile.ops.fp8 import Rounded, round_rows, to_e4m3
from lynx_compile.solve.replayed import replayed

PASSES = 4  # over all columns; as many again gain a few per cent
SCALES = 8  # tried for every row, within a factor of 2: e4m3 repeats itself beyond that
ROUNDED_AT_ONCE = 128  # columns


def round_weights(
    start: torch.Tensor, target: torch.Tensor, covariance: torch.Tensor, ridge: float
) -> Rounded:
    """``start`` rounded with a scale a row: with error feedback, or of a row for which it is better plainly.

    Args:
        start: [N, K] float32, what is rounded. target: W [N, K], what it stands for. covariance: C [K, K].
        ridge: times C's mean diagonal, added to its diagonal.
    """
    metric = covariance + covariance.diagonal().mean().clamp_min(1e-12) * ridge * torch.eye(
        len(covariance), device=covariance.device
    )
    plain = round_rows(start)
    scale = _best_scales(start, plain.scale, metric.diagonal())
    fed = Rounded(_descend(start, scale, target, metric), scale)
    better = _lost(target, fed, covariance) < _lost(target, plain, covariance)
    values = torch.where(
        better[:, None], fed.values.view(torch.uint8), plain.values.view(torch.uint8)
    )  # torch.where takes no e4m3
    return Rounded(values.view(plain.values.dtype), torch.where(better, fed.scale, plain.scale))


def _lost(target: torch.Tensor, rounded: Rounded, covariance: torch.Tensor) -> torch.Tensor:
    lost = target - rounded.dequantized()
    return ((lost @ covariance) * lost).sum(1)


def _best_scales(weight: torch.Tensor, least: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Of ``SCALES`` scales from ``least`` [N] to twice that, each row's that loses least, channel by channel."""
    best, scales = torch.full_like(least, torch.inf), least
    for step in range(SCALES):
        scale = least * 2 ** (step / SCALES)
        rounded = to_e4m3(weight / scale[:, None]).float() * scale[:, None]
        lost = (weight - rounded).square() @ importance
        scales = torch.where(lost < best, scale, scales)
        best = torch.minimum(best, lost)
    return scales


def _descend(
    start: torch.Tensor, scale: torch.Tensor, target: torch.Tensor, metric: torch.Tensor
) -> torch.Tensor:
    """e4m3 values [N, K] of ``start`` for ``scale`` [N], after ``PASSES`` over their columns."""
    kept = start.T != 0  # [K, N]: a column of W is a contiguous row
    values = to_e4m3(start / scale[:, None]).T.float().contiguous() * scale
    gradient = metric @ (target.T - values)
    diagonal = metric.diagonal()
    for _ in range(PASSES):
        for first in range(0, len(values), ROUNDED_AT_ONCE):
            block = slice(first, first + ROUNDED_AT_ONCE)
            (moved,) = replayed(
                _descend_block,
                values[block],
                gradient[block],
                metric[block, block],
                diagonal[block],
                kept[block],
                scale,
            )
            change = moved - values[block]
            values[block] = moved
            gradient -= metric[:, block] @ change
    return to_e4m3((values / scale).T.contiguous())


def _descend_block(
    values: torch.Tensor,
    gradient: torch.Tensor,
    metric: torch.Tensor,
    diagonal: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor]:
    """The values of some columns [B, N], one after the other; ``gradient`` [B, N], ``metric`` [B, B]: of these."""
    values, gradient = values.clone(), gradient.clone()
    for j in range(len(values)):
        wanted = values[j] + gradient[j] / diagonal[j]
        rounded = torch.where(kept[j], to_e4m3(wanted / scale).float() * scale, 0.0)
        gradient.addr_(metric[:, j], rounded - values[j], alpha=-1)
        values[j] = rounded
    return (values,)
