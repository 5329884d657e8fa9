# SPDX-License-Identifier: Apache-2.0
"""The FP8 nodes of a rewritten file, run by ONNX Runtime through their functions, and by the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import torch
from safetensors.torch import load_file

from lynx_compile.models.structure import find_structure
from lynx_compile.ops.functions import DOMAIN, lynx_functions
from lynx_compile.passes.export import export_module
from lynx_compile.recipe import NodeOperand
from lynx_compile.torch_ops.fp8_bindings import OPERANDS, _Fp8Call
from tests.passes.test_rewrite_fp8 import Block, Case, block_inputs

PRODUCERS = ("Norm", "Gelu", "Gated")  # by their numbers, from 1
ROWS = 37


def nodes_of(
    operand: NodeOperand, folder: Path
) -> Iterator[tuple[onnx.NodeProto, Mapping[str, torch.Tensor]]]:
    """Of a block in fp16 whose linears are all in FP8: its nodes, and the tensors of the file that they read."""
    torch.manual_seed(0)
    module = Block().half().eval().requires_grad_(False)
    inputs = {name: value.half() for name, value in block_inputs().items()}
    dense = export_module(module, inputs, folder / "dense.onnx")
    lynx = Case(module, find_structure(module, inputs).groups, dense, {}, folder).rewrite(lambda _: operand)
    tensors = load_file(lynx.weights_path)
    for node in onnx.load(lynx.path, load_external_data=False).graph.node:
        if node.domain == DOMAIN:
            yield node, {name: tensors[name] for name in node.input if name in tensors}


def feed_of(node: onnx.NodeProto, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random values of what the node does not read from the file, by the names of its inputs, x first."""
    channels = _channels(node)
    x = torch.randn(ROWS, channels) * torch.logspace(-2, 2, ROWS)[:, None]
    feed = {node.input[0]: x.half()}
    for name in node.input[1:]:
        feed[name] = tensors[name].clone() if name in tensors else _gain(channels)  # cloned: aligned
    if "Gated" in node.op_type:  # its x and its gate are halves of one tensor
        assert node.input[-1] == node.input[0]
        feed[node.input[0]] = torch.cat((x, torch.randn(ROWS, channels)), 1).half()
    return feed


def _gain(channels: int) -> torch.Tensor:
    return (1 + 0.3 * torch.randn(1, channels)).half()


def _channels(node: onnx.NodeProto) -> int:
    return 144 if any(part in node.name for part in (".down", "gated_down")) else 80


def by_function(node: onnx.NodeProto, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """y by ONNX Runtime."""
    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int32: onnx.TensorProto.INT32}
    kinds[torch.float16] = onnx.TensorProto.FLOAT16
    inputs = [oh.make_tensor_value_info(n, kinds[v.dtype], v.shape) for n, v in feed.items()]
    y = oh.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT16, None)
    graph = oh.make_graph([node], "one", inputs, [y])
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid(DOMAIN, 1)]
    model = oh.make_model(
        graph, functions=lynx_functions([node.op_type]), opset_imports=opsets, ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {name: value.numpy() for name, value in feed.items()})[0]
    return torch.from_numpy(found)


def by_kernels(
    library: ctypes.CDLL, node: onnx.NodeProto, feed: Mapping[str, torch.Tensor], stream: int | None = None
) -> torch.Tensor:
    """y by the kernels, from the same tensors as they are; on the device on which they are."""
    attributes = {a.name: oh.get_attribute_value(a) for a in node.attribute}
    x, first, *rest = (feed[name] for name in node.input)
    sparse = "SparseWeight" in node.op_type
    metadata = rest.pop(0) if sparse else None
    weight_scale, bias, *produced = rest
    producer = next((i + 1 for i, name in enumerate(PRODUCERS) if f"Lynx{name}" in node.op_type), 0)
    operand = OPERANDS[0] if sparse else OPERANDS[1 + attributes["prune"]]
    out_channels, halves = len(bias), attributes.get("halves", 0)
    call = _Fp8Call(
        fp16=1, operand=OPERANDS.index(operand), rows=len(x), channels=x.shape[1] // (2 if halves else 1),
        out_channels=out_channels, tile=-1, producer=producer, x=x.data_ptr(), weight=first.data_ptr(),
        **{name: attributes[name] for name in ("activation", "activation_from", "gated")},
        producer_activation=attributes.get("producer_activation", 0), halves=halves,
        metadata=0 if metadata is None else metadata.data_ptr(), weight_scale=weight_scale.data_ptr(),
        bias=bias.data_ptr(),
    )  # fmt: skip
    if producer == 3:
        call.gate = produced[0].data_ptr()
    elif produced:
        call.rms, call.epsilon, call.gain_rows = attributes["rms"], attributes["epsilon"], 1
        call.gain, call.shift = (tensor.data_ptr() for tensor in produced)
    if call.gated:
        out_channels = call.activation_from + (out_channels - call.activation_from) // 2
    y = torch.full((len(x), out_channels), torch.nan, dtype=x.dtype, device=x.device)
    workspace = torch.empty(library.lynx_fp8_workspace_bytes(call) + 256, dtype=torch.uint8, device=x.device)
    call.y, call.workspace = y.data_ptr(), -(-workspace.data_ptr() // 256) * 256
    assert library.lynx_fp8_linear(call, stream) == 0
    return y


def assert_equal(node: onnx.NodeProto, y: torch.Tensor, wanted: torch.Tensor) -> None:
    """Up to y's rounding, and the last bit of what a producer makes, which e4m3 may round the other way."""
    bound = 2.0**-10 if not any(f"Lynx{name}" in node.op_type for name in PRODUCERS) else 2.0**-6
    errors = (y.float().cpu() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)
    assert errors.max() < bound, (node.name, float(errors.max()))
