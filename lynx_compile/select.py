# SPDX-License-Identifier: Apache-2.0
"""Which linears become sparse: every candidate that the recipe's globs admit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from lynx_compile.errors import InputError
from lynx_compile.models import Linear, LinearGroup
from lynx_compile.recipe import Sparsity


@dataclass(frozen=True)
class Decision:
    """What happens to one linear: the operand that is pruned, or ``none``, and why."""

    linear: Linear
    operand: Literal["activation", "none"]
    reason: str


@dataclass(frozen=True)
class SparsityPlan:
    """A decision for every linear of the model, and the sparse ones grouped by the tensor they read."""

    decisions: tuple[Decision, ...]
    groups: tuple[LinearGroup, ...]


def select(groups: tuple[LinearGroup, ...], sparsity: Sparsity) -> SparsityPlan:
    """Decide for every linear; a group keeps those of its linears that become sparse."""
    decisions = tuple(_decide(linear, sparsity) for group in groups for linear in group.linears)
    return SparsityPlan(decisions, candidates(groups, sparsity))


def candidates(groups: tuple[LinearGroup, ...], sparsity: Sparsity) -> tuple[LinearGroup, ...]:
    """The groups, cut down to the linears that may become sparse.

    Raises:
        InputError: a glob matches no linear, or no linear is left.
    """
    linears = [linear for group in groups for linear in group.linears]
    for key in ("include", "exclude"):
        for glob in getattr(sparsity, key):
            if not any(fnmatchcase(linear.path, glob) for linear in linears):
                example = next(
                    (linear.path for linear in linears if linear.refusal is None), "blocks.0.attn.to_q"
                )
                raise InputError(
                    f"sparsity.{key}: '{glob}' matches no linear of this model.",
                    f"Globs are matched against module paths such as '{example}'.",
                )
    kept = (
        replace(
            group, linears=tuple(x for x in group.linears if _decide(x, sparsity).operand == "activation")
        )
        for group in groups
    )
    left = tuple(group for group in kept if group.linears)
    if not left:
        raise InputError("No linear would become sparse.", "Widen sparsity.include or drop sparsity.exclude.")
    return left


def _decide(linear: Linear, sparsity: Sparsity) -> Decision:
    if linear.refusal is not None:
        return Decision(linear, "none", linear.refusal)
    for glob in sparsity.exclude:
        if fnmatchcase(linear.path, glob):
            return Decision(linear, "none", f"excluded by the recipe ('{glob}')")
    if not any(fnmatchcase(linear.path, glob) for glob in sparsity.include):
        return Decision(linear, "none", "not included by the recipe")
    return Decision(linear, "activation", "candidate")
