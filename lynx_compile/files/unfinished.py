# SPDX-License-Identifier: Apache-2.0
"""A folder that a stage fills with files, some of which it finds there if it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lynx_compile import parallel
from lynx_compile.files.atomic import save_text

MARK = "unfinished"


@contextmanager
def unfinished(folder: Path, key: str) -> Iterator[Callable[[Path], bool]]:
    """Fill ``folder``; yields whether a file of it, written atomically, is there from a run that was stopped.

    A mark beside the files, with the ``key`` of what they depend on, is there until all are: what has no mark of this
    key, as where a file turned out to be damaged, is another run's, and goes. Processes that compile together come in
    and out together. Without a key nothing is taken over.
    """
    mark = folder / MARK
    there: frozenset[Path] = frozenset()
    with parallel.first_process_first():
        if parallel.is_first() and not (key and mark.is_file() and mark.read_text(encoding="utf-8") == key):
            folder.mkdir(parents=True, exist_ok=True)
            if key:
                for path in folder.glob("*.safetensors"):
                    path.unlink()
                save_text(mark, key)
        if key:
            there = frozenset(folder.glob("*.safetensors"))
    parallel.meet()  # before anyone writes
    yield lambda path: path in there
    parallel.meet()
    if parallel.is_first():
        mark.unlink(missing_ok=True)
