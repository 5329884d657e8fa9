# SPDX-License-Identifier: Apache-2.0
"""Which form every open linear takes: a greedy knapsack, of saved time for squared error at the model's output.

Of each node the forms on the lower convex hull of squared error over time make steps, from dense to faster and faster
ones. Steps are taken in the order of saved time per added squared error, as long as the limit holds. They are sorted by
the error of the node alone; what is held against the limit is that of the whole plan, with what its nodes' errors have
in common (``sensitivity``). Where the weights will be tuned it is what tuning is expected to leave: a part of what 2:4
adds, and all that FP8 rounding does, which hardly any weights make up for. ``verify`` steps back if more is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch

from lynx_compile.errors import InputError
from lynx_compile.passes.select import Candidates, Decision, Open, Option, SparsityPlan, decided
from lynx_compile.passes.sensitivity import Rows, Sensitivities
from lynx_compile.passes.speed_table import DENSE, DENSE_FP8, Form
from lynx_compile.recipe import Budget

TUNED = 0.65  # of the error that 2:4 weights add, what tuning leaves; .46 to .68 on the models that were seen
Limit = tuple[Literal["max_output_error", "min_psnr", "min_speed"], float]  # the budget's key, and its value


@dataclass(frozen=True)
class Step:
    """A node goes from one form to a faster one: microseconds that it saves, squared error that it adds."""

    group: str
    before: Option
    after: Option
    saved: float
    added: float

    @property
    def worth(self) -> float:
        return self.saved / self.added if self.added > 0 else math.inf


@dataclass(frozen=True)
class Selection:
    """``steps``: those that the limit allows, in the order of their worth. Any first ones of them make a plan.

    ``remains``: the share of what 2:4 adds that is expected to be there in the end; 1 where nothing is tuned.
    """

    candidates: Candidates
    sensitivities: Sensitivities
    limit: Limit
    steps: tuple[Step, ...]
    remains: float = 1.0

    @property
    def is_optimistic(self) -> bool:
        """Whether the limit is on the error, and counts on tuning."""
        return self.limit[0] == "max_output_error" and self.remains < 1

    def plan(self, taken: int) -> SparsityPlan:
        """The plan after so many steps, every decision with its reason.

        Raises:
            InputError: no linear would change.
        """
        made: dict[str, Decision] = {}
        for name, option in self.options(taken).items():
            open_ = self.candidates.open[name]
            for decision in decided(open_, option, self._reason(open_, option)):
                made[decision.linear.path] = decision
        return self.candidates.plan(made)

    def options(self, taken: int) -> dict[str, Option]:
        """The open groups' forms after so many steps."""
        made = {name: open_.options[0] for name, open_ in self.candidates.open.items()}
        return made | {step.group: step.after for step in self.steps[:taken]}

    def speed(self, taken: int) -> float:
        """How many times as fast as dense the blocks' linears are together."""
        dense, left = self.candidates.microseconds()
        return dense / (left - sum(step.saved for step in self.steps[:taken]))

    def error(self, taken: int, steps: range | None = None) -> float:
        """Predicted relative error of the model's output with the solved weights, at some denoising steps or all."""
        adds = self._adds if steps is None else self._adds.at(steps)
        return adds.solved(self._total(adds, taken))

    def expected(self, taken: int) -> float:
        """The same over all steps, as it is expected to be in the end."""
        return self._adds.expected(self._total(self._adds, taken))

    def alone(self, linear: str, form: Form) -> float | None:
        """Predicted error of one linear's form by itself; None where it was not solved."""
        if form == DENSE:
            return 0.0
        nodes, rows = self.candidates.nodes, self._adds.rows
        columns = [
            number
            for number, (node, path) in enumerate(self.sensitivities.columns)
            if path == linear and nodes[node].form == form
        ]
        return rows.error(rows.adds[:, columns[-1]]) if columns else None

    def ranges(self, most: int) -> list[range]:
        """The denoising steps in up to so many ranges of one length; only such as have rows."""
        count = int(self._adds.rows.steps.max()) + 1
        bounds = [round(count * part / most) for part in range(most + 1)]
        found = [range(a, b) for a, b in pairwise(bounds)]
        return [steps for steps in found if len(self._adds.rows.at(steps).weights)]

    def speed_at(self, most: float) -> float:
        """The speed that an error of ``most``, expected in the end, would allow."""
        dense, left = self.candidates.microseconds()
        steps = _taken(self.candidates, self._adds, ("max_output_error", most))
        return dense / (left - sum(step.saved for step in steps))

    def fewer(self, taken: int, share: float) -> int:
        """The most steps below ``taken`` that are expected to err at most so much of it; none where all err more."""
        most = share * self.expected(taken)
        return next((fewer for fewer in range(taken - 1, 0, -1) if self.expected(fewer) <= most), 0)

    def halves(self, taken: int) -> list[tuple[range, float]]:
        """Speeds of two engines, each for half of the steps, with as much error in it as this plan has in all."""
        most = self.expected(taken)
        dense, left = self.candidates.microseconds()
        found = []
        for steps in self.ranges(2):
            own = _taken(self.candidates, self._adds.at(steps), ("max_output_error", most))
            found.append((steps, dense / (left - sum(step.saved for step in own))))
        return found

    @cached_property
    def _adds(self) -> _Adds:
        return _Adds.of(self.candidates, self.sensitivities, self.remains)

    def _total(self, adds: _Adds, taken: int) -> torch.Tensor:
        return adds.fixed + sum(
            (adds.nodes[name, option.form] for name, option in self.options(taken).items()),
            torch.zeros_like(adds.fixed),
        )

    def _reason(self, open_: Open, option: Option) -> str:
        """What the form gains and adds, and what the next faster one would."""

        def added(other: Option) -> float:
            return self._adds.solved(self._adds.nodes[open_.group.name, other.form])

        said = [] if option.form == DENSE else [f"{option.reason}, adds {added(option):.4f} at the output"]
        said += [
            f"{faster.form.words} would be {faster.gain:.2f}x and add {added(faster):.4f}"
            for faster in open_.options[open_.options.index(option) + 1 :][:1]
        ]
        return "; ".join(said)


