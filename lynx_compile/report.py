# SPDX-License-Identifier: Apache-2.0
"""One HTML page."""

from pathlib import Path


def write(output: Path) -> None:
    pass
