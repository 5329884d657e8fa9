# SPDX-License-Identifier: Apache-2.0
"""Small real ONNX graphs with ``LynxSparseLinear`` nodes, in the shape that ``rewrite`` gives them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_rtx
import torch
from onnx import TensorProto, helper
from safetensors.numpy import load_file
from safetensors.torch import save_file

from lynx_compile.engine import cuda as cuda_module
from lynx_compile.engine import trt
from lynx_compile.engine import weights as weights_module
from lynx_compile.engine.manifest import Tensor
from lynx_compile.files.digest import Written, file_digest, written
from lynx_compile.ops.functions import OPSET, lynx_function
from lynx_compile.ops.sparse_linear import padded_width
from lynx_compile.passes.build import BuiltEngine
from lynx_compile.passes.describe import describe
from lynx_compile.passes.export import DenseOnnx
from lynx_compile.passes.rewrite import DenseLinear, LynxOnnx, SparseNode
from tests.engine.fakes import FakeCuda, FakeTensorRT, ICudaEngine

INPUTS = ("x", "weight", "lora_down", "bias")
TOKENS = 32
TYPES = {
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.int32: TensorProto.INT32,
}


@pytest.fixture
def write_onnx() -> Callable[..., LynxOnnx]:
    return _write_onnx


@pytest.fixture
def lynx(tmp_path: Path) -> LynxOnnx:
    """Two nodes with embedded weights."""
    return _write_onnx(tmp_path / "onnx")


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """Make an engine's files and a machine with a fake GPU and TensorRT that runs them."""

    def make(*, cuda: FakeCuda | None = None, **of_the_model: Any) -> Stage:
        lynx = _write_onnx(tmp_path, dtype=torch.float16, **of_the_model)
        return set_stage(monkeypatch, lynx, cuda or FakeCuda())

    return make


