# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile check``: says what compiling would take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynx_compile.cli.console import Device, RecipeFile, Settings, interruptible, out, speak


def check(
    recipe: RecipeFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="ENGINE", help="The engine; by default beside the recipe."),
    ] = None,
    settings: Settings = None,
    device: Device = None,
) -> None:
    """Say what compiling will take of memory, disk and time.

    And whether this machine has it. Nothing is run, downloaded or written, but for weights that LoRAs or a conversion
    change: they go into OUT.cache, for the compilation. Once that has recorded the pipeline's calls, its linears are
    known and the figures are closer.

    \b
    Reads:
      RECIPE, its model's headers, and OUT.cache if there is one

    \b
    Example:
      lynx-compile check flux.yaml --set calibration.memory_gib=24
    """
    speak()
    with interruptible("nothing was written."):
        from lynx_compile.recipe import load_recipe

        values = load_recipe(recipe, settings or ())
        from lynx_compile.models import place
        from lynx_compile.tools import check as tool

        if device is not None:
            place.choose(device)
        for line in tool.check(values, output or recipe.with_suffix(".engine")):
            out.print(line)
