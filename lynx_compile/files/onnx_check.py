# SPDX-License-Identifier: Apache-2.0
"""ONNX's own full check of a file."""

from __future__ import annotations

from pathlib import Path

import onnx

# Opset 18 does not name bf16 for convolutions, opset 22 does; TensorRT takes them, and does not parse what the exporter
# writes in later opsets.
BF16_CONVOLUTION = "unsupported type: tensor(bfloat16)"


def check_onnx(path: Path) -> str | None:
    """What is wrong with a file, or None. Types are inferred, but for a graph with convolutions in bf16."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        if BF16_CONVOLUTION not in str(error):
            return str(error)
        return _without_types(path)
    return None


def _without_types(path: Path) -> str | None:
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        return str(error)
    return None
