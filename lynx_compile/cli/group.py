# SPDX-License-Identifier: Apache-2.0
"""The commands, and what is true of all of them: the recipe without a command, errors, exit codes."""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from lynx_compile import __version__
from lynx_compile.cli import bench, check, compare, compile, init, inspect, report, study
from lynx_compile.cli.console import failed, out
from lynx_compile.errors import LynxError, is_out_of_memory, out_of_memory

EXIT_CODES = """\b
Exit codes:
  0    done
  1    compare: a limit is missed
  2    the recipe, an option or an input is wrong
  3    a stage failed; the message says why and what to do
  130  interrupted (Ctrl-C); 143: by SIGTERM
"""


class RecipeFirst(TyperGroup):
    """A group whose first argument may be a recipe, which is compiled."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        own = {name for option in self.get_params(ctx) for name in (*option.opts, *option.secondary_opts)}
        if args and args[0] not in own and args[0] not in self.commands:
            if close := _meant(args[0], list(self.commands)):
                ctx.fail(f"There is no command or recipe '{args[0]}'. Did you mean '{close}'?")
            args = ["compile", *args]
        return super().parse_args(ctx, args)


def _meant(word: str, commands: list[str]) -> str | None:
    """The command of which ``word`` is a misspelling; None where it may be a recipe."""
    if word.startswith("-") or "." in word or Path(word).exists():
        return None
    return next(iter(difflib.get_close_matches(word, commands, 1)), None)


app = typer.Typer(
    cls=RecipeFirst,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    subcommand_metavar="RECIPE -o ENGINE | COMMAND [ARGS]...",
    epilog=EXIT_CODES,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "compile": compile.compile_,
    "init": init.init,
    "check": check.check,
    "inspect": inspect.inspect,
    "compare": compare.compare,
    "report": report.report,
    "study": study.study,
    "bench": bench.bench,
}
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=EXIT_CODES)(_command)


def _version(show: bool) -> None:
    if show:
        out.print(f"lynx-compile {__version__}")
        raise typer.Exit


@app.callback()
def lynx_compile(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compile diffusion transformers into TensorRT engines with 2:4 sparse linear layers.

    A recipe without a command is compiled. Each command has a --help of its own.

    \b
    From a model to an engine:
      lynx-compile init black-forest-labs/FLUX.1-dev -o flux.yaml
      lynx-compile check flux.yaml
      lynx-compile flux.yaml -o flux.engine
      lynx-compile compare flux.engine
    """


def main() -> None:
    """Entry point of the console script; errors end in one line and their exit code."""
    _speak_utf8()
    try:
        app(prog_name="lynx-compile")
    except Exception as error:
        shown = out_of_memory(None, error) if is_out_of_memory(error) else error
        if not isinstance(shown, LynxError):
            raise
        failed(shown)
        sys.exit(shown.exit_code)


def _speak_utf8() -> None:
    """Names of files may hold any character, whatever the locale.

    An ASCII locale would have them fail in the middle of the work, in the file system's calls and when they are shown;
    Python decides on it when it starts. What is no UTF-8 at all is shown escaped.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and not sys.flags.utf8_mode:
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": ""}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
