# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile study``: methods of sparsity side by side on one model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lynx_compile.cli.console import ProgressForm, Quiet, RecipeFile, Shown, interruptible, out, speak
from lynx_compile.cli.display import stage
from lynx_compile.errors import InputError


def study(
    recipe: RecipeFile,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for what is found. Default: NAME.study.", show_default=False
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated names, as in study.json; all by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Do everything so many times, for a spread.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="Of tuning, each method that is tuned. Default: the recipe's.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Prompts to measure on. Default: compare.samples.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Prompts to a call. Default: calibration.batch.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to calibrate on. Default: calibration.samples.")
    ] = None,
    states: Annotated[
        int | None, typer.Option(min=1, help="Calls kept of each. Default: calibration.states_per_prompt.")
    ] = None,
    metric: Annotated[bool, typer.Option("--metric", help="Run the recipe's metric, which is code.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the model. Default: the recipe's file name.")] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Put quality.NAME.METHOD.* into this JSON file too.")
    ] = None,
    budget: Annotated[
        Path | None,
        typer.Option(
            help="With --summary: an engine of a budget, after compare.",
            show_default=False,
        ),
    ] = None,
    progress: ProgressForm = Shown.auto,
    quiet: Quiet = False,
) -> None:
    """Compare methods of sparsity on a recipe's model.

    At equal rank and tuning time. Each method's linears, output and images are measured on prompts kept apart. What
    is measured is kept at once: the same command goes on where it was stopped.

    \b
    Reads:
      RECIPE, its model and prompts
    \b
    Writes, into NAME.study or the folder of -o:
      study.json, study.md, study.png   every figure, a table, a picture
      sheet.png                         images by every method

    \b
    Example:
      lynx-compile study flux.yaml --methods wanda,weight_solved --seeds 3
    """
    speak(progress, quiet=quiet)
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"--minutes is {minutes:g}.", "Give a number above 0.")
    if budget is not None and summary is None:
        raise InputError("--budget says what goes into --summary, and that is missing.", "Give both.")
    with interruptible("what was measured is kept; the same command goes on from there."):
        from lynx_compile.recipe import load_recipe

        values = load_recipe(recipe)
        from lynx_compile.tools import summary as summary_file
        from lynx_compile.tools.study import methods as known
        from lynx_compile.tools.study import results, run, show

        name = name or recipe.stem.replace("-", "_")
        folder = folder or Path(f"{recipe.stem}.study")
        wanted = known.chosen(methods)
        values = run.with_choices(
            values, minutes=minutes, samples=samples, batch=batch, prompts_calibrated=prompts, states=states
        )
        compiled = {} if budget is None else results.of_budget(name, budget)
        if summary is not None:
            summary_file.read(summary)  # what is wrong with it is said before hours of measuring
        found = run.study(values, name, folder, methods=wanted, seeds=seeds, run_metric=metric, display=stage)
        if summary is not None:
            summary_file.add(results.summary(found) | compiled, summary)
    Console(highlight=False, width=max(out.width, 150)).print(show.table(found))
    written = [file for file in ("study.md", "study.png", "sheet.png") if (folder / file).exists()]
    out.print(f"wrote {escape(', '.join([str(folder / 'study.json'), *written]))}")
