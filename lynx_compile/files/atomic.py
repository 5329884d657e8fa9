# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there: every output is written beside its place and then moved."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lynx_compile.errors import InputError, LynxError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, moved to ``path`` at the end and removed on any failure.

    Raises:
        LynxError: the folder cannot be made or written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside is ignored: for the instant in which several finished files take their places."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C never strikes here
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from None


def strict_json(text: bytes) -> Any:
    """What a JSON text (UTF-8) says, if it says it once and in numbers.

    Raises:
        ValueError, RecursionError: it is no JSON, names a key twice, holds NaN, an infinity or half a character, or
            is too deep.
    """
    return json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    for text in (text for pair in pairs for text in pair if isinstance(text, str)):
        text.encode()  # half of a surrogate pair is no text
    if len(values) != len(pairs):
        raise ValueError("a key is there twice")
    return values


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explained(path: Path, error: OSError) -> LynxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LynxError(
            f"The disk is full: {path} could not be written.", "Free some space or choose another output."
        )
    reason = error.strerror or str(error)
    return LynxError(f"{path} could not be written ({reason}).", "Check the folder and its permissions.")
