# SPDX-License-Identifier: Apache-2.0
"""From a user's ONNX file to the dense ONNX that ``rewrite`` takes: what ``export`` writes for a module."""

from __future__ import annotations

from pathlib import Path

import onnx

from lynx_compile.errors import StageError
from lynx_compile.models.onnx_model import OnnxCheckpoint
from lynx_compile.ops.functions import LINEAR_KEY
from lynx_compile.passes.export import DenseOnnx


def adopt(checkpoint: OnnxCheckpoint, path: Path) -> DenseOnnx:
    """Write the graph with its linears marked, and its large tensors, one at a time, as external data beside it.

    Raises:
        StageError: the result is not valid ONNX. LynxError: it cannot be written.
    """
    paths = {linear.product: linear.path for linear in checkpoint.linears}
    for node in checkpoint.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        if (name := str(node.outputs[0].name)) in paths:
            node.metadata_props[LINEAR_KEY] = paths[name]
            node.name = (
                node.name or f"product of {name}"
            )  # graphsurgeon's nodes are found again by their names
    checkpoint.save(path)
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise StageError("export", f"the ONNX is invalid ({error}).", "Export it again.") from None
    return DenseOnnx(path)
