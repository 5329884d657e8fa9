# SPDX-License-Identifier: Apache-2.0
"""A study for people: a chart of the errors, and the methods' images one under the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from lynx_compile.files.atomic import atomic_path
from lynx_compile.tools.images import as_picture, side_by_side
from lynx_compile.tools.study.methods import METHODS
from lynx_compile.tools.study.results import Row, Study, cells, heads, metric_names

COLUMNS = 12  # images of a method on the sheet
LARGEST, SMALLEST = 192, 64  # pixels of an image's side there
LABEL = 300  # pixels
COLORS = {"weights": "#e0a33b", "activations": "#9aa5b1", "FP8": "#2a6fb0"}  # by how titles begin
SHOWN_BY_STEP = ("fp8_dense", "weight_fp8", "weight", "weight_solved", "activation", "paper_trained", "paper")


def table(study: Study) -> Table:
    """For the terminal."""
    found = Table(title=f"{study.name}, {study.linears} linears, {study.device}", title_justify="left")
    metric = metric_names(study)
    for number, heading in enumerate(heads(metric)):
        found.add_column(heading, no_wrap=True, justify="right" if number else "left")
    for row in study.rows:
        found.add_row(*cells(row, metric))
    return found


def save_strip(images: np.ndarray, path: Path) -> None:
    """The first images [n, colours, height, width] in [0, 1] of a method, side by side."""
    picture = as_picture(side_by_side(images[:COLUMNS]), max(images.shape[2:]), SMALLEST, LARGEST)
    _save(picture, path)


def draw_sheet(study: Study, folder: Path, path: Path) -> None:
    """The strips in ``folder`` with the methods' names and errors; no picture where there is none."""
    strips: list[tuple[Row, Image.Image]] = []
    for row in study.rows:
        kept = folder / f"{row.method}.png"
        if kept.exists():
            with Image.open(kept) as opened:
                strips.append((row, opened.convert("RGB")))
    if not strips:
        path.unlink(missing_ok=True)  # it is another study's
        return
    width = LABEL + max(strip.width for _, strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height for _, strip in strips)), "white")
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(13), 0
    for row, strip in strips:
        sheet.paste(strip, (LABEL, top))
        error = "" if row.method == "dense" else f"\noutput error {row.mean('output_error'):.4f}"
        text = f"{_wrapped(METHODS[row.method].title)}{error}"
        pen.multiline_text(
            (6, top + strip.height // 2), text, fill="black", font=font, anchor="lm", spacing=3
        )
        top += strip.height
    _save(sheet, path)


def draw_chart(study: Study, path: Path) -> None:
    """Output error of every method, logarithmic, with its spread; and by step of those that are talked about most,
    or, where there are none of those, of the first ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in study.rows if row.method != "dense"]
    if not rows:
        path.unlink(missing_ok=True)  # it is another study's
        return
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 0.32 * len(rows) + 1.8), layout="constrained", width_ratios=(3, 2)
    )
    titles = [METHODS[row.method].title for row in rows]
    errors = [row.mean("output_error") or 0.0 for row in rows]
    spreads = [row.spread("output_error") or 0.0 for row in rows]
    colors = [next(c for start, c in COLORS.items() if title.startswith(start)) for title in titles]
    bars = left.barh(range(len(rows)), errors, color=colors, xerr=spreads if any(spreads) else None)
    left.bar_label(bars, [f"{error:.4f}" for error in errors], padding=4, fontsize=8)
    left.set_yticks(range(len(rows)), titles, fontsize=8)
    left.invert_yaxis()
    left.set_xscale("log")
    # The bars say it; logarithmic labels would overlap.
    left.tick_params(axis="x", which="both", labelbottom=False)
    left.set_xlim(min(errors) * 0.7, max(errors) * 1.8)
    left.set_xlabel("output error, all candidate linears")
    left.set_title(f"{study.name}: {study.linears} linears, {study.device}", loc="left", fontsize=10)
    shown = [row for row in rows if row.method in SHOWN_BY_STEP] or rows[: len(SHOWN_BY_STEP)]
    for row in shown:
        right.plot(
            range(1, len(study.timesteps) + 1), row.by_step(), label=METHODS[row.method].title, linewidth=1.4
        )
    right.set_yscale("log")
    right.set_xlabel("denoising step")
    right.set_title("output error by step", loc="left", fontsize=10)
    right.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5.5)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)


def _wrapped(title: str, most: int = 40) -> str:
    """In lines that fit the label."""
    lines = [""]
    for word in title.split():
        if len(lines[-1]) + len(word) > most:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.strip() for line in lines)


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
