# SPDX-License-Identifier: Apache-2.0
"""What takes the place of ``build`` for torch: nothing is built, and what is to be said of the engine is found out."""

from __future__ import annotations

import time
from pathlib import Path

import onnx

from lynx_compile import recipe
from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Tensor
from lynx_compile.files.atomic import copy_file, save_text
from lynx_compile.files.digest import file_digest
from lynx_compile.files.outputs import Outputs
from lynx_compile.passes.build import BuiltEngine
from lynx_compile.passes.rewrite import LynxOnnx
from lynx_compile.passes.target import Target

TEXT = """\
This is no engine: it was compiled for torch. The manifest and the weights beside it are for
lynx_compile.apply(pipe.transformer, "{name}").
"""
DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.BOOL: "bool",
}


def keep(lynx: LynxOnnx, engine: recipe.Engine, target: Target, output: Path) -> BuiltEngine:
    """Write a word for people as ``output``, and describe the ONNX file as an engine's builder would."""
    start = time.monotonic()
    library = trt.plugin_library(engine.plugin)
    save_text(output, TEXT.format(name=output.name))
    copy_file(library.path, Outputs.of(output).plugin)
    graph = onnx.load(lynx.path, load_external_data=False).graph
    return BuiltEngine(
        path=output,
        bytes=output.stat().st_size,
        sha256=file_digest(output),
        backend=target.name,
        backend_version=target.version,
        gpus=target.gpus,
        plugin=Outputs.of(output).plugin,
        plugin_sha256=library.sha256,
        plugin_embedded=False,
        plugin_layers=len(lynx.nodes),
        inputs=tuple(map(_tensor, graph.input)),
        outputs=tuple(map(_tensor, graph.output)),
        seconds=time.monotonic() - start,
    )


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    extents = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    dtype = DTYPES.get(kind.elem_type) or onnx.helper.tensor_dtype_to_string(kind.elem_type)
    return Tensor(name=value.name, dtype=dtype, shape=tuple(extents))
