# SPDX-License-Identifier: Apache-2.0
"""A serialized TensorRT engine (a plan) as a file: its digest, and how many of our plugin layers it holds."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

from lynx_compile.engine import trt
from lynx_compile.errors import InputError

MAGIC = b"vtrt"  # how a plan starts
PIECE_BYTES = 1 << 24


def read_plan(path: Path) -> Plan:
    """Digest and search an engine on disk.

    Raises:
        InputError: it cannot be read.
    """
    with Path(os.devnull).open("wb") as nowhere:
        plan = Plan(nowhere)
        try:
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    plan.write(piece)
        except FileNotFoundError:
            raise InputError(f"The engine {path} does not exist.", "Check the path, or compile it.") from None
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}).", "Check the path and its permissions."
            ) from None
    return plan


def embeds(path: Path, library: Path) -> bool:
    """Whether an engine on disk carries a copy of the plugin library, byte for byte."""
    search = _Search(library.read_bytes())
    with path.open("rb") as file:
        while not search.count and (piece := file.read(PIECE_BYTES)):
            search.read(piece)
    return bool(search.count)


class Plan:
    """The serialized engine on its way to or from disk, piece by piece: digested and searched as it passes.

    A plan has one record per plugin layer with the plugin's name behind its length as a 64-bit integer, and
    the name in further places. Seen in TensorRT for RTX 1.7: the number of records does not depend on the
    number of target GPUs, and layers that the builder has removed have none.
    """

    def __init__(self, file: BinaryIO) -> None:
        names = [name.encode() for name in trt.PLUGIN_NAMES]
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.magic = b""
        self._names = [_Search(name) for name in names]
        self._records = [_Search(struct.pack("<Q", len(name)) + name) for name in names]
        self._file = file

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self.digest.update(piece)
        self.bytes += len(piece)
        self.magic = (self.magic + piece[: len(MAGIC)])[: len(MAGIC)]
        for search in (*self._names, *self._records):
            search.read(piece)

    @property
    def names(self) -> int:
        return sum(search.count for search in self._names)

    @property
    def records(self) -> int:
        return sum(search.count for search in self._records)


class _Search:
    """Counts a byte string in a stream, also where two pieces share it."""

    def __init__(self, wanted: bytes) -> None:
        self.count = 0
        self._wanted = wanted
        self._tail = b""  # shorter than what is wanted, so that nothing is counted twice

    def read(self, piece: bytes) -> None:
        shared = len(self._wanted) - 1
        self.count += (self._tail + piece[:shared]).count(self._wanted) + piece.count(self._wanted)
        self._tail = (self._tail + piece[-shared:])[-shared:]
