# SPDX-License-Identifier: Apache-2.0
"""One process at a time: a lock on a file, which the system gives back when its holder ends, however it does."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lynx_compile.errors import InputError

HOLDER = re.compile(rb"process \d+ on \S+ since [\d-]+ [\d:]+")
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
HEAD_BYTES = 4096

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` (made where it is not there), in which this process names itself.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}).", "Check the folder and its permissions."
        ) from None
    try:
        lock(handle, path)
        os.truncate(handle, 0)
        os.write(handle, f"{this_process()}\n".encode())
        yield
    finally:
        os.close(handle)


def lock(handle: int, path: Path) -> None:
    """Lock the open file ``path`` until it is closed.

    Raises:
        InputError: another process holds it; the message names the one that the file's beginning tells.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            log.warning("%s: the file system has no locks; run nothing else with these files", path)
            return
        with path.open("rb") as file:
            found = HOLDER.search(file.read(HEAD_BYTES))
        holder = found.group().decode(errors="replace") if found else "another process"
        raise InputError(
            f"{path.parent} is in use: lynx-compile runs as {holder} with {path.name}.",
            "Wait until it has ended, or give another output.",
        ) from None


def this_process() -> str:
    """How a lock names its holder."""
    return (
        f"process {os.getpid()} on {socket.gethostname() or 'here'} since {datetime.now():%Y-%m-%d %H:%M:%S}"
    )
