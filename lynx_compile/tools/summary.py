# SPDX-License-Identifier: Apache-2.0
"""``summary.json``: what was measured last, flat keys to numbers, with device and date beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lynx_compile.errors import InputError
from lynx_compile.files.atomic import save_text


def add(values: Mapping[str, float | str], path: Path) -> None:
    """Put ``values`` over what ``path`` says of the same keys.

    Raises:
        InputError: what is there is no JSON mapping.
    """
    save_text(path, json.dumps({**read(path), **values}, indent=1) + "\n")


def read(path: Path) -> dict[str, float | str]:
    """What is there; empty where nothing is.

    Raises:
        InputError: what is there is no JSON mapping.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}).", "Delete it, or name another file.") from None
    return found
