# SPDX-License-Identifier: Apache-2.0
"""``if torch.onnx.is_in_onnx_export()`` takes the ordinary branch: the other was written for an older exporter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def no_onnx_branches() -> Iterator[None]:
    """While this is open, nobody is told that an export is going on."""
    with patch.object(torch.onnx, "is_in_onnx_export", lambda: False):
        yield
