# SPDX-License-Identifier: Apache-2.0
"""Errors that reach the user: one sentence of cause, one of remedy, and the exit code of the command."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator


class LynxError(Exception):
    """A failure the user can act on. ``exit_code`` is what ``lynx-compile`` returns."""

    exit_code = 3

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU: here, or in what ``error`` was raised from.

    A handler that explains errors lets these pass (``raise``), so that the one who knows the stage explains them.
    """
    return any(_says_out_of_memory(link) for link in _chain(error))


def out_of_memory(stage: str | None, error: BaseException) -> LynxError:
    """The error to show for one that ``is_out_of_memory``: which stage it was and what to change."""
    on_gpu = any(_GPU.search(f"{type(link).__name__} {link}") for link in _chain(error))
    where = "GPU memory" if on_gpu else "memory"
    remedy = _REMEDIES.get(stage or "", "Use smaller shapes")
    remedy += ", or a GPU with more memory." if on_gpu else ", or a machine with more memory."
    return (
        StageError(stage, f"{where} ran out.", remedy)
        if stage
        else LynxError(f"The {where} ran out.", remedy)
    )


_GPU = re.compile(r"cuda|gpu|device memory", re.IGNORECASE)
_MESSAGE = re.compile(
    r"out ?of ?memory|defaultcpuallocator|not enough memory|cannot allocate memory|failed to allocate|bad_?alloc"
    r"|unable to allocate|os error 12\b|signal 9\b|sigkill",
    re.IGNORECASE,
)
_REMEDIES = {
    "load": "Close other programs",
    "capture": "Lower calibration.batch, let fewer text encoders load by giving encoded prompts or a recording",
    "calibrate": "Lower calibration.memory_gib, calibration.batch or the sizes under 'call'",
    "compensate": "Lower calibration.memory_gib",
    "export": "Close other programs",
    "rewrite": "Set 'weights: external' under 'engine'",
    "build": "Set 'weights: external' under 'engine', lower engine.workspace_gib or build for fewer engine.gpus",
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those it was raised from or while handling, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ if error.__suppress_context__ else error.__cause__ or error.__context__


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocators, ONNX Runtime and TensorRT raise RuntimeErrors or types of their own that say it in words.
    return isinstance(error, Exception) and _MESSAGE.search(f"{type(error).__name__} {error}") is not None
