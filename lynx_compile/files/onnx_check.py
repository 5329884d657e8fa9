# SPDX-License-Identifier: Apache-2.0
"""ONNX's own full check of a file."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

# Opset 18 does not name bf16 for convolutions and constants of a shape, opset 22 does; TensorRT takes them, and does
# not parse what the exporter writes in later opsets.
UNNAMED_BF16 = re.compile(r"unsupported type:? tensor\(bfloat16\)")


def check_onnx(path: Path) -> str | None:
    """What is wrong with a file, or None. Types are inferred, but for a graph whose opset is too old for its bf16."""
    checked = _self_contained(path)
    try:
        onnx.checker.check_model(checked, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        if not UNNAMED_BF16.search(str(error)):
            return str(error)
        return _without_types(checked)
    return None


def _self_contained(path: Path) -> Path | onnx.ModelProto:
    """The file; where it refers to tensors outside of its folder, which ONNX refuses, the graph with those as inputs.

    The files there are a checkpoint's, whose headers were read.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # the checker says what is wrong with it
        return path
    graph = model.graph
    external = [tensor for tensor in graph.initializer if uses_external_data(tensor)]
    places = (entry.value for t in external for entry in t.external_data if entry.key == "location")
    if not any(Path(place).is_absolute() for place in places):
        return path
    kept = [tensor for tensor in graph.initializer if not uses_external_data(tensor)]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in external)
    return model


def _without_types(path: Path | onnx.ModelProto) -> str | None:
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        return str(error)
    return None
