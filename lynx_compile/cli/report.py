# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile report``: the page on an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lynx_compile.cli.console import interruptible, out, speak


def report(
    engine: Annotated[
        Path,
        typer.Argument(metavar="ENGINE", help="The engine, with its manifest beside it.", show_default=False),
    ],
) -> None:
    """Write the page on an engine, OUT.html, again.

    Compiling and compare write it themselves.

    \b
    Reads:
      OUT.json, and OUT.compare.json and OUT.compare.png if they are there
    \b
    Writes:
      OUT.html

    \b
    Example:
      lynx-compile report flux.engine
    """
    speak()
    with interruptible("nothing was written."):
        from lynx_compile.files.outputs import Outputs
        from lynx_compile.tools import report as tool

        out.print(f"wrote {escape(str(tool.write(Outputs.find(engine))))}")
