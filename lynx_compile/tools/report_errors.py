# SPDX-License-Identifier: Apache-2.0
"""The report's errors of the model's output: as a budget foresaw and measured them, and by step as ``compare`` did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lynx_compile.engine.manifest import AtOutput, Budget
from lynx_compile.tools.comparison import Comparison, StepError
from lynx_compile.tools.report_linears import round_up

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = (
    400,
    220,
    52,
    388,
    10,
    182,
)  # pixels of the chart, and of its box in it
GRID = 5
LABELS = 6  # timesteps that are written below the chart, at most


@dataclass(frozen=True)
class Bar:
    """An error of the budget's, and how long its bar is, in percent of the longest."""

    error: float | None
    length: float


@dataclass(frozen=True)
class Row:
    """``bars``: predicted, solved and tuned."""

    name: str
    bars: tuple[Bar, Bar, Bar]


@dataclass(frozen=True)
class Line:
    """A line of the chart, and where its points are. ``style``: a class of the style sheet."""

    name: str
    style: str
    points: tuple[tuple[float, float, str], ...]

    @property
    def path(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.points)


@dataclass(frozen=True)
class Chart:
    """Errors of the model's output by denoising step. ``x``, ``y``: places and texts of the axes' labels."""

    lines: tuple[Line, ...]
    x: tuple[tuple[float, str], ...]
    y: tuple[tuple[float, str], ...]
    summary: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


def budget_rows(budget: Budget) -> tuple[Row, ...]:
    """Over all steps, and by quarters of them."""
    named: list[tuple[str, AtOutput]] = [("all", budget.error)]
    named += [
        (f"{at.first}" if at.first == at.last else f"{at.first} to {at.last}", at) for at in budget.steps
    ]
    longest = max(error or 0.0 for _, at in named for error in _three(at)) or 1.0

    def bar(error: float | None) -> Bar:
        return Bar(error, 100 * (error or 0.0) / longest)

    return tuple(Row(name, (bar(at.predicted), bar(at.solved), bar(at.tuned))) for name, at in named)


def chart(comparison: Comparison | None) -> Chart | None:
    """What ``compare`` found by step, as lines in a box of fixed size; None where it did not run."""
    if comparison is None or not comparison.output:
        return None
    series: list[tuple[str, str, Sequence[StepError], str]] = [
        ("root mean square", "mean", comparison.output, "error"),
        ("worst state", "worst", comparison.output, "worst"),
        *(
            (f"{engine.kind} engine on the GPU", f"{engine.kind}-engine", engine.steps, "error")
            for engine in comparison.engines
        ),
    ]
    most = round_up(max(getattr(step, field) for _, _, steps, field in series for step in steps))

    def x(step: StepError) -> float:
        return LEFT + (RIGHT - LEFT) * step.step / max(len(comparison.output) - 1, 1)

    def y(error: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * error / most

    def line(name: str, style: str, steps: Sequence[StepError], field: str) -> Line:
        found = ((step, getattr(step, field)) for step in steps)
        return Line(
            name,
            style,
            tuple((x(s), y(e), f"step {s.step}, t = {s.timestep:.3f}: {e:.4f}") for s, e in found),
        )

    first, worst = comparison.output[0], max(comparison.output, key=lambda step: step.error)
    return Chart(
        lines=tuple(line(*one) for one in series),
        x=tuple(
            (x(step), f"{step.timestep:.2f}")
            for step in comparison.output[:: -(-len(comparison.output) // LABELS)]
        ),
        y=tuple((y(most * i / GRID), f"{most * i / GRID:.3g}") for i in range(GRID + 1)),
        summary=f"Output error by step: {first.error:.4f} in the first, "
        f"at most {worst.error:.4f}, in step {worst.step}",
    )


def _three(at: AtOutput) -> tuple[float | None, ...]:
    return at.predicted, at.solved, at.tuned
