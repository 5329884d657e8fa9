# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there: every output is written beside its place and then moved."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from lynx_compile.errors import LynxError
from lynx_compile.files import disk
from lynx_compile.files.digest import Digesting, remember

PIECE_BYTES = 1 << 24
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, moved to ``path`` at the end and removed on any failure.

    It is locked as long as this process lives, so that ``remove_leftovers`` knows those of killed ones.

    Raises:
        LynxError: the folder cannot be made or written. DiskFullError: the disk is full.
    """
    temporary: Path | None = None
    handle: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        _lock(handle)
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        if handle is not None:
            os.close(handle)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Digesting]:
    """The same as a file open for writing; its digest is taken on the way (``digest.written`` tells it)."""
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        file = Digesting(raw)
        yield file
        remember(raw, file.sha256)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM inside are ignored: for the instant in which several finished files take their places."""
    if threading.current_thread() is not threading.main_thread():  # signals never strike here
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    save_bytes(path, text.encode())


def save_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(content)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    with source.open("rb") as old, atomic_file(path) as new:
        while piece := old.read(PIECE_BYTES):
            new.write(piece)


@contextmanager
def moved(files: Mapping[Path, Path]) -> Iterator[None]:
    """Files {old path: new path} take their places; what the block writes then belongs to them, and is not interrupted.

    What comes from another file system is copied beside its place first, which can take long and be interrupted.

    Raises:
        LynxError: a folder cannot be written. DiskFullError: the disk is full.
    """
    with ExitStack() as copies:
        near = {
            source
            if _device(source) == _device(path.parent)
            else copies.enter_context(_copied(source, path)): path
            for source, path in files.items()
        }
        with uninterrupted():
            for source, path in near.items():
                try:
                    os.replace(source, path)
                except OSError as error:
                    raise _explained(path, error) from error
            yield
    for source in files:
        source.unlink(missing_ok=True)


@contextmanager
def _copied(source: Path, path: Path) -> Iterator[Path]:
    """A temporary copy of ``source`` beside ``path``, flushed."""
    disk.require_room(path, source.stat().st_size)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent, delete=False
        ) as file:
            temporary = Path(file.name)
            _lock(file.fileno())
            with source.open("rb") as old:
                shutil.copyfileobj(old, file, PIECE_BYTES)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.flush()
            os.fsync(file.fileno())
            yield temporary
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove what killed processes have left of ``names`` (None: of all) in ``folder``: temporary files.

    Those of living processes are locked, and stay.
    """
    of = "|".join(map(re.escape, names)) if names is not None else ".+"
    temporary = re.compile(rf"\.({of})\.[a-z0-9_]{{8}}\.tmp", re.DOTALL)
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_file(follow_symlinks=False) and temporary.fullmatch(entry.name):
                _remove_if_abandoned(Path(entry.path))


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


def _lock(handle: int) -> None:
    """For as long as this process lives. Without it (some file systems) the file looks left over."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_if_abandoned(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def _device(path: Path) -> int:
    return path.stat().st_dev


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explained(path: Path, error: OSError) -> LynxError:
    if disk.is_full(error):
        return disk.full(path)
    reason = error.strerror or str(error)
    remedy = "Check the folder and its permissions."
    if error.errno == errno.EFBIG:
        remedy = "Raise the limit on a file's size ('ulimit -f'), or choose a folder on another file system."
    return LynxError(f"{path} could not be written ({reason}).", remedy)
