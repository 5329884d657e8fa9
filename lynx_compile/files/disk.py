# SPDX-License-Identifier: Apache-2.0
"""Full disks: known in whatever a library makes of them, and said with the folder and what is missing."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from lynx_compile.errors import DiskFullError

NUMBERS = (errno.ENOSPC, errno.EDQUOT)
TEXTS = re.compile(r"no space left on device|disk quota exceeded|os error (28|122)\b", re.IGNORECASE)
_REMEDY = "Free some space, or choose another output or --cache."


def is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it was made of, says that a disk is full. safetensors and others only say so."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (isinstance(error, OSError) and error.errno in NUMBERS) or TEXTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def full(path: Path, needed: int | None = None) -> DiskFullError:
    """The error for ``path``, a file or a folder, of which ``needed`` bytes were still to be written."""
    folder = path if path.is_dir() else path.parent
    free = free_bytes(folder)
    if needed is None or free is None or needed <= free:
        left = "" if free is None else f" ({_size(free)} are free in {folder})"
        return DiskFullError(f"The disk is full: {path} could not be written{left}.", _REMEDY)
    return DiskFullError(
        f"The disk is full: {path} takes {_size(needed)}, and {_size(free)} are free in {folder}; "
        f"{_size(needed - free)} are missing.",
        _REMEDY,
    )


def require_room(path: Path, needed: int) -> None:
    """Refuse to begin a file of ``needed`` bytes for which there is no room.

    Raises:
        DiskFullError: there is none.
    """
    free = free_bytes(path.parent)
    if free is not None and needed > free:
        raise full(path, needed)


def free_bytes(folder: Path) -> int | None:
    """What this user may still write there; None where the system does not tell."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
