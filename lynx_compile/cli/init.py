# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile init``: a recipe to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lynx_compile.cli.console import interruptible, note, speak
from lynx_compile.errors import InputError


def init(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A pipeline of diffusers: hub id (owner/name) or local folder.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The recipe to write. Default: stdout.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a recipe for a model.

    It holds every key at its default, and says what it is. Under 'call' stand the arguments that the pipeline's class
    takes, at its defaults: they decide the shapes that the engine is built for.

    \b
    Reads:
      MODEL's model_index.json, and no more: of a hub id that file is downloaded
    \b
    Writes:
      FILE, which must not exist yet

    \b
    Example:
      lynx-compile init black-forest-labs/FLUX.1-dev -o flux.yaml
    """
    speak()
    with interruptible("nothing was written."):
        if output is not None and output.exists():
            raise InputError(f"{output} exists already.", "Give another name, or remove it.")
        from lynx_compile.files.atomic import save_text
        from lynx_compile.tools import new_recipe

        text = new_recipe.written(model)
        if output is None:
            print(text, end="")
            return
        save_text(output, text)
        note(f"wrote {output}; next: lynx-compile check {output}")
