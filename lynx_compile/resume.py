# SPDX-License-Identifier: Apache-2.0
"""Run a stage, or take its result from the last run if nothing that it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lynx_compile.errors import EngineError, LynxError, StageError
from lynx_compile.files import save_text

Progress = Callable[[str, int, int], None]
Display = Callable[[str], AbstractContextManager[Progress]]
T = TypeVar("T")
log = logging.getLogger(__name__)


class Stages:
    """The stages of one compilation, with a stamp for each in ``folder``.

    A stamp holds the stage's key (a SHA-256 over its inputs and the compiler's own sources), its result, and the
    sizes of the files that the result names.
    """

    def __init__(self, folder: Path, fresh: bool, display: Display) -> None:
        self._folder = folder
        self._fresh = fresh
        self._display = display
        self._keys: dict[str, str] = {}
        self.seconds: dict[str, float | None] = {}  # None: taken from the last run

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
        if not self._fresh and (old := _read(stamp, key, adapter)) is not None:
            self.seconds[name] = None
            log.info("%s: unchanged, taken from the last run", name)
            with self._display(name) as progress:
                progress("unchanged", 1, 1)
            return old
        stamp.unlink(missing_ok=True)
        log.info("%s: started", name)
        start = time.monotonic()
        with self._display(name) as progress:
            value = _produced(name, produce, progress)
        self.seconds[name] = time.monotonic() - start
        log.info("%s: %.1f s", name, self.seconds[name])
        files = {str(path): path.stat().st_size for path in _paths(value)}
        save_text(
            stamp, json.dumps({"key": key, "files": files, "value": adapter.dump_python(value, mode="json")})
        )
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
    except EngineError as error:
        raise StageError(name, error.cause, error.remedy) from None
    except LynxError:
        raise
    except MemoryError as error:
        raise StageError(
            name, "memory ran out.", "Use a machine with more memory, or smaller shapes."
        ) from error
    except Exception as error:
        log.exception("%s failed", name)
        reason = str(error).strip().split("\n")[0]
        raise StageError(
            name, f"{type(error).__name__}: {reason}.", "This is a bug; please report it with the log."
        ) from error


def _read(stamp: Path, key: str, adapter: TypeAdapter[T]) -> T | None:
    """The stamped value if the stamp is whole, has this key, and its files are there in full size."""
    try:
        content = json.loads(stamp.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        if any(Path(path).stat().st_size != size for path, size in content["files"].items()):
            return None
        return adapter.validate_json(json.dumps(content["value"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
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
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