@dataclass
class Stage:
    """``loaded``: the plugin libraries that were loaded."""

    path: Path
    lynx: LynxOnnx
    cuda: FakeCuda
    trt: FakeTensorRT
    loaded: list[Path]

    @property
    def manifest(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def plugin(self) -> Path:
        return self.path.with_name("liblynx_plugin.so")

    def change(self, **sections: Any) -> None:
        """Replace values of the manifest: ``change(engine={"bytes": 3})``."""
        values = json.loads(self.manifest.read_text())
        for key, value in sections.items():
            both = isinstance(value, dict) and isinstance(values[key], dict)
            values[key] = values[key] | value if both else value
        self.manifest.write_text(json.dumps(values))

    def expected(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The model's own answer, from ONNX Runtime."""
        session = onnxruntime.InferenceSession(self.lynx.path, providers=["CPUExecutionProvider"])
        tensors = load_file(self.lynx.weights_path)
        names = {value.name for value in session.get_inputs()} - {"x"}
        return session.run(None, {"x": x} | {name: tensors[name] for name in names})[0]


def set_stage(monkeypatch: pytest.MonkeyPatch, lynx: LynxOnnx, cuda: FakeCuda) -> Stage:
    """``small.engine`` beside ``lynx.path``: the plan's header, a copy of the plugin library and noise."""
    path = lynx.path.with_name("small.engine")
    stage = Stage(path, lynx, cuda, FakeTensorRT(cuda, lynx.path), [])
    stage.plugin.write_bytes(HOST_ELF + b"the plugin's code" * 9)
    noise = np.random.default_rng(0).bytes(5000)
    path.write_bytes(b"vtrt" + bytes(132) + stage.plugin.read_bytes() + DEVICE_ELF + noise)
    backend = trt.Backend(stage.trt, "tensorrt_rtx", stage.trt.__version__, trt._message_log(tensorrt_rtx))  # type: ignore[arg-type]
    monkeypatch.setattr(trt, "backend", lambda name: backend)
    monkeypatch.setattr(trt, "load_plugin", lambda backend, library: stage.loaded.append(library.path))
    monkeypatch.setattr(cuda_module, "bindings", lambda: cuda)
    monkeypatch.setattr(weights_module, "PIECE", 1 << 16)  # so that small weights take several
    built = _built(stage)
    checkpoint = SimpleNamespace(class_name="FluxTransformer2DModel", config={"in_channels": 4}, folder=path)
    dit: Any = SimpleNamespace(checkpoint=checkpoint, component="transformer", digest="ab" * 32)
    model = SimpleNamespace(source="someone/model", revision=None, dtype="fp16")
    recipe: Any = SimpleNamespace(model=model, digest="cd" * 32, sparsity=SimpleNamespace(costs=None))
    describe(recipe, dit, DenseOnnx(lynx.path), lynx, built, _written(lynx)).write(stage.manifest)
    return stage


def _written(lynx: LynxOnnx) -> dict[str, Written]:
    return {path.name: written(path) for path in (lynx.path, lynx.weights_path) if path.exists()}


HOST_ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" + bytes(44)
DEVICE_ELF = b"\x7fELF\x02\x01\x01\x33\x07" + bytes(7) + b"\x02\x00\xbe\x00" + bytes(44)


def _built(stage: Stage) -> BuiltEngine:
    cuda_engine = ICudaEngine(stage.trt.Runtime(None))
    tensors = {True: [], False: []}  # type: dict[bool, list[Tensor]]
    for name, io in cuda_engine.tensors.items():
        tensors[io.is_input].append(Tensor(name=name, dtype=io.name, shape=io.shape))
    stage.trt.log.clear()
    return BuiltEngine(
        path=stage.path,
        bytes=stage.path.stat().st_size,
        sha256=file_digest(stage.path),
        backend="tensorrt_rtx",
        backend_version=stage.trt.__version__,
        gpus=("sm80", "sm89"),
        plugin=stage.plugin,
        plugin_sha256=file_digest(stage.plugin),
        plugin_embedded=True,
        plugin_layers=len(stage.lynx.nodes),
        inputs=tuple(tensors[True]),
        outputs=tuple(tensors[False]),
        seconds=0.0,
    )


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
from lynx_compile.engine import trt
from lynx_compile.passes import build as build_module
from lynx_compile.passes.build import build
from lynx_compile.errors import LynxError

lynx = SimpleNamespace(
    path=Path(sys.argv[1]), nodes=tuple(json.loads(sys.argv[2])), external_inputs=(), plugins={}, lengths=()
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
    dtype: torch.dtype = torch.bfloat16,
    tokens: int | str = TOKENS,
) -> LynxOnnx:
    """x [1, tokens, widths[0]] → node, Relu, node, Relu ... → y [1, tokens, widths[-1]].

    ``namespace`` None leaves the attribute out; ``extra_columns`` spoils every weight's width. ``dtype``: ONNX
    Runtime runs fp16, not bf16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    nodes, sparse, value = [], [], "x"
    for index, (channels, out_channels) in enumerate(pairwise(widths)):
        name = f"blocks.{index}.proj"
        tensors |= _tensors(name, channels, out_channels, rank, extra_columns, dtype)
        names = [value, *(f"{name}.{key}" for key in INPUTS[1:])]
        nodes.append(_node(name, names, rank, namespace))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.relu"], name=f"{name}.relu"))
        value = f"{name}.relu"
        sparse.append(SparseNode(name, (name,), channels, out_channels, rank, False, (0.0,)))
    weights_path = folder / "model.safetensors"
    save_file(tensors, weights_path)
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TYPES[dtype], [1, tokens, widths[0]])],
        [helper.make_tensor_value_info(value, TYPES[dtype], [1, tokens, widths[-1]])],
    )
    _attach(graph, tensors, weights_path, external)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("lynx", 1)]
    model = helper.make_model(graph, functions=[lynx_function()], opset_imports=opsets, ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path)
    dense = (DenseLinear("blocks.9.proj", "excluded by the recipe"),)
    return LynxOnnx(path, weights_path, tuple(tensors) if external else (), tuple(sparse), dense)


def _tensors(
    name: str, channels: int, out_channels: int, rank: int, extra_columns: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    width = padded_width(channels, rank) + extra_columns
    return {
        f"{name}.weight": torch.randn(out_channels, width).to(dtype),
        f"{name}.lora_down": torch.randn(max(rank, 1), channels).to(dtype),
        f"{name}.bias": torch.randn(out_channels).to(dtype),
    }


def _node(name: str, inputs: list[str], rank: int, namespace: str | None) -> onnx.NodeProto:
    attributes: dict[str, int | str] = {"rank": rank, "norm_scale": 0, "plugin_version": "1"}
    attributes |= {"activation": 0, "activation_from": 0}
    if namespace is not None:
        attributes["plugin_namespace"] = namespace
    return helper.make_node("LynxSparseLinear", inputs, [f"{name}.y"], name=name, domain="lynx", **attributes)


def _attach(graph: onnx.GraphProto, tensors: dict[str, torch.Tensor], path: Path, external: bool) -> None:
    """Graph inputs, or initializers that are byte ranges of the safetensors file."""
    offsets = _offsets(path)
    for name, tensor in tensors.items():
        if external:
            graph.input.append(helper.make_tensor_value_info(name, TYPES[tensor.dtype], tensor.shape))
            continue
        initializer = TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape)
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