def choose(
    candidates: Candidates, sensitivities: Sensitivities, budget: Budget, *, tuned: bool = False
) -> Selection:
    """Take steps while the budget's limit holds; of ``min_psnr``, which only images tell, all of them.

    Args:
        tuned: whether the weights will be.

    Raises:
        InputError: ``min_speed`` is more than the fastest forms give, or what the recipe fixes alone is over the limit.
    """
    key, value = limit = budget.limit
    remains = TUNED if tuned else 1.0
    adds = _Adds.of(candidates, sensitivities, remains)
    if key == "max_output_error" and adds.solved(adds.fixed) > value:
        raise InputError(
            f"What the recipe fixes adds {adds.solved(adds.fixed):.4f} at the model's output by itself, "
            f"more than budget.max_output_error ({value:g}).",
            "Leave more to auto in sparsity.operand, or allow more.",
        )
    return Selection(candidates, sensitivities, limit, tuple(_taken(candidates, adds, limit)), remains)


def require_speed(candidates: Candidates, budget: Budget) -> None:
    """Refuse a ``min_speed`` that even the fastest forms miss; known before anything runs."""
    dense, left = candidates.microseconds()
    for open_ in candidates.open.values():
        left -= open_.microseconds(open_.options[0]) - open_.microseconds(open_.options[-1])
    if budget.min_speed is not None and dense < budget.min_speed * left:
        raise InputError(
            f"budget.min_speed is {budget.min_speed:g}, and the fastest forms make the blocks' linears "
            f"{dense / left:.2f}x as fast as dense.",
            "Lower it, or exclude less.",
        )


