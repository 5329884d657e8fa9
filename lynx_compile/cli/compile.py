# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile RECIPE -o ENGINE``: compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynx_compile.cli.console import (
    Device,
    ProgressForm,
    Quiet,
    RecipeFile,
    Settings,
    Shown,
    interruptible,
    joined,
    out,
    speak,
)
from lynx_compile.cli.display import stage
from lynx_compile.errors import InputError


def compile_(
    recipe: RecipeFile,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="ENGINE", help="The engine to write.", show_default=False),
    ],
    settings: Settings = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of what the stages leave. Default: OUT.cache, beside the engine."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Run every stage again, or only what changed.")
    ] = False,
    device: Device = None,
    progress: ProgressForm = Shown.auto,
    quiet: Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log, TensorRT's too.")] = False,
) -> None:
    """Compile a recipe, as lynx-compile does without a command.

    The recipe's pipeline is run for its prompts, what every linear becomes is decided, its error repaired, and the
    engine built. A stage whose inputs are as in the last run is taken from the cache, so that a command that was
    stopped, or a recipe that was changed, runs what is due. A failed or interrupted run leaves an earlier engine and
    its files as they were.

    \b
    Reads:
      RECIPE, its model and prompts
    \b
    Writes, for -o OUT.engine:
      OUT.engine              the engine (a TensorRT plan)
      OUT.json                its manifest
      OUT.onnx, .safetensors  the same as ONNX, and its weights
      OUT.liblynx_plugin.so   the plugin library it runs with
      OUT.html                the report, for a browser
      OUT.log                 the log
      OUT.cache               what the stages leave

    A pipeline of several denoisers becomes as many engines: OUT.transformer.engine, OUT.transformer_2.engine.

    \b
    Examples:
      lynx-compile flux.yaml -o flux.engine
      lynx-compile flux.yaml -o small.engine --set call.height=512 --set call.width=512
      torchrun --nproc-per-node 2 -m lynx_compile flux.yaml -o flux.engine
    """
    speak(progress, quiet=quiet, verbose=verbose)
    left = "no output was changed; the same command goes on from the last whole stage."
    with interruptible(left), joined():
        from lynx_compile.recipe import load_recipe

        values = load_recipe(recipe, settings or ())
        if output.resolve() == recipe.resolve():
            raise InputError(f"The output {output} would take the place of the recipe.", "Give another name.")
        from lynx_compile import pipeline  # torch takes seconds to import; a bad recipe need not wait
        from lynx_compile.models import place

        if device is not None:
            place.choose(device)
        manifests = pipeline.compile(values, output, cache=cache, fresh=fresh, display=stage)
    if not quiet:
        for manifest in manifests:
            out.print(manifest.summary())
