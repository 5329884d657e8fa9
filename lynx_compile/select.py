# SPDX-License-Identifier: Apache-2.0
"""Which linears become sparse, and with which operand: what the recipe's globs say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from lynx_compile.errors import InputError
from lynx_compile.models import Linear, LinearGroup
from lynx_compile.recipe import Operand, Sparsity
from lynx_compile.weight_sparsity import STEP


@dataclass(frozen=True)
class Decision:
    """What happens to one linear: the operand that is pruned, or ``none``, and why."""

    linear: Linear
    operand: Literal["activation", "weight", "none"]
    reason: str


@dataclass(frozen=True)
class SparseGroup(LinearGroup):
    """Linears that read the same tensor and have one operand: one node of the rewritten graph."""

    operand: Operand


@dataclass(frozen=True)
class SparsityPlan:
    """A decision for every linear of the model, and the sparse ones by the tensor they read and their operand."""

    decisions: tuple[Decision, ...]
    groups: tuple[SparseGroup, ...]


def select(groups: tuple[LinearGroup, ...], sparsity: Sparsity) -> SparsityPlan:
    """Decide for every linear; a group keeps those of its linears that become sparse, split by operand."""
    decisions = tuple(_decide(linear, sparsity) for group in groups for linear in group.linears)
    sparse = tuple(part for group in candidates(groups, sparsity) for part in _split(group, sparsity))
    return SparsityPlan(decisions, sparse)


def candidates(groups: tuple[LinearGroup, ...], sparsity: Sparsity) -> tuple[LinearGroup, ...]:
    """The groups, cut down to the linears that may become sparse.

    Raises:
        InputError: a glob matches no linear, or no linear is left.
    """
    linears = [linear for group in groups for linear in group.linears]
    for key, globs in (
        ("include", sparsity.include),
        ("exclude", sparsity.exclude),
        ("operand", sparsity.operand_globs),
    ):
        for glob in globs:
            if not any(fnmatchcase(linear.path, glob) for linear in linears):
                example = next(
                    (linear.path for linear in linears if linear.refusal is None), "blocks.0.attn.to_q"
                )
                raise InputError(
                    f"sparsity.{key}: '{glob}' matches no linear of this model.",
                    f"Globs are matched against module paths such as '{example}'.",
                )
    kept = (
        replace(group, linears=tuple(x for x in group.linears if _decide(x, sparsity).operand != "none"))
        for group in groups
    )
    left = tuple(group for group in kept if group.linears)
    if not left:
        raise InputError(
            "No linear would become sparse.", "Widen sparsity.include or sparsity.operand, or exclude less."
        )
    return left


def _split(group: LinearGroup, sparsity: Sparsity) -> list[SparseGroup]:
    operands: tuple[Operand, ...] = ("activation", "weight")
    parts = [
        SparseGroup(
            group.name,
            tuple(linear for linear in group.linears if _decide(linear, sparsity).operand == operand),
            operand,
        )
        for operand in operands
    ]
    return [part for part in parts if part.linears]


def _decide(linear: Linear, sparsity: Sparsity) -> Decision:
    if linear.refusal is not None:
        return Decision(linear, "none", linear.refusal)
    for glob in sparsity.exclude:
        if fnmatchcase(linear.path, glob):
            return Decision(linear, "none", f"excluded by the recipe ('{glob}')")
    if not any(fnmatchcase(linear.path, glob) for glob in sparsity.include):
        return Decision(linear, "none", "not included by the recipe")
    matching = (item for item in sparsity.operand_globs.items() if fnmatchcase(linear.path, item[0]))
    glob, operand = next(matching, ("*", "activation"))
    if operand == "none":
        return Decision(linear, "none", f"operand none by the recipe ('{glob}')")
    if operand == "weight" and linear.in_channels % STEP:
        reason = f"K = {linear.in_channels} is not divisible by {STEP}, as the weight operand needs it"
        return Decision(linear, "none", reason)
    return Decision(linear, operand, "candidate")
