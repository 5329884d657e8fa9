# SPDX-License-Identifier: Apache-2.0
"""Linears that read one tensor, as one: the first that is called computes all of them, each takes its part.

Which tensor was read is told by its identity, and nothing is held once every reader has had its part, so that within
one forward pass ``torch.compile`` sees one product and three slices, and between two there is no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Merged(nn.Module):
    """``linear``: its output channels are those of several linears, ``sizes`` of each, in order.

    Its ``parts(x, sizes)`` are theirs, activated where it takes an activation over. ``channels_first``: x's and y's
    channels are on axis 1.
    """

    linear: Any

    def __init__(self, linear: nn.Module, sizes: Sequence[int], channels_first: bool = False) -> None:
        super().__init__()
        self.linear, self.sizes, self.channels_first = linear, list(sizes), channels_first
        self._held: dict[
            str, torch.Tensor
        ] = {}  # x, and by their numbers the parts that are still to be taken

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Part ``index`` of the product of x."""
        held = self._held
        if held.get("x") is not x or str(index) not in held:
            held.clear()
            held["x"] = x
            rows = x.movedim(1, -1) if self.channels_first else x
            for number, part in enumerate(self.linear.parts(rows, self.sizes)):
                held[str(number)] = part.movedim(-1, 1) if self.channels_first else part
        part = held.pop(str(index))
        if len(held) == 1:
            held.clear()
        return part


class Reader(nn.Module):
    """Stands where one linear of a ``Merged`` was, or that linear and its activation."""

    def __init__(self, merged: Merged, index: int) -> None:
        super().__init__()
        self.merged, self.index = merged, index
        self.out_features = merged.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.take(x, self.index)

    def extra_repr(self) -> str:
        return f"part {self.index}, out_features={self.out_features}"
