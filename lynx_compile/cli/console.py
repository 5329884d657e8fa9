# SPDX-License-Identifier: Apache-2.0
"""Where the commands speak: results go to stdout; progress, warnings and errors to stderr, for people or programs."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from lynx_compile import parallel
from lynx_compile.errors import LynxError

out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


class Shown(StrEnum):
    """How progress is shown. ``auto``: a bar on a terminal, else lines now and then."""

    auto = "auto"
    lines = "lines"
    json = "json"


@dataclass
class Manner:
    """How this process speaks. ``quiet``: of errors and results alone. ``stopped``: by which signal."""

    progress: Shown = Shown.auto
    quiet: bool = False
    stopped: int | None = None


manner = Manner()

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A value in the place of the recipe's, such as calibration.samples=64: a dotted key and YAML, as if the "
        "recipe said so. May be given several times.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda:N",
        help="Where the model runs. cuda:N: that GPU, for which TensorRT builds too; cpu: not on a GPU, whatever is "
        "here. Default: the first GPU, else the CPU.",
        show_default=False,
    ),
]
ProgressForm = Annotated[
    Shown,
    typer.Option(
        "--progress",
        help="auto: a bar on a terminal, else lines now and then. json: on stderr a JSON object a line, warnings and "
        "errors too.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no warnings, but errors.")]


def speak(progress: Shown = Shown.auto, *, quiet: bool = False, verbose: bool = False) -> None:
    """From now on in this manner. ``verbose``: the package's log is shown, not its warnings alone."""
    manner.progress, manner.quiet = progress, quiet
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logger = logging.getLogger("lynx_compile")
    for earlier in [one for one in logger.handlers if isinstance(one, _People | _Programs)]:
        logger.removeHandler(earlier)
    handler = (
        _Programs() if progress is Shown.json else _People(console=err, show_path=False, show_time=False)
    )
    handler.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    # What a stopped command trips over is in the run's log alone.
    handler.addFilter(lambda record: manner.stopped is None)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class _People(RichHandler):
    """The log as lines."""


class _Programs(logging.Handler):
    """The log as JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        event("log", level=record.levelname.lower(), message=record.getMessage())


def event(name: str, **facts: Any) -> None:
    """A line of JSON on stderr, for programs."""
    err.out(json.dumps({"event": name, **facts}), highlight=False)


def note(text: str) -> None:
    """A line on what is being done."""
    if manner.progress is Shown.json:
        event("note", message=text)
    elif not manner.quiet:
        err.print(f"[dim]{escape(text)}")


def wrong(kind: str, text: str, **facts: Any) -> None:
    """What went wrong: "error", "interrupted", "missed" or "over budget", in words, and with facts for programs, whose
    event is named so with an underscore."""
    if manner.progress is Shown.json:
        event(kind.replace(" ", "_"), message=text, **facts)
    else:
        err.print(f"[bold red]{kind}:[/] {escape(text)}")


def failed(error: LynxError) -> None:
    """An error that ends the command, and where its log is."""
    log = None if error.log is None else str(error.log)
    if manner.progress is Shown.json:
        wrong("error", str(error), exit_code=error.exit_code, log=log)
        return
    wrong("error", str(error))
    if log is not None:
        err.print(f"The log is {escape(log)}.")


@contextmanager
def interruptible(left: str) -> Iterator[None]:
    """Ctrl-C or SIGTERM inside ends the command with exit code 130 or 143 and a word on what it ``left``.

    The signal itself is remembered, since not every KeyboardInterrupt comes out as one: torch's C++ turns one
    that strikes it into a ValueError, and diffusers that into a damaged checkpoint.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        manner.stopped = number
        raise KeyboardInterrupt

    # Not where the caller has it ignored, as a shell's & does.
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in defaults}
    taken = [number for number, default in defaults.items() if before[number] is default]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    except BaseException as error:
        if manner.stopped is None and not isinstance(error, KeyboardInterrupt):
            raise
        code = 128 + (manner.stopped or signal.SIGINT)
        wrong("interrupted", left, exit_code=code)
        raise typer.Exit(code) from None
    finally:
        manner.stopped = None
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def joined() -> Iterator[None]:
    """Where torchrun has started several processes, they work together and the first one alone speaks.

    The others end at once when they are told to: they hold nothing. And none of their exit codes says anything, lest
    torchrun ends the first process before that has said what was wrong.
    """
    speaks = True
    try:
        with parallel.joined():
            if not (speaks := parallel.is_first()):
                out.quiet = err.quiet = True
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
            yield
    except Exception:
        if speaks:
            raise
        raise typer.Exit from None


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
