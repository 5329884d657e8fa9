# SPDX-License-Identifier: Apache-2.0
"""What is said of other libraries' errors."""

from __future__ import annotations

import pytest

from lynx_compile.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\n It failed.\nAt length."), "It failed"),
        (RuntimeError(), "RuntimeError"),
        (TypeError("\n"), "TypeError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_one_line_of_it_or_its_class(error: Exception, line: str) -> None:
    assert first_line(error) == line
