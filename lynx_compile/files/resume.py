# SPDX-License-Identifier: Apache-2.0
"""Run a stage, or take its result from the last run if nothing that it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lynx_compile.errors import EngineError, LynxError, StageError, is_out_of_memory, out_of_memory
from lynx_compile.files.atomic import save_text
from lynx_compile.files.progress import Progress, no_progress

Display = Callable[[str], AbstractContextManager[Progress]]


@contextmanager
def silent(name: str) -> Iterator[Progress]:
    """The ``Display`` that shows nothing."""
    yield no_progress


T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What a stage took when it ran: wall time, and the most memory this process held meanwhile (None: unknown).

    ``reused``: that was in an earlier run, from which its result was taken.
    """

    seconds: float
    peak_bytes: int | None
    reused: bool


class Stages:
    """The stages of one compilation, with a stamp for each in ``folder``.

    A stamp holds the stage's key (a SHA-256 over its inputs and the compiler's own sources), its result, the sizes
    of the files that the result names, and what it cost.
    """

    def __init__(self, folder: Path, fresh: bool, display: Display) -> None:
        self._folder = folder
        self._fresh = fresh
        self._display = display
        self._keys: dict[str, str] = {}
        self.costs: dict[str, Cost] = {}

    def key(self, name: str) -> str:
        """The key of a stage that has run."""
        return self._keys[name]

    def run(self, name: str, kind: Any, produce: Callable[[Progress], T], *inputs: Any) -> T:
        """The stage's value: ``produce``'s, or the stamped one when ``inputs`` are the same.

        Args:
            kind: type of the value (dataclasses, tuples, paths), for reading a stamp.
        """
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        key = self._keys[name] = _key(name, inputs)
        stamp = self._folder / f"{name}.stamp.json"
        if not self._fresh and (found := _read(stamp, key, adapter)) is not None:
            old, self.costs[name] = found
            log.info("%s: unchanged, taken from the last run", name)
            with self._display(name) as progress:
                progress("unchanged", 1, 1)
            return old
        stamp.unlink(missing_ok=True)
        log.info("%s: started", name)
        _forget_peak()
        start = time.monotonic()
        with self._display(name) as progress:
            value = _produced(name, produce, progress)
        cost = self.costs[name] = Cost(time.monotonic() - start, _peak_bytes(), reused=False)
        log.info("%s: %.1f s", name, cost.seconds)
        files = {str(path): path.stat().st_size for path in _paths(value)}
        content = {"key": key, "files": files, "value": adapter.dump_python(value, mode="json")}
        save_text(stamp, json.dumps(content | {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes}))
        return value

    def publish(self, folder: Path, *names: str) -> None:
        """Move the files of these stages' values into ``folder``; their stamps then name them there.

        Moved and not linked or copied: ONNX refuses weights that have hard links, and a copy of a large model
        takes its size again.
        """
        for name in names:
            stamp = self._folder / f"{name}.stamp.json"
            content = json.loads(stamp.read_text(encoding="utf-8"))
            mine = [path for path in content["files"] if Path(path).is_relative_to(self._folder)]
            moved = {path: str(folder / Path(path).name) for path in mine}
            for old, new in moved.items():
                os.replace(old, new)
            save_text(stamp, json.dumps(_renamed(content, moved)))


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """``value`` with every string (and key) that is in ``names`` replaced."""
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _produced(name: str, produce: Callable[[Progress], T], progress: Progress) -> T:
    """``produce``'s value; what it does not explain itself becomes a StageError."""
    try:
        return produce(progress)
    except Exception as error:
        if is_out_of_memory(error):
            log.exception("%s ran out of memory", name)
            raise out_of_memory(name, error) from error
        if isinstance(error, EngineError):
            raise StageError(name, error.cause, error.remedy) from None
        if isinstance(error, LynxError):
            raise
        log.exception("%s failed", name)
        reason = str(error).strip().split("\n")[0]
        raise StageError(
            name, f"{type(error).__name__}: {reason}.", "This is a bug; please report it with the log."
        ) from error


def _read(stamp: Path, key: str, adapter: TypeAdapter[T]) -> tuple[T, Cost] | None:
    """The stamped value and cost if the stamp is whole, has this key, and its files are there in full size."""
    try:
        content = json.loads(stamp.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        if any(Path(path).stat().st_size != size for path, size in content["files"].items()):
            return None
        value = adapter.validate_json(json.dumps(content["value"]))
        return value, Cost(content["seconds"], content["peak_bytes"], reused=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        return None


def _forget_peak() -> None:
    """Let Linux count this process's most resident memory from now on; elsewhere it counts from the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> int | None:
    """The most resident memory since ``_forget_peak``; None where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _paths(value: Any) -> list[Path]:
    """Every file that a stage's value names; a folder stands for the files in it."""
    if isinstance(value, Path):
        return sorted(path for path in value.rglob("*") if path.is_file()) if value.is_dir() else [value]
    if isinstance(value, tuple | list):
        return [path for item in value for path in _paths(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [path for name in value.__dataclass_fields__ for path in _paths(getattr(value, name))]
    return []


def _key(name: str, inputs: tuple[Any, ...]) -> str:
    text = json.dumps([name, _sources(), *(TypeAdapter(type(x)).dump_python(x, mode="json") for x in inputs)])
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _sources() -> str:
    """Digest of the compiler itself: another version of it runs every stage again."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
