# SPDX-License-Identifier: Apache-2.0
"""Which linears become sparse, and with which operand: what the recipe's globs say, else what is faster."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from lynx_compile.errors import InputError
from lynx_compile.models.structure import Linear, LinearGroup
from lynx_compile.ops.sparse_weight_linear import STEP
from lynx_compile.passes.speed_table import ROOFLINE, UNKNOWN_SPEED, CostTable, roofline
from lynx_compile.recipe import Operand, Sparsity

NodeOperand = Operand | Literal["none"]  # which operand is 2:4, if one is


@dataclass(frozen=True)
class Decision:
    """What happens to one linear: the operand that is pruned, or ``none``, and why."""

    linear: Linear
    operand: NodeOperand
    reason: str


@dataclass(frozen=True)
class SparseGroup(LinearGroup):
    """Linears that read the same tensor and have one operand: one node of the rewritten graph.

    ``operand``: which one is 2:4; ``none``, with ``fp8`` alone, where neither is.
    ``gain``: how many times as fast as dense it was measured to be; None where the recipe's costs do not tell.
    ``fp8``: whether it multiplies in FP8.
    """

    operand: NodeOperand
    gain: float | None = None
    fp8: bool = False


@dataclass(frozen=True)
class SparsityPlan:
    """A decision for every linear of the model, and the sparse ones by the tensor they read and their operand."""

    decisions: tuple[Decision, ...]
    groups: tuple[SparseGroup, ...]


def select(groups: tuple[LinearGroup, ...], sparsity: Sparsity, gpu: str | None = None) -> SparsityPlan:
    """Decide for every linear; a group keeps those of its linears that become sparse, split by operand.

    Args:
        gpu: architecture that the engine is for, such as ``sm90``, where it is one alone. Of some the speed is not
            known: there only measured linears become sparse, and those that a glob of ``sparsity.operand`` names.

    Raises:
        InputError: a glob matches no linear, the recipe's costs cannot be read, or no linear is left.
    """
    _refuse_idle_globs([linear for group in groups for linear in group.linears], sparsity)
    costs = CostTable.load(Path(sparsity.costs)) if sparsity.costs else None
    unknown = gpu if gpu in UNKNOWN_SPEED and (costs is None or costs.architecture != gpu) else None
    decided = [(group, _decide(group, sparsity, costs, unknown)) for group in groups]
    decisions = tuple(decision for _, made in decided for decision in made)
    sparse = tuple(part for group, made in decided for part in _split(group, made, sparsity, costs))
    if not sparse:
        first = next((d for d in decisions if d.linear.refusal is None), decisions[0])
        raise InputError(
            f"No linear would become sparse ('{first.linear.path}': {first.reason}).",
            "Widen sparsity.include or sparsity.operand, or exclude less.",
        )
    return SparsityPlan(decisions, sparse)


def _refuse_idle_globs(linears: list[Linear], sparsity: Sparsity) -> None:
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


def _decide(
    group: LinearGroup, sparsity: Sparsity, costs: CostTable | None, unknown: str | None
) -> list[Decision]:
    """The recipe decides first; speed does for those of the group's linears that it leaves open, together.

    ``unknown``: the GPU, where nothing is known of its speed.
    """
    by_recipe = {linear: _by_recipe(linear, sparsity) for linear in group.linears}
    left = [linear for linear, decision in by_recipe.items() if decision is None]
    fixed = [decision for decision in by_recipe.values() if decision is not None]
    operand: Literal["activation", "weight", "none"] = "none"
    reason = f"its speed on {unknown} is unknown: give sparsity.costs, by 'lynx-compile bench' on that GPU"
    if left and unknown is None:
        operand, reason = _by_speed(group, left, fixed, sparsity, costs)
    return [decision or Decision(linear, operand, reason) for linear, decision in by_recipe.items()]


def _by_recipe(linear: Linear, sparsity: Sparsity) -> Decision | None:
    """What the recipe says, or the linear's own shape; None where it may become sparse if that is faster."""
    if linear.refusal is not None:
        return Decision(linear, "none", linear.refusal)
    for glob in sparsity.exclude:
        if fnmatchcase(linear.path, glob):
            return Decision(linear, "none", f"excluded by the recipe ('{glob}')")
    if not any(fnmatchcase(linear.path, glob) for glob in sparsity.include):
        return Decision(linear, "none", "not included by the recipe")
    matching = (item for item in sparsity.operand_globs.items() if fnmatchcase(linear.path, item[0]))
    glob, operand = next(matching, ("", "auto"))
    if "weight" in (operand, sparsity.operand) and linear.in_channels % STEP:
        reason = f"K = {linear.in_channels} is not divisible by {STEP}, as the weight operand needs it"
        return Decision(linear, "none", reason)
    if operand == "auto":
        return None
    return Decision(linear, operand, f"operand {operand} by the recipe ('{glob}')")


def _by_speed(
    group: LinearGroup, left: list[Linear], fixed: list[Decision], sparsity: Sparsity, costs: CostTable | None
) -> tuple[Literal["activation", "weight", "none"], str]:
    """The faster of the recipe's operands for what it has left open, or none where that is slower than dense.

    Counted is the whole node: with the linears that have got the same operand by a glob. A single operand is
    judged by what was measured alone, not by the roofline.
    """
    choices: dict[Operand, tuple[float, str]] = {}
    for operand in sparsity.operands:
        if operand == "weight" and group.in_channels % STEP:
            continue
        node = [*left, *(decision.linear for decision in fixed if decision.operand == operand)]
        out_channels, rank = sum(linear.out_channels for linear in node), sparsity.rank_for(group.in_channels)
        sizes = (group.tokens, group.in_channels, out_channels)
        gain, source = (costs.gain(*sizes, operand, rank), costs.name) if costs else (None, "")
        if gain is None:
            if len(sparsity.operands) == 1:
                return operand, f"operand {operand} by the recipe"
            gain, source = roofline(*sizes, rank).gain(operand), ROOFLINE
        shape = f"{group.tokens} x {group.in_channels} -> {out_channels}"
        choices[operand] = gain, f"{gain:.2f}x as fast as dense ({shape}, {source})"
    best = max(choices, key=lambda operand: choices[operand][0])
    gain, text = choices[best]
    return (best, text) if gain >= 1 else ("none", f"would be {text}")


def _split(
    group: LinearGroup, decisions: list[Decision], sparsity: Sparsity, costs: CostTable | None
) -> list[SparseGroup]:
    parts = []
    operands: tuple[Operand, ...] = ("activation", "weight")
    for operand in operands:
        linears = tuple(decision.linear for decision in decisions if decision.operand == operand)
        if linears:
            out_channels = sum(linear.out_channels for linear in linears)
            sizes = (group.tokens, group.in_channels, out_channels)
            gain = costs.gain(*sizes, operand, sparsity.rank_for(group.in_channels)) if costs else None
            parts.append(SparseGroup(group.name, linears, group.tokens, operand, gain, calls=group.calls))
    return parts
