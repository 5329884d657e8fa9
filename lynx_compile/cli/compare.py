# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile compare``: what an engine does beside the dense model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lynx_compile.cli.console import ProgressForm, Quiet, Shown, interruptible, out, speak, wrong
from lynx_compile.cli.display import stage
from lynx_compile.files.outputs import Outputs

if TYPE_CHECKING:
    from lynx_compile.tools.comparison import Comparison

SHOWN_LINEARS = 20


class Runner(StrEnum):
    """What runs the models that ``compare`` compares."""

    auto = "auto"
    torch = "torch"
    onnx = "onnx"


def compare(
    engine: Annotated[
        Path,
        typer.Argument(
            metavar="ENGINE", help="The engine, with what its compilation left beside it.", show_default=False
        ),
    ],
    cache: Annotated[
        Path | None, typer.Option(help="The cache that the engine was compiled with, if not beside it.")
    ] = None,
    metric: Annotated[
        bool, typer.Option("--metric/--no-metric", help="Call the recipe's own metric, which is code.")
    ] = False,
    through: Annotated[
        Runner,
        typer.Option(
            "--with",
            help="What runs the models. auto: torch for what was compiled for torch, and on a GPU with our kernels; "
            "else ONNX Runtime in float32.",
        ),
    ] = Runner.auto,
    progress: ProgressForm = Shown.auto,
    quiet: Quiet = False,
) -> None:
    """Compare an engine's model with the dense one.

    Its linears, its output and its images, on prompts that calibration has not seen; what to run, and the limits, are
    in the recipe's section 'compare'.

    \b
    Reads:
      ENGINE, what lies beside it, its cache and the recipe's model
    \b
    Writes, beside the engine:
      OUT.compare.json   every figure
      OUT.compare.png    the images, side by side
      OUT.html           the report, anew

    Exit code 1: a limit is missed. What is over the compilation's budget is said.

    \b
    Example:
      lynx-compile compare flux.engine
    """
    speak(progress, quiet=quiet)
    with interruptible("nothing was written."):
        from lynx_compile.tools import compare as tool

        found = tool.compare(engine, cache=cache, run_metric=metric, through=through.value, display=stage)
    _show_comparison(found)
    written = Outputs.find(engine)
    out.print(f"wrote {escape(str(written.comparison))} and {escape(written.report.name)}")
    if found.over_budget is not None:
        wrong("over budget", found.over_budget)
    for sentence in found.missed:
        wrong("missed", sentence)
    if found.missed:
        raise typer.Exit(1)


def _show_comparison(found: Comparison) -> None:
    linears = Table(
        "linear", title=f"sparse linears, worst first ({found.states} states)", title_justify="left"
    )
    for heading in ("error", "worst", "expected"):
        linears.add_column(heading, justify="right")
    for x in found.linears[:SHOWN_LINEARS]:
        linears.add_row(escape(x.linear), f"{x.error:.4f}", f"{x.worst:.4f}", f"{x.expected:.4f}")
    wide = Console(highlight=False, width=max(out.width, 110))
    wide.print(linears)
    if len(found.linears) > SHOWN_LINEARS:
        out.print(f"and {len(found.linears) - SHOWN_LINEARS} more in the JSON")
    output = Table("step", title="model output on the dense trajectory", title_justify="left")
    for heading in ("timestep", "error", "worst", *(f"{engine.kind} engine" for engine in found.engines)):
        output.add_column(heading, justify="right")
    for i, step in enumerate(found.output):
        engines = (f"{engine.steps[i].error:.4f}" for engine in found.engines)
        output.add_row(
            str(step.step), f"{step.timestep:.3f}", f"{step.error:.4f}", f"{step.worst:.4f}", *engines
        )
    wide.print(output)
    for engine in found.engines:
        out.print(f"{engine.kind} engine: {engine.milliseconds:.1f} ms a step")
    if found.images is not None:
        psnr = found.images.psnr
        lpips = "" if found.images.lpips is None else f", LPIPS {found.images.lpips:.4f}"
        out.print(f"{len(psnr)} images: PSNR {found.images.mean_psnr:.1f} dB (worst {min(psnr):.1f}){lpips}")
    for name, value in (found.metric or {}).items():
        out.print(f"metric {escape(name)}: {value:.6g}")
    for what, reason in found.not_measured.items():
        out.print(f"not measured: {escape(what)} ({escape(reason)})")
