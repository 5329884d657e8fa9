# SPDX-License-Identifier: Apache-2.0
"""A float32 copy of an ONNX file, for ONNX Runtime on a CPU: it has no bf16 kernels for these graphs.

The weights keep the values that they have in 16 bits, so that what runs is what the engine holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.external_data_helper import uses_external_data
from safetensors import SafetensorError, safe_open

from lynx_compile.errors import InputError
from lynx_compile.files.atomic import atomic_path
from lynx_compile.files.tensors import TORCH_DTYPES, TensorSpec, read_external, refer, write_tensors

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
INLINE_BYTES = 4096  # larger tensors go into the safetensors file
_AGAIN = "Compile the engine again."


def float32_copy(source: Path, path: Path) -> Path:
    """Write ``path`` and, beside it, its weights as safetensors; every 16-bit float of ``source`` becomes 32-bit.

    Inputs of the graph that the safetensors file beside ``source`` holds (external weights) become constants.

    Raises:
        InputError: ``source`` or its weights cannot be read. LynxError: the copy cannot be written.
    """
    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no common base with OSError
        raise InputError(f"{source} cannot be read ({error}).", _AGAIN) from None
    readers = _bind_inputs(model.graph, source.with_suffix(".safetensors"))
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            if uses_external_data(tensor) or len(tensor.raw_data) > INLINE_BYTES:
                stored = onnx.TensorProto()
                stored.CopyFrom(tensor)
                readers[tensor.name] = partial(_read_tensor, stored, source.parent)
            elif tensor.name not in readers:
                _widen_tensor(tensor)
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type in HALVES:
                info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        for node in graph.node:
            _widen_attributes(node)
    _move_out([t for graph in _graphs(model.graph) for t in graph.initializer], readers, path, source)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return path


def _bind_inputs(graph: onnx.GraphProto, weights: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Make constants of the graph's inputs that ``weights`` holds; returns how to read them."""
    try:
        with safe_open(weights, "pt") as file:
            held = set(file.keys())
    except (OSError, SafetensorError):
        return {}  # the dense file has none; if a Lynx file lacks it, its constants are missed later
    bound = [info for info in graph.input if info.name in held]
    for info in bound:
        kind = info.type.tensor_type
        shape = [dimension.dim_value for dimension in kind.shape.dim]
        graph.initializer.append(onnx.TensorProto(name=info.name, data_type=kind.elem_type, dims=shape))
        graph.input.remove(info)
    return {info.name: partial(_read_safetensors, weights, info.name) for info in bound}


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those in the attributes of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _read_tensor(tensor: onnx.TensorProto, folder: Path) -> torch.Tensor:
    if uses_external_data(tensor) and tensor.data_type in TORCH_DTYPES:
        stored = read_external(tensor, folder)
        return stored.float() if tensor.data_type in HALVES else stored
    values = onnx.numpy_helper.to_array(tensor, str(folder))
    return torch.from_numpy(values.astype(np.float32) if tensor.data_type in HALVES else values.copy())


def _read_safetensors(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in HALVES:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _widen_attributes(node: onnx.NodeProto) -> None:
    """Casts and the like name a type, constants hold a tensor."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in HALVES:
            attribute.i = onnx.TensorProto.FLOAT
        elif attribute.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attribute.t)


def _move_out(
    tensors: list[onnx.TensorProto], readers: dict[str, Callable[[], torch.Tensor]], path: Path, source: Path
) -> None:
    """Write what ``readers`` read into the safetensors file beside ``path``; its tensors become references to it."""
    weights = path.with_suffix(".safetensors")
    large = [tensor for tensor in tensors if tensor.name in readers]
    for tensor in large:
        if tensor.data_type in HALVES:
            tensor.data_type = onnx.TensorProto.FLOAT

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            try:
                return readers[name]()
            except (OSError, ValueError, SafetensorError, onnx.checker.ValidationError) as error:
                raise InputError(f"The weights of {source} cannot be read ({error}).", _AGAIN) from None

        return read

    offsets = write_tensors(
        weights, [TensorSpec(t.name, _torch_dtype(t), tuple(t.dims), reader(t.name)) for t in large]
    )
    for tensor in large:
        tensor.ClearField("raw_data")
        refer(tensor, weights.name, *offsets[tensor.name])


def _torch_dtype(tensor: onnx.TensorProto) -> torch.dtype:
    return torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))).dtype
