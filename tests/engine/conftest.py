# SPDX-License-Identifier: Apache-2.0
"""Small real ONNX graphs with ``LynxSparseLinear`` nodes, in the shape that ``rewrite`` gives them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from lynx_compile.export import OPSET
from lynx_compile.functions import lynx_function
from lynx_compile.rewrite import DenseLinear, LynxOnnx, SparseNode
from lynx_compile.sparsity import padded_width

INPUTS = ("x", "weight", "lora_down", "bias", "order", "centre", "saliency")
TOKENS = 32


@pytest.fixture
def write_onnx() -> Callable[..., LynxOnnx]:
    return _write_onnx


@pytest.fixture
def lynx(tmp_path: Path) -> LynxOnnx:
    """Two nodes with embedded weights."""
    return _write_onnx(tmp_path / "onnx")


@pytest.fixture
def script() -> Callable[[str, LynxOnnx, Path], list[str]]:
    """A command that runs code with ``lynx`` and ``output`` in a process of its own.

    For what TensorRT's plugin registry allows only once per process, for signals, and for a full disk.
    """

    def command(code: str, lynx: LynxOnnx, output: Path) -> list[str]:
        return [sys.executable, "-c", PRELUDE + code, str(lynx.path), json.dumps(lynx.nodes), str(output)]

    return command


PRELUDE = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from lynx_compile import recipe
from lynx_compile.engine import build as build_module, trt
from lynx_compile.engine.build import build
from lynx_compile.errors import LynxError

lynx = SimpleNamespace(
    path=Path(sys.argv[1]), nodes=tuple(json.loads(sys.argv[2])), external_inputs=(), plugins={}
)
output = Path(sys.argv[3])
"""


def _write_onnx(
    folder: Path,
    *,
    widths: tuple[int, ...] = (64, 128, 64),
    rank: int = 16,
    external: bool = False,
    namespace: str | None = "lynx",
    extra_columns: int = 0,
) -> LynxOnnx:
    """x [1, TOKENS, widths[0]] bf16 → node, Relu, node, Relu ... → y [1, TOKENS, widths[-1]].

    ``namespace`` None leaves the attribute out; ``extra_columns`` spoils every weight's width.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    nodes, sparse, value = [], [], "x"
    for index, (channels, out_channels) in enumerate(pairwise(widths)):
        name = f"blocks.{index}.proj"
        tensors |= _tensors(name, channels, out_channels, rank, extra_columns)
        names = [value, *(f"{name}.{key}" for key in INPUTS[1:])]
        nodes.append(_node(name, names, rank, namespace))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.relu"], name=f"{name}.relu"))
        value = f"{name}.relu"
        sparse.append(SparseNode(name, (name,), channels, out_channels, rank, False, 0.0))
    weights_path = folder / "model.safetensors"
    save_file(tensors, weights_path)
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1, TOKENS, widths[0]])],
        [helper.make_tensor_value_info(value, TensorProto.BFLOAT16, [1, TOKENS, widths[-1]])],
    )
    _attach(graph, tensors, weights_path, external)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("lynx", 1)]
    model = helper.make_model(graph, functions=[lynx_function()], opset_imports=opsets, ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path)
    dense = (DenseLinear("blocks.9.proj", "excluded by the recipe"),)
    return LynxOnnx(path, weights_path, tuple(tensors) if external else (), tuple(sparse), dense)


def _tensors(
    name: str, channels: int, out_channels: int, rank: int, extra_columns: int
) -> dict[str, torch.Tensor]:
    width = padded_width(channels, rank) + extra_columns
    return {
        f"{name}.weight": torch.randn(out_channels, width).bfloat16(),
        f"{name}.lora_down": torch.randn(max(rank, 1), channels).bfloat16(),
        f"{name}.bias": torch.randn(out_channels).bfloat16(),
        f"{name}.order": torch.arange(channels, dtype=torch.int32),
        f"{name}.centre": torch.zeros(channels).bfloat16(),
        f"{name}.saliency": torch.ones(channels).bfloat16(),
    }


def _node(name: str, inputs: list[str], rank: int, namespace: str | None) -> onnx.NodeProto:
    attributes: dict[str, int | str] = {"rank": rank, "norm_scale": 0, "plugin_version": "1"}
    attributes |= {"has_order": 0, "has_centre": 0, "has_saliency": 0}
    if namespace is not None:
        attributes["plugin_namespace"] = namespace
    return helper.make_node("LynxSparseLinear", inputs, [f"{name}.y"], name=name, domain="lynx", **attributes)


def _attach(graph: onnx.GraphProto, tensors: dict[str, torch.Tensor], path: Path, external: bool) -> None:
    """Graph inputs, or initializers that are byte ranges of the safetensors file."""
    types = {torch.bfloat16: TensorProto.BFLOAT16, torch.int32: TensorProto.INT32}
    offsets = _offsets(path)
    for name, tensor in tensors.items():
        if external:
            graph.input.append(helper.make_tensor_value_info(name, types[tensor.dtype], tensor.shape))
            continue
        initializer = TensorProto(name=name, data_type=types[tensor.dtype], dims=tensor.shape)
        initializer.data_location = TensorProto.EXTERNAL
        start, end = offsets[name]
        for key, value in {"location": path.name, "offset": start, "length": end - start}.items():
            initializer.external_data.add(key=key, value=str(value))
        graph.initializer.append(initializer)


def _offsets(path: Path) -> dict[str, tuple[int, int]]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {name: tuple(8 + size + end for end in entry["data_offsets"]) for name, entry in header.items()}
