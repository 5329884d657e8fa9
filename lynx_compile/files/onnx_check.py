# SPDX-License-Identifier: Apache-2.0
"""ONNX's own full check of a file."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

# Opset 18 does not name bf16 for convolutions and constants of a shape, opset 22 does; TensorRT takes them, and does
# not parse what the exporter writes in later opsets.
UNNAMED_BF16 = re.compile(r"unsupported type:? tensor\(bfloat16\)")


def check_onnx(path: Path) -> str | None:
    """What is wrong with a file, or None. Types are inferred, but for a graph whose opset is too old for its bf16."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        if not UNNAMED_BF16.search(str(error)):
            return str(error)
        return _without_types(path)
    return None


def _without_types(path: Path) -> str | None:
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        return str(error)
    return None
