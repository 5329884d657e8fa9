# SPDX-License-Identifier: Apache-2.0
"""Second moments of what linears read, gathered batch by batch, and the error of a linear in their terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lynx_compile.solve.linalg import tensor_cores


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


PAIRS = ((0, 0), (0, 1), (1, 1))  # of x and S: xx, xs and ss


class Moments:
    """Streaming means and covariances of x, and of S where ``pruned``, by Chan's update: large means do no harm."""

    def __init__(self, channels: int, device: torch.device, *, pruned: bool, rounded: bool = False) -> None:
        self.tokens = 0
        self.mean = torch.zeros(2 if pruned else 1, channels, device=device)
        self.scatter = [torch.zeros(channels, channels, device=device) for _ in range(3 if pruned else 1)]
        self.rounding = [torch.zeros(channels, device=device) for _ in self.mean] if rounded else []

    def add(
        self, x: torch.Tensor, s: torch.Tensor | None = None, rounding: Sequence[torch.Tensor] = ()
    ) -> None:
        """x, S: [tokens, K] float32; S where the moments are ``pruned``.

        ``rounding``: errors [tokens, K] that rounding to FP8 makes in x, and then in what S keeps of it, where the
        moments are ``rounded``.
        """
        values = [x] if s is None else [x, s]
        tokens = len(x)
        mean = torch.stack([value.mean(0) for value in values])
        off = mean - self.mean
        centred = [value - row for value, row in zip(values, mean, strict=True)]
        weight = self.tokens * tokens / (self.tokens + tokens)
        # Those read more bits than bf16 activations have, and lose the same of both factors.
        with tensor_cores():
            for scatter, (a, b) in zip(self.scatter, PAIRS, strict=False):
                scatter.addmm_(centred[a].T, centred[b]).addr_(off[a], off[b], alpha=weight)
        self.tokens += tokens
        self.mean += off * (tokens / self.tokens)
        for was, error in zip(self.rounding, rounding, strict=True):
            was += (error.square().mean(0) - was) * (tokens / self.tokens)

    def add_up(self, all_reduce: Callable[[torch.Tensor], None]) -> None:
        """Become those of all tokens that several processes have seen: Chan's update for all of them at once.

        Args:
            all_reduce: puts the sum over the processes in a tensor's place.
        """
        own = self.tokens
        sums = torch.cat([own * self.mean.double(), *(own * row.double()[None] for row in self.rounding)])
        count = sums.new_tensor([own])
        all_reduce(count)
        all_reduce(sums)
        self.tokens = int(count)
        means = (sums / max(self.tokens, 1)).float()
        off = self.mean - means[: len(self.mean)]
        self.mean, self.rounding = means[: len(self.mean)], list(means[len(self.mean) :])
        for scatter, (a, b) in zip(self.scatter, PAIRS, strict=False):
            all_reduce(scatter.addr_(off[a], off[b], alpha=own))

    def finish(self) -> LayerStatistics:
        """The statistics, on the CPU. The sums become them, since both would be twice the memory: it is done once."""
        means = [row.clone() for row in self.mean.cpu()]
        covariances = []
        while self.scatter:
            covariances.append(self.scatter.pop(0).cpu().div_(self.tokens))
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
