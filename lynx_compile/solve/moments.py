# SPDX-License-Identifier: Apache-2.0
"""Second moments of what linears read, gathered batch by batch, and the error of a linear in their terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of the tensor x that a group of linears reads: all that the weight operand needs.

    ``tokens``: how many tokens were measured. ``x_mean``: [K]. ``xx``: covariance [K, K], E[x x^T] with the means
    taken off. ``x_rounding``: [K], mean squares of what rounding to FP8 makes wrong in x, where an FP8 node reads it.
    All float32.
    """

    tokens: int
    x_mean: torch.Tensor
    xx: torch.Tensor
    x_rounding: torch.Tensor | None = field(default=None, kw_only=True)

    def to(self, device: str) -> Self:
        """The same on another device."""
        moved: dict[str, Any] = {
            n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class PrunedStatistics(LayerStatistics):
    """With the moments of what the activation operand makes of x, S = s * z~.

    ``s_mean``: [K]. ``xs``, ``ss``: covariances [K, K], E[x S^T] and E[S S^T] with the means taken off.
    ``s_rounding``: ``x_rounding`` of what is kept alone.
    """

    s_mean: torch.Tensor
    xs: torch.Tensor
    ss: torch.Tensor
    s_rounding: torch.Tensor | None = field(default=None, kw_only=True)


class Moments:
    """Streaming means and covariances of x, and of S where ``pruned``, by Chan's update: large means do no harm."""

    def __init__(self, channels: int, device: torch.device, *, pruned: bool) -> None:
        self.tokens = 0
        self.mean = torch.zeros(2 if pruned else 1, channels, device=device)
        # xx, and with S xs and ss
        self.scatter = [torch.zeros(channels, channels, device=device) for _ in range(3 if pruned else 1)]
        self.rounding: list[torch.Tensor] = []

    def add(
        self, x: torch.Tensor, s: torch.Tensor | None = None, rounding: Sequence[torch.Tensor] = ()
    ) -> None:
        """x, S: [tokens, K] float32; S where the moments are ``pruned``.

        ``rounding``: errors [tokens, K] that rounding to FP8 makes in x, and then in what S keeps of it; every time or
        never.
        """
        values = [x] if s is None else [x, s]
        tokens = len(x)
        mean = torch.stack([value.mean(0) for value in values])
        off = mean - self.mean
        centred = [value - row for value, row in zip(values, mean, strict=True)]
        weight = self.tokens * tokens / (self.tokens + tokens)
        pairs = ((0, 0), (0, 1), (1, 1))[: len(self.scatter)]
        for scatter, (a, b) in zip(self.scatter, pairs, strict=True):
            scatter.addmm_(centred[a].T, centred[b]).addr_(off[a], off[b], alpha=weight)
        self.tokens += tokens
        self.mean += off * (tokens / self.tokens)
        squares = [error.square().mean(0) for error in rounding]
        old = self.rounding or [torch.zeros_like(new) for new in squares]
        self.rounding = [
            was + (new - was) * (tokens / self.tokens) for was, new in zip(old, squares, strict=True)
        ]

    def finish(self) -> LayerStatistics:
        """The statistics, on the CPU."""
        means = [row.clone() for row in self.mean.cpu()]
        covariances = [scatter.cpu() / self.tokens for scatter in self.scatter]
        x_rounding, s_rounding = [*(row.cpu() for row in self.rounding), None, None][:2]
        if len(means) == 1:
            return LayerStatistics(self.tokens, means[0], covariances[0], x_rounding=x_rounding)
        xx, xs, ss = covariances
        return PrunedStatistics(
            self.tokens, means[0], xx, means[1], xs, ss, x_rounding=x_rounding, s_rounding=s_rounding
        )


def relative_error(squared: float, dense_squared: float) -> float:
    """The error of a linear, wherever one is stated: |y - y_dense| / |y_dense|, both over all tokens and channels.

    y is the linear's own output with its bias, before an activation that its node may hold.
    """
    return (max(squared, 0.0) / max(dense_squared, 1e-30)) ** 0.5


def dense_squares(weight: torch.Tensor, bias: torch.Tensor, moments: LayerStatistics) -> torch.Tensor:
    """E[y^2] of every output channel of x W^T + b: [N]."""
    return ((weight @ moments.xx) * weight).sum(1) + (weight @ moments.x_mean + bias).square()