@dataclass(frozen=True)
class _Adds:
    """``Rows.adds`` by what is decided, [2, rows]: of ``fixed`` linears together, and of a group's open ones by form.

    First all that they add, then what they would in dense FP8 where they are FP8, which tuning does not mend; 0 where
    that was not solved. ``remains``: the share of the rest that is there once it is tuned.
    """

    rows: Rows
    fixed: torch.Tensor
    nodes: Mapping[tuple[str, Form], torch.Tensor]
    remains: float

    @classmethod
    def of(cls, candidates: Candidates, sensitivities: Sensitivities, remains: float) -> _Adds:
        rows = sensitivities.load()
        # Of a form that is solved in a smaller and a larger node a linear has two columns, which are next to alike.
        by_linear = {
            (path, candidates.nodes[node].form): rows.adds[:, number]
            for number, (node, path) in enumerate(sensitivities.columns)
        }
        nothing = torch.zeros(len(rows.weights), dtype=rows.adds.dtype)

        def together(linears: Sequence[tuple[str, Form]]) -> torch.Tensor:
            whole = sum((by_linear[one] for one in linears if one[1] != DENSE), nothing)
            rounded = (by_linear.get((path, DENSE_FP8), nothing) for path, form in linears if form.fp8)
            return torch.stack([whole, sum(rounded, nothing)])

        made = [(decision.linear.path, decision.form) for fixed in candidates.fixed for decision in fixed]
        nodes = {
            (name, option.form): together([(linear.path, option.form) for linear in open_.linears])
            for name, open_ in candidates.open.items()
            for option in open_.options
        }
        return cls(rows, together(made), nodes, remains)

    def at(self, steps: range) -> _Adds:
        """Those of some denoising steps."""
        inside = (self.rows.steps >= steps.start) & (self.rows.steps < steps.stop)
        nodes = {key: adds[:, inside] for key, adds in self.nodes.items()}
        return _Adds(self.rows.at(steps), self.fixed[:, inside], nodes, self.remains)

    def solved(self, total: torch.Tensor) -> float:
        """Relative error at the output of what adds so much, [2, rows], as it was solved."""
        return self.rows.error(total[0])

    def expected(self, total: torch.Tensor) -> float:
        """The same once it is tuned: rounding and the rest add as errors that have nothing to do with each other."""
        solved, rounded = (self.rows.error(adds) ** 2 for adds in total)
        rounded = min(rounded, solved)
        return float((rounded + self.remains**2 * (solved - rounded)) ** 0.5)


def _taken(candidates: Candidates, adds: _Adds, limit: Limit) -> list[Step]:
    """The steps that the limit allows, one after the other."""
    key, value = limit
    dense, left = candidates.microseconds()
    now = {name: open_.options[0] for name, open_ in candidates.open.items()}
    total = adds.fixed + sum(adds.nodes[name, option.form] for name, option in now.items())
    taken = []
    steps = [step for open_ in candidates.open.values() for step in _steps(open_, adds)]
    for step in sorted(steps, key=lambda step: step.worth, reverse=True):
        if key == "min_speed" and dense >= value * left:
            break
        moved = total + adds.nodes[step.group, step.after.form] - adds.nodes[step.group, step.before.form]
        too_much = key == "max_output_error" and adds.expected(moved) > value
        if too_much or now[step.group] != step.before:  # the step before it was too much
            continue
        now[step.group] = step.after
        total, left = moved, left - step.saved
        taken.append(step)
    return taken


def _steps(open_: Open, adds: _Adds) -> list[Step]:
    """From dense along the hull: each time to the form that saves most for what it adds."""
    steps: list[Step] = []
    at, left = open_.options[0], list(open_.options[1:])
    name = open_.group.name
    squares = {option: adds.expected(adds.nodes[name, option.form]) ** 2 for option in open_.options}
    while left:
        ways = [
            Step(name, at, to, open_.microseconds(at) - open_.microseconds(to), squares[to] - squares[at])
            for to in left
        ]
        best = max(ways, key=lambda step: (step.worth, step.saved))
        steps.append(best)
        at, left = best.after, [option for option in left if option.gain > best.after.gain]
    return steps
