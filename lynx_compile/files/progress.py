# SPDX-License-Identifier: Apache-2.0
"""How long work says what it has done: a callable that takes (what, done, total)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """For callers who do not look."""
