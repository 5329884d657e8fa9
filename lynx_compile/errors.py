# SPDX-License-Identifier: Apache-2.0
"""Errors that reach the user: one sentence of cause, one of remedy, and the exit code of the command."""

from __future__ import annotations


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
