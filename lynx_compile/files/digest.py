# SPDX-License-Identifier: Apache-2.0
"""Which bytes a file holds: digested while it is written, compared before it is taken for the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lynx_compile.errors import InputError

PIECE_BYTES = 16 << 20  # that is read at once


@dataclass(frozen=True)
class Written:
    """A file as it was written. ``mtime_ns`` and ``inode`` tell cheaply whether it was touched since."""

    bytes: int
    sha256: str
    mtime_ns: int
    inode: int

    def untouched(self, path: Path) -> bool:
        """By size, time and inode alone; a byte that the disk itself has changed is not seen.

        Raises:
            OSError: the file cannot be looked up.
        """
        found = path.stat()
        return (found.st_size, found.st_mtime_ns, found.st_ino) == (self.bytes, self.mtime_ns, self.inode)


def file_digest(path: Path, report: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hex.

    Args:
        report: told now and then how many bytes have been read.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(PIECE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                digest.update(piece[:count])
                if report is not None:
                    report(file.tell())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from None
    return digest.hexdigest()


def written(path: Path) -> Written:
    """The file as it is. What ``remember`` knows of it is taken once, and not read again."""
    found = path.stat()
    sha256 = _remembered.pop(_identity(found), None) or file_digest(path)
    return Written(found.st_size, sha256, found.st_mtime_ns, found.st_ino)


def remember(file: IO[bytes], sha256: str) -> None:
    """Keep the digest that a writer has taken of what it has put into ``file``, for ``written``."""
    file.flush()
    _remembered[_identity(os.fstat(file.fileno()))] = sha256


def changed(files: Mapping[Path, Written], *, thorough: bool) -> Path | None:
    """The first of the files that no longer holds what was written, or is gone; None if all do.

    Args:
        thorough: digest every file, at the disk's speed, instead of only those that were touched.
    """

    def same(item: tuple[Path, Written]) -> bool:
        path, was = item
        try:
            if path.stat().st_size != was.bytes:
                return False
            return (not thorough and was.untouched(path)) or file_digest(path) == was.sha256
        except (OSError, InputError):
            return False

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "digest") as pool:
        found = zip(files, pool.map(same, files.items()), strict=True)
        return next((path for path, is_same in found if not is_same), None)


class Digesting:
    """A file to write to, which digests what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, piece: bytes | memoryview) -> int:
        self._file.write(piece)
        self._digest.update(piece)
        return len(piece)

    def tell(self) -> int:
        return self._file.tell()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


_remembered: dict[tuple[int, int, int, int], str] = {}  # by device, inode, size and time


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
