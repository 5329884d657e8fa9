# SPDX-License-Identifier: Apache-2.0
"""Gated activations of torch modules that a product can make in its epilogue, and how a module does without them.

A module computes them where it likes, between its linears, so that the classes that do are known here one by one. One
that is not keeps its own; it then gets the two values, as it would of plain linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from lynx_compile.ops.sparse_linear import GELU_ERF, SILU


@dataclass(frozen=True)
class ModuleGate:
    """activation(x) * gate of what linears that read one tensor make.

    ``x``, ``gate``: first of the ``channels`` rows of each, counted linear by linear. ``reader``: path of the module
    that returns it, once a product makes it, behind the rows of ``linear`` that are neither. ``idle``: paths of modules
    that have nothing to do any more. ``attributes``: {(path, name): value} that let a module know.
    """

    activation: int
    x: int
    gate: int
    channels: int
    linear: str
    reader: str
    idle: tuple[str, ...] = ()
    attributes: Mapping[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[int, int, int]:
        """As a manifest has them."""
        return self.x, self.gate, self.channels


def find_gate(module: nn.Module, linears: Sequence[str], sizes: Sequence[int]) -> ModuleGate | None:
    """The gated activation that a known class makes of these linears; None where there is none.

    Args:
        linears: paths, in the order in which their rows are counted. sizes: output channels of each.
    """
    starts = dict(zip(linears, accumulate(sizes, initial=0), strict=False))
    for path, size in zip(linears, sizes, strict=True):
        parent, _, name = path.rpartition(".")
        holder: Any = module.get_submodule(parent)
        start, half = starts[path], size // 2
        kind = type(holder).__name__
        if (
            kind in ("GEGLU", "SwiGLU") and name == "proj"
        ):  # they multiply the first half by the second's activation
            activation = GELU_ERF if kind == "GEGLU" else SILU
            return ModuleGate(activation, start + half, start, half, path, parent)
        if name == "linear_in" and _is_flux2_gate(holder, "act_fn"):
            return ModuleGate(SILU, start, start + half, half, path, path, (f"{parent}.act_fn",))
        if name == "to_qkv_mlp_proj" and _is_flux2_gate(holder, "mlp_act_fn") and holder.mlp_mult_factor == 2:
            first = start + 3 * holder.inner_dim
            return ModuleGate(
                SILU, first, first + holder.mlp_hidden_dim, holder.mlp_hidden_dim, path, path,
                (f"{parent}.mlp_act_fn",), {(parent, "mlp_mult_factor"): 1},
            )  # fmt: skip
        other = f"{parent}.w3"
        if name == "w1" and hasattr(holder, "_forward_silu_gating") and other in starts:
            return ModuleGate(
                SILU, start, starts[other], size, path, path, (other,), {(parent, "_forward_silu_gating"): _first},
            )  # fmt: skip
    return None


def _is_flux2_gate(holder: nn.Module, name: str) -> bool:
    return type(getattr(holder, name, None)).__name__ == "Flux2SwiGLU"


def _first(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """In the place of a method that takes x and its gate, where the gated x comes already."""
    return x
