# SPDX-License-Identifier: Apache-2.0
"""What a stage has done, at what rate, and how long it will take: a bar, lines now and then, or JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from lynx_compile.cli.console import Shown, err, event, manner
from lynx_compile.files.progress import Progress

ESTIMATED_OVER_S = 600.0  # calls of a large model take tens of seconds each
LINE_EVERY_S, EVENT_EVERY_S = 10.0, 0.2


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task), style="progress.data.speed")


class _Elapsed(ProgressColumn):
    """Of the whole stage: rich's own begins again with every phase."""

    def render(self, task: Task) -> Text:
        return Text(_clock(_elapsed(task)), style="progress.elapsed")


@contextmanager
def stage(name: str) -> Iterator[Progress]:
    """A stage of any command: what it is at, how much of it is done, at what rate, how long it has taken and will."""
    as_json = manner.progress is Shown.json
    drawn = (
        manner.progress is Shown.auto and not manner.quiet and err.is_terminal and not err.is_dumb_terminal
    )
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.fields[stage]:<11}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        _Rate(),
        _Elapsed(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bars(*columns, console=err, disable=not drawn, speed_estimate_period=ESTIMATED_OVER_S) as bars:
        number = bars.add_task("", total=None, stage=name, began=time.monotonic(), what="")
        task = bars.tasks[0]
        said = task.fields["began"] if not as_json else 0.0

        def say(what: str) -> None:
            if as_json:
                event(what, **_facts(task))
            elif not drawn and not manner.quiet:
                err.out(_line(what, task), highlight=False)

        def show(what: str, done: int, total: int) -> None:
            nonlocal said
            shown = escape(what)
            if total != task.total or done < task.completed:  # something else is counted: at another rate
                bars.reset(
                    number, total=total, completed=done, description=shown, **{**task.fields, "what": what}
                )
            else:
                bars.update(number, completed=done, description=shown, what=what)
            now = time.monotonic()
            if now - said >= (EVENT_EVERY_S if as_json else LINE_EVERY_S):
                said = now
                say("update")

        say("start")
        try:
            yield show
        except BaseException:
            say("failed")
            raise
        bars.update(number, total=task.total or 1, completed=task.total or 1)
        say("done")


def _facts(task: Task) -> dict[str, str | int | float | None]:
    remaining = task.time_remaining
    return {
        "stage": task.fields["stage"],
        "what": task.fields["what"],
        "done": int(task.completed),
        "total": None if task.total is None else int(task.total),
        "elapsed_s": round(_elapsed(task), 1),
        "remaining_s": None if remaining is None else round(remaining, 1),
    }


def _line(what: str, task: Task) -> str:
    """Such as "capture: prompts 12/576, 5.4 s each, 1:05 so far, 50:46 left"."""
    if what in ("start", "failed"):
        return f"{task.fields['stage']}: {'started' if what == 'start' else what}"
    counted = f"{task.fields['what']} {task.completed:.0f}/{task.total:.0f}".strip()
    if what == "done":
        return f"{task.fields['stage']}: done, {counted}, {_clock(_elapsed(task))}"
    left = "" if task.time_remaining is None else f"{_clock(task.time_remaining)} left"
    parts = counted, _rate(task), f"{_clock(_elapsed(task))} so far", left
    return f"{task.fields['stage']}: {', '.join(part for part in parts if part)}"


def _elapsed(task: Task) -> float:
    return time.monotonic() - float(task.fields["began"])


def _rate(task: Task) -> str:
    if (speed := task.finished_speed or task.speed) is None or not speed > 0:
        return ""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


def _clock(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}" if minutes >= 60 else f"{minutes}:{left:02}"
