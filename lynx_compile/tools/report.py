# SPDX-License-Identifier: Apache-2.0
"""``OUT.html``: one self-contained page on an engine, for people; written by a compilation, and again by ``compare``.

What became sparse and at what error, as a picture of the model's blocks; what was measured; what compiling took;
samples; how to load it. The page's form is ``report.html.jinja``, which escapes every value.
"""

from __future__ import annotations

import base64
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from lynx_compile.engine.manifest import Manifest, SparseLinears
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import save_text
from lynx_compile.files.outputs import Outputs
from lynx_compile.passes.speed_table import Form, roofline
from lynx_compile.tools.comparison import Comparison, StepError

BLOCK = re.compile(r"(?P<stack>[^.]+(?:\.[^.\d]+)*)\.(?P<index>\d+)\.(?P<linear>.+)")
LEVELS = 5  # of colour, and of the chart's grid
CELL, ROW, LABELS = 20, 20, 26  # pixels: width and height of a cell, width of the row labels
LETTER = 6.4  # pixels of a letter of a column's name
CHART_WIDTH, CHART_HEIGHT, CHART_LEFT, CHART_BOTTOM, CHART_TOP = 320, 200, 48, 34, 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Linear:
    """A row of the plan.

    ``form``: what it became, such as "2:4 weights in FP8". ``error``: measured where it was compared, else expected.
    ``gain``: of its plugin layer.
    """

    path: str
    operand: str
    form: str
    error: float | None
    expected: float | None
    measured: float | None
    gain: float | None
    reason: str

    @property
    def mark(self) -> str:
        """Its letters in the picture: what is not 2:4 activations in 16 bits."""
        return "w" * (self.operand == "weight") + "8" * self.form.endswith("FP8")

    @property
    def story(self) -> str:
        """All about it in one line."""
        if self.error is None:
            return f"{self.path}: dense ({self.reason})"
        parts = [f"{self.path}: {self.form}", f"expected error {self.expected:.4f}"]
        parts += [f"measured {self.measured:.4f}"] if self.measured is not None else []
        parts += [f"expected gain {self.gain:.2f}x"] if self.gain is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Cell:
    """A linear in the picture; ``level``: of its error, from 0, or None where it is dense."""

    linear: Linear
    x: int
    y: int
    level: int | None


@dataclass(frozen=True)
class Stack:
    """The blocks of one kind: a row each, a column for each linear."""

    name: str
    columns: tuple[tuple[int, str], ...]
    rows: tuple[tuple[int, str], ...]
    cells: tuple[Cell, ...]
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Line:
    """A line of the chart, and where its points are."""

    name: str
    style: str
    points: tuple[tuple[float, float, str], ...]

    @property
    def path(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.points)


def write(outputs: Outputs) -> Path:
    """Write the page of an engine beside it, from its manifest and, if it is there, its comparison.

    Raises:
        InputError: the manifest is missing or damaged. LynxError: the page cannot be written.
    """
    manifest = Manifest.read(outputs.manifest)
    comparison = _comparison(outputs, manifest)
    sheet = outputs.folder / comparison.images.sheet if comparison and comparison.images else None
    save_text(outputs.report, render(manifest, comparison, sheet))
    return outputs.report


def render(manifest: Manifest, comparison: Comparison | None, sheet: Path | None) -> str:
    """The page."""
    linears = _linears(manifest, comparison)
    top = _round_up(max((linear.error or 0.0 for linear in linears), default=0.0))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = _size
    return environment.get_template("report.html.jinja").render(
        m=manifest,
        c=comparison,
        name=Path(manifest.engine.file).stem,
        linears=linears,
        stacks=_stacks(linears, top),
        dense=[linear for linear in linears if linear.error is None],
        levels=[f"{top * i / LEVELS:.3g} – {top * (i + 1) / LEVELS:.3g}" for i in range(LEVELS)],
        sparse_count=sum(linear.error is not None for linear in linears),
        mean_error=_mean([linear.error for linear in linears if linear.error is not None]),
        chart=_chart(comparison),
        slowest=max((stage.seconds for stage in manifest.stages), default=0.0),
        largest=max((stage.peak_bytes or 0 for stage in manifest.stages), default=0),
        sheet=_data_url(sheet),
        geometry={"cell": CELL, "row": ROW, "labels": LABELS},
    )


def _comparison(outputs: Outputs, manifest: Manifest) -> Comparison | None:
    """What ``compare`` found, unless it was of another engine."""
    try:
        found = Comparison.read(outputs.comparison)
    except InputError as error:
        log.warning("%s", error)
        return None
    return found if found and found.engine_sha256 == manifest.engine.sha256 else None


