# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile RECIPE.yaml -o OUT.engine``: parses, shows, returns an exit code; nothing else.

Exit codes: 0 done, 2 bad recipe or input, 3 a stage failed, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from lynx_compile import __version__
from lynx_compile.errors import InputError, LynxError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the console script; errors end in one line and their exit code."""
    try:
        app(standalone_mode=True)
    except LynxError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(error.exit_code)


def _version(show: bool) -> None:
    if show:
        out.print(f"lynx-compile {__version__}")
        raise typer.Exit


@app.command()
def compile_(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine to write.", show_default=False)],
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Run every stage again, or only what changed.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log, TensorRT's too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compile a diffusion transformer into a TensorRT engine with 2:4 sparse linears."""
    from lynx_compile.recipe import load_recipe

    values = load_recipe(recipe)
    _check_output(output, recipe)
    _configure_logging(verbose)
    try:
        from lynx_compile import (
            pipeline,
        )  # torch and diffusers take seconds to import; a bad recipe need not wait

        manifest = pipeline.compile(values, output, fresh=fresh, display=_stage)
    except KeyboardInterrupt:
        err.print(
            "[bold red]interrupted:[/] no output was changed; the same command goes on from the last whole stage."
        )
        raise typer.Exit(130) from None
    out.print(manifest.summary())


def _check_output(output: Path, recipe: Path) -> None:
    if output.is_dir():
        raise InputError(f"The output {output} is a folder.", "Give a file name, such as -o flux.engine.")
    if (
        output.suffix in (".yaml", ".yml", ".json", ".onnx", ".safetensors", ".log", ".cache")
        or output == recipe
    ):
        raise InputError(
            f"The output {output} would take the place of another file.", "Give a name that ends in .engine."
        )


def _configure_logging(verbose: bool) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    logger = logging.getLogger("lynx_compile")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


@contextmanager
def _stage(name: str) -> Iterator:  # type: ignore[type-arg]
    """One line per stage with a bar, how much of what, and the time."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.fields[stage]:<11}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err) as bars:
        task = bars.add_task("", total=None, stage=name)

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield show
        total = bars.tasks[0].total or 1
        bars.update(task, completed=total, total=total)
