# SPDX-License-Identifier: Apache-2.0
"""``OUT.html``: one self-contained page on an engine, for people; written by a compilation, and again by ``compare``.

Three numbers, the images, the blocks' linears as a picture in which each tells what else it could have been, the errors
at the model's output; what compiling took, and how to load it. The form is ``report.html.jinja``, which escapes every
value, and ``report.css``; no script is needed.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jinja2
from PIL import Image

from lynx_compile.engine.manifest import Budget, Manifest
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import save_text
from lynx_compile.files.outputs import Outputs
from lynx_compile.passes.speed_table import ROOFLINE
from lynx_compile.tools.comparison import SHEET_COLUMNS, Comparison, Images
from lynx_compile.tools.report_errors import budget_rows, chart
from lynx_compile.tools.report_linears import all_linears, gain_of, picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Number:
    """One of the three at the top. ``value``: None where nobody measured it, and ``note`` says what would."""

    label: str
    value: str | None
    note: str


@dataclass(frozen=True)
class Strip:
    """An image of the contact sheet: of the dense model, of this one, and their difference, one above the other."""

    url: str
    psnr: float


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
    """The page. ``sheet``: the PNG that ``compare`` wrote."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = _size
    linears = all_linears(manifest, comparison)
    return environment.get_template("report.html.jinja").render(
        m=manifest,
        c=comparison,
        name=Path(manifest.engine.file).stem,
        numbers=(_speed(manifest, comparison), _error(manifest, comparison), _bytes(manifest)),
        strips=_strips(comparison.images, sheet) if comparison and comparison.images and sheet else (),
        linears=linears,
        picture=picture(linears, by_output=manifest.budget is not None),
        budget_rows=budget_rows(manifest.budget) if manifest.budget else (),
        chart=chart(comparison),
        slowest=max((stage.seconds for stage in manifest.stages), default=0.0),
    )


def _comparison(outputs: Outputs, manifest: Manifest) -> Comparison | None:
    """What ``compare`` found, unless it was of another engine."""
    try:
        found = Comparison.read(outputs.comparison)
    except InputError as error:
        log.warning("%s", error)
        return None
    return found if found and found.engine_sha256 == manifest.engine.sha256 else None


def _speed(manifest: Manifest, comparison: Comparison | None) -> Number:
    label, budget = "speed of the linears", manifest.budget
    timed = {run.kind: run.milliseconds for run in comparison.engines} if comparison else {}
    whole = (
        f" A whole step on this GPU: {timed['dense'] / timed['lynx']:.2f}x ({timed['lynx']:.1f} ms, copies included)."
        if len(timed) == 2
        else " A whole step was not measured."
    )
    if budget is not None:
        chosen = [choice.candidates[choice.chosen] for choice in budget.linears]
        source = _source(manifest, {one.measured for one in chosen if one.gain != 1})
        note = f"All linears of the blocks together, against dense ones, {source}."
        return Number(label, f"{budget.speed:.2f}x", note + whole)
    dense = changed = 0.0  # times, in multiply-adds at the dense rate
    for node in manifest.sparse:
        if (gain := gain_of(node)) is not None:
            macs = node.tokens * node.in_channels * node.out_channels
            dense, changed = dense + macs, changed + macs / gain
    if not changed:
        return Number(label, None, "No linear's number of tokens is known." + whole)
    source = _source(manifest, {node.gain is not None for node in manifest.sparse})
    note = f"The linears that changed, together, against dense ones, {source}."
    return Number(label, f"{dense / changed:.2f}x", note + whole)


def _source(manifest: Manifest, measured: set[bool]) -> str:
    """What tells the speeds, of which all, some or none were measured."""
    predicted = f"by the {ROOFLINE}: predicted, not measured"
    if True not in measured:
        return predicted
    return f"by {manifest.costs}" + (
        f", and where that says nothing {predicted}" if len(measured) > 1 else ""
    )


def _error(manifest: Manifest, comparison: Comparison | None) -> Number:
    label, budget = "error of the output", manifest.budget
    same = comparison is not None and "other prompts" in comparison.not_measured
    calls = "calls held out" + (", of other noise but the same prompts" if same else "")
    if budget is not None:
        found = budget.error.solved if budget.error.tuned is None else budget.error.tuned
        if found is not None:
            note = f"|y − y dense| / |y dense|, measured on {budget.calls} {calls}; {_limit(budget)}."
            return Number(label, f"{found:.4f}", note)
    if comparison is not None and comparison.output:
        over_steps = math.sqrt(statistics.fmean(step.error**2 for step in comparison.output))
        note = f"|y − y dense| / |y dense| over all steps, measured by compare on {calls}."
        return Number(label, f"{over_steps:.4f}", note)
    return Number(label, None, f"“lynx-compile compare {manifest.engine.file}” measures it.")


def _limit(budget: Budget) -> str:
    if budget.limit == "max_output_error":
        return f"at most {budget.value:g} was allowed"
    if budget.limit == "min_psnr":
        drawn = "" if budget.psnr is None else f", and they have {budget.psnr:.1f} dB"
        return f"images were to keep {budget.value:g} dB{drawn}"
    return f"the least that was found for {budget.value:g}x"


def _bytes(manifest: Manifest) -> Number:
    """What is shipped: the engine, and the weights where they are a file of their own."""
    files = {file.file: file.bytes for file in manifest.files}
    weights = files.get(manifest.weights.file or "")
    if manifest.backend.name == "torch":
        value = None if weights is None else _size(weights)
        return Number(
            "size of the weights", value, f"{manifest.weights.file}, on a model in {manifest.dtype}."
        )
    if weights is None:
        return Number(
            "size of the engine", _size(manifest.engine.bytes), f"{manifest.dtype}, weights inside."
        )
    note = f"{_size(manifest.engine.bytes)} and {_size(weights)} of weights in {manifest.weights.file}."
    return Number("size of engine and weights", _size(manifest.engine.bytes + weights), note)


def _strips(images: Images, sheet: Path) -> list[Strip]:
    """The sheet's columns one by one, so that a narrow page has them in several rows."""
    if not sheet.is_file():
        return []
    psnr = images.psnr[:SHEET_COLUMNS]
    with Image.open(sheet) as picture:
        edges = [round(picture.width * column / len(psnr)) for column in range(len(psnr) + 1)]
        cut = [picture.crop((left, 0, right, picture.height)) for left, right in pairwise(edges)]
    return [Strip(_data_url(strip), value) for strip, value in zip(cut, psnr, strict=True)]


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