def _linears(manifest: Manifest, comparison: Comparison | None) -> tuple[Linear, ...]:
    """Every linear of the model, by blocks and then as the manifest has them."""
    measured = {linear.linear: linear.error for linear in comparison.linears} if comparison else {}
    found = []
    for node in manifest.sparse:
        gain = _gain(node)
        for path, expected in zip(node.linears, node.errors, strict=True):
            error = measured.get(path)
            shown = expected if error is None else error
            found.append(Linear(path, node.operand, node.form, shown, expected, error, gain, _shared(node)))
    found += [
        Linear(linear.linear, "none", "dense", None, None, None, None, linear.reason)
        for linear in manifest.dense
    ]
    stacks = list(dict.fromkeys(_place(linear.path)[0] for linear in found))
    return tuple(sorted(found, key=lambda x: (stacks.index(_place(x.path)[0]), _place(x.path)[1])))


def _shared(node: SparseLinears) -> str:
    others = len(node.linears) - 1
    return f"candidate; one plugin layer with {others} more" if others else "candidate"


def _gain(node: SparseLinears) -> float | None:
    """Times as fast as dense: by the recipe's costs, else by the roofline."""
    if node.gain is not None or not node.tokens:
        return node.gain
    return roofline(node.tokens, node.in_channels, node.out_channels, node.rank).gain(
        Form(node.operand, node.fp8)
    )


def _place(path: str) -> tuple[str, int]:
    """Stack and block of a linear; ("", -1) outside of the blocks."""
    match = BLOCK.fullmatch(path)
    return (match["stack"], int(match["index"])) if match else ("", -1)


def _stacks(linears: Sequence[Linear], top: float) -> list[Stack]:
    stacks = []
    for name in dict.fromkeys(_place(linear.path)[0] for linear in linears if _place(linear.path)[0]):
        mine = [(BLOCK.fullmatch(x.path), x) for x in linears if _place(x.path)[0] == name]
        # Sparse columns first, so that what was left dense stands together at the right.
        placed = sorted(
            ((m["linear"], int(m["index"]), x) for m, x in mine if m), key=lambda p: p[2].error is None
        )
        columns = list(dict.fromkeys(column for column, _, _ in placed))
        rows = sorted({row for _, row, _ in placed})
        height = int(max(map(len, columns)) * LETTER) + 12
        cells = (
            Cell(
                x, LABELS + columns.index(column) * CELL, height + rows.index(row) * ROW, _level(x.error, top)
            )
            for column, row, x in placed
        )
        stacks.append(
            Stack(
                name=name,
                columns=tuple((LABELS + i * CELL, column) for i, column in enumerate(columns)),
                rows=tuple((height + i * ROW, str(row)) for i, row in enumerate(rows)),
                cells=tuple(cells),
                top=height,
                width=LABELS + len(columns) * CELL + 2,
                height=height + len(rows) * ROW + 2,
            )
        )
    return stacks


def _level(error: float | None, top: float) -> int | None:
    return None if error is None else min(int(error / top * LEVELS), LEVELS - 1)


def _chart(comparison: Comparison | None) -> dict[str, Any] | None:
    """Errors of the model's output by denoising step, as lines in a box of fixed size."""
    if comparison is None or not comparison.output:
        return None
    series: list[tuple[str, str, Sequence[StepError], str]] = [
        ("worst state", "worst", comparison.output, "worst"),
        ("ONNX, root mean square", "mean", comparison.output, "error"),
        *(
            (f"{engine.kind} engine on the GPU", engine.kind, engine.steps, "error")
            for engine in comparison.engines
        ),
    ]
    top = _round_up(max(getattr(step, field) for _, _, steps, field in series for step in steps))
    right, bottom = CHART_WIDTH - 12, CHART_HEIGHT - CHART_BOTTOM

    def x(step: StepError) -> float:
        return CHART_LEFT + (right - CHART_LEFT) * step.step / max(len(comparison.output) - 1, 1)

    def y(error: float) -> float:
        return bottom - (bottom - CHART_TOP) * error / top

    lines = [
        Line(
            name,
            style,
            tuple(
                (x(s), y(getattr(s, field)), f"step {s.step}, t = {s.timestep:.3f}: {getattr(s, field):.4f}")
                for s in steps
            ),
        )
        for name, style, steps, field in series
    ]
    labelled = comparison.output[:: max(-(-len(comparison.output) // 6), 1)]
    return {
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "left": CHART_LEFT,
        "right": right,
        "bottom": bottom,
        "lines": lines,
        "x": [(x(step), f"{step.timestep:.2f}") for step in labelled],
        "y": [(y(top * i / LEVELS), f"{top * i / LEVELS:.3g}") for i in range(LEVELS + 1)],
    }


def _round_up(value: float) -> float:
    """The next round number."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        power * factor
        for factor in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10)
        if power * factor >= value * (1 - 1e-9)
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _data_url(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
