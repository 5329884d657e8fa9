# SPDX-License-Identifier: Apache-2.0
"""The report's linears: what each became, what else it could have been, and where it stands among the blocks."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lynx_compile.engine.manifest import LinearChoice, Manifest, SparseLinears, form_in_words
from lynx_compile.passes.speed_table import DENSE, Form, roofline
from lynx_compile.recipe import NodeOperand
from lynx_compile.tools.comparison import Comparison

BLOCK = re.compile(r"(?P<stack>[^.]+(?:\.[^.\d]+)*)\.(?P<index>\d+)\.(?P<linear>.+)")
LEVELS = 5  # of colour, each up to twice the error of the one before
ROUND = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10)


@dataclass(frozen=True)
class Candidate:
    """What a linear could be. ``gain``: times as fast as dense; ``error``: that it adds at the model's output alone."""

    form: str
    gain: float
    measured: bool
    microseconds: float
    error: float | None
    chosen: bool


@dataclass(frozen=True)
class Linear:
    """A linear of the model.

    ``number``: among all. ``mark``: letters that stand for ``form``. ``at_output``: relative error that this form alone
    adds at the model's output, where a budget weighed it. ``expected``, ``measured``: its layer error, by calibration
    and by ``compare``. ``solved``: what calibration expected before tuning, if the manifest tells. ``gain``: of its
    plugin layer. ``layer_of``: how many linears that layer is of.
    """

    number: int
    path: str
    form: str
    mark: str
    at_output: float | None
    expected: float | None
    solved: float | None
    measured: float | None
    gain: float | None
    layer_of: int
    reason: str
    candidates: tuple[Candidate, ...]
    stepped_back: bool

    @property
    def is_dense(self) -> bool:
        return self.form == "dense"

    @property
    def tuned(self) -> float | None:
        """The layer error that is expected of tuned weights; None where they are the solved ones, or nobody knows."""
        return None if self.solved in (None, self.expected) else self.expected

    @property
    def layer_error(self) -> float | None:
        """As it was measured, else as expected."""
        return self.expected if self.measured is None else self.measured


@dataclass(frozen=True)
class Cell:
    """A linear in the picture; its error and that error's level, from 0: None where it is dense, or nobody knows it."""

    linear: Linear
    error: float | None
    level: int | None


@dataclass(frozen=True)
class Stack:
    """The blocks of one kind, a row each; a cell is None where a block lacks the linear."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class Picture:
    """``levels``: the largest error of each colour. ``marks``: (letters, form, how many), as the legend has them."""

    stacks: tuple[Stack, ...]
    levels: tuple[float, ...]
    marks: tuple[tuple[str, str, int], ...]
    has_unknown: bool


def all_linears(manifest: Manifest, comparison: Comparison | None) -> tuple[Linear, ...]:
    """Every linear of the model, by blocks and then as the manifest has them."""
    measured = {linear.linear: linear.error for linear in comparison.linears} if comparison else {}
    budget = manifest.budget
    choices = {choice.linear: choice for choice in budget.linears} if budget else {}
    back = set(budget.stepped_back) if budget else set()
    numbers = iter(range(len(manifest.dense) + sum(len(node.linears) for node in manifest.sparse)))

    def linear(
        path: str,
        form: Form,
        reason: str = "",
        expected: float | None = None,
        solved: float | None = None,
        gain: float | None = None,
        layer_of: int = 0,
    ) -> Linear:
        choice = choices.get(path)
        return Linear(
            number=next(numbers),
            path=path,
            form=form.words,
            mark=_mark(form),
            at_output=choice.candidates[choice.chosen].error if choice else None,
            expected=expected,
            solved=solved,
            measured=measured.get(path),
            gain=gain,
            layer_of=layer_of,
            reason=choice.reason if choice else reason,
            candidates=_candidates(choice) if choice else (),
            stepped_back=path in back,
        )

    found = [
        linear(path, Form(node.operand, node.fp8), "", expected, solved, gain_of(node), len(node.linears))
        for node in manifest.sparse
        for path, expected, solved in zip(
            node.linears, node.errors, node.solved_errors or [None] * len(node.linears), strict=True
        )
    ]
    found += [linear(left.linear, DENSE, left.reason) for left in manifest.dense]
    stacks = list(dict.fromkeys(_place(linear.path)[0] for linear in found))
    return tuple(sorted(found, key=lambda x: (stacks.index(_place(x.path)[0]), _place(x.path)[1])))


def gain_of(node: SparseLinears) -> float | None:
    """Times as fast as dense: by the recipe's costs, else by the roofline; None where no size is known."""
    if node.gain is not None or not node.tokens:
        return node.gain
    sizes = (node.tokens, node.in_channels, node.out_channels, node.rank)
    return roofline(*sizes).gain(Form(node.operand, node.fp8))


def picture(linears: Sequence[Linear], *, by_output: bool) -> Picture:
    """The linears of blocks as rows of cells, coloured by their error at the output or by their layer error."""
    shown = [linear for linear in linears if _place(linear.path)[0]]

    def error(linear: Linear) -> float | None:
        return None if linear.is_dense else linear.at_output if by_output else linear.layer_error

    top = round_up(max((error(linear) or 0.0 for linear in shown), default=0.0))
    levels = tuple(top / 2 ** (LEVELS - 1 - level) for level in range(LEVELS))

    def cell(linear: Linear) -> Cell:
        found = error(linear)
        return Cell(linear, found, None if found is None else sum(found > bound for bound in levels[:-1]))

    def stack(name: str) -> Stack:
        mine = {(m["linear"], int(m["index"])): x for x, m in _matches(shown) if m["stack"] == name}
        columns = list(dict.fromkeys(column for column, _ in mine))
        # What was left dense in every block stands together at the right.
        columns.sort(key=lambda column: all(x.is_dense for (of, _), x in mine.items() if of == column))
        rows = [
            (index, tuple(cell(mine[at]) if (at := (column, index)) in mine else None for column in columns))
            for index in sorted({index for _, index in mine})
        ]
        return Stack(name, tuple(columns), tuple(rows))

    forms = Counter((linear.mark, linear.form) for linear in linears)
    return Picture(
        stacks=tuple(stack(name) for name in dict.fromkeys(m["stack"] for _, m in _matches(shown))),
        levels=levels,
        marks=tuple((mark, form, count) for (mark, form), count in forms.most_common()),
        has_unknown=any(error(linear) is None and not linear.is_dense for linear in shown),
    )


def round_up(value: float) -> float:
    """The next round number."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in ROUND if power * factor >= value * (1 - 1e-9))


def _mark(form: Form) -> str:
    letters: dict[NodeOperand, str] = {"none": "", "weight": "w", "activation": "a"}
    return (letters[form.operand] + "8" * form.fp8) or "–"


def _candidates(choice: LinearChoice) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(
            form=form_in_words(candidate.operand, candidate.fp8),
            gain=candidate.gain,
            measured=candidate.measured,
            microseconds=choice.microseconds / candidate.gain,
            error=candidate.error,
            chosen=number == choice.chosen,
        )
        for number, candidate in enumerate(choice.candidates)
    )


def _matches(linears: Sequence[Linear]) -> list[tuple[Linear, re.Match[str]]]:
    return [(linear, match) for linear in linears if (match := BLOCK.fullmatch(linear.path))]


def _place(path: str) -> tuple[str, int]:
    """Stack and block of a linear; ("", -1) outside of the blocks."""
    match = BLOCK.fullmatch(path)
    return (match["stack"], int(match["index"])) if match else ("", -1)
