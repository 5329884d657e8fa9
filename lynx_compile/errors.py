# SPDX-License-Identifier: Apache-2.0
"""Errors that reach the user: one sentence of cause, one of remedy, and the exit code of the command."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path


class LynxError(Exception):
    """A failure the user can act on.

    ``exit_code`` is what ``lynx-compile`` returns. ``log``: the file of the run's log, where there is one.
    """

    exit_code = 3
    log: Path | None = None

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause} {remedy}")
        self.cause = cause
        self.remedy = remedy


class InputError(LynxError):
    """The recipe, the model or a file given by the user is wrong (exit code 2)."""

    exit_code = 2


class StageError(LynxError):
    """A stage of the compiler failed on valid input (exit code 3)."""

    def __init__(self, stage: str, cause: str, remedy: str) -> None:
        super().__init__(f"Stage '{stage}' failed: {cause}", remedy)
        self.stage = stage


class EngineError(LynxError):
    """TensorRT or CUDA failed while an engine was loaded or run (exit code 3)."""


class OutOfMemoryError(LynxError):
    """Memory ran out on the host or on a GPU (exit code 3); ``out_of_memory`` makes it."""


class DiskFullError(LynxError):
    """There is no room for a file (exit code 3)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: in ``error``, or in what was being handled when it was raised.

    So those who explain their own errors need not know of it: what they raise for such a cause (a damaged file, say)
    is explained anew by ``out_of_memory`` where the stage is known.
    """
    return not isinstance(error, OutOfMemoryError) and any(map(_says_out_of_memory, _chain(error)))


def out_of_memory(stage: str | None, error: BaseException) -> OutOfMemoryError:
    """The error to show for one that ``is_out_of_memory``: which stage it was and what to change."""
    on_gpu = any(_GPU.search(f"{type(link).__name__} {link}") for link in _chain(error))
    memory = "GPU memory" if on_gpu else "memory"
    cause = (
        f"Stage '{stage}' failed: {memory} ran out." if stage else f"{memory[0].upper()}{memory[1:]} ran out."
    )
    machine = "a GPU" if on_gpu else "a machine"
    return OutOfMemoryError(
        cause, f"{_CHANGES.get(stage or '', 'End other programs')}, or use {machine} with more of it."
    )


def first_line(error: BaseException) -> str:
    """Of somebody else's error, for a sentence of ours; its class where it says nothing."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


_GPU = re.compile(r"cuda|gpu|device memory", re.IGNORECASE)
_MESSAGE = re.compile(
    r"out ?of ?memory|not enough memory|cannot allocate memory|(failed|unable) to allocate|could not be allocated"
    r"|defaultcpuallocator|bad_?alloc|cudaErrorMemoryAllocation|os error 12\b|signal 9\b|sigkill",
    re.IGNORECASE,
)
_CHANGES = {
    "capture": "Lower calibration.batch or the sizes under 'call', give encoded prompts or a recording",
    "calibrate": "Lower calibration.memory_gib, calibration.batch or the sizes under 'call'",
    "compensate": "Lower calibration.memory_gib",
    "tune": "Lower calibration.memory_gib or calibration.batch, or set 'tune: false' under 'compensation'",
    "rewrite": "Set 'weights: external' under 'engine'",
    "build": "Set 'weights: external' under 'engine', lower engine.workspace_gib, build for fewer of engine.gpus",
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from or while handling, also where ``from None`` hides that from users."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, InputError):  # it quotes what the user wrote
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocators, ONNX Runtime and TensorRT say it in words.
    return isinstance(error, MemoryError) or _MESSAGE.search(f"{type(error).__name__} {error}") is not None
