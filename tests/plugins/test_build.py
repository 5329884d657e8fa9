# SPDX-License-Identifier: Apache-2.0
"""One node of each op through TensorRT for RTX: good shapes build, wrong ones are refused with a reason."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx.helper as oh
import pytest
from onnx import TensorProto

from lynx_compile.ops.sparse_linear import padded_width
from lynx_compile.ops.sparse_weight_linear import STEP

from .native import LIBRARY

ALIAS = LIBRARY.parent / "rtx_alias" / "libtensorrt_rtx.so"  # what RTX's parser dlopens; see engine/trt.py

# Prints one JSON object: the engine's size (null when refused), layer types, output shape, logged reasons.
PROBE = """
import ctypes, json, sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.errors = []

    def log(self, severity, message):
        if severity == trt.ILogger.ERROR:
            self.errors.append(message)

model, library, alias, channels = sys.argv[1:]
ctypes.CDLL(alias, mode=ctypes.RTLD_GLOBAL)
log = Log()
builder = trt.Builder(log)
builder.get_plugin_registry().load_library(library)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
out = {"layers": [], "shape": None, "engine": None}
if parser.parse_from_file(model):
    out["layers"] = [str(network.get_layer(i).type) for i in range(network.num_layers)]
    out["shape"] = list(network.get_output(0).shape)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name in [network.get_input(i).name for i in range(network.num_inputs)]:
        if name in ("x", "gate"):
            profile.set_shape(name, (2, 1, int(channels)), (2, 300, int(channels)), (2, 4608, int(channels)))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    out["engine"] = None if engine is None else engine.nbytes
out["errors"] = [e for e in log.errors if e.startswith("Lynx")]
print(json.dumps(out))
"""


def sparse_linear_model(path: Path, op: str = "LynxSparseLinear", **wrong: Any) -> tuple[Path, int]:
    """A model of one node; ``wrong`` overrides a dimension, a dtype or an attribute."""
    dtype = wrong.get("dtype", TensorProto.BFLOAT16)
    channels, out_channels, rank = (  # x: of them, or as wide as its tensor is
        wrong.get("channels", 192),
        wrong.get("out_channels", 576),
        wrong.get("rank", 16),
    )
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "x": (dtype, [2, "length", wrong.get("x_channels", channels)]),
        "weight": (
            wrong.get("weight_dtype", dtype),
            [out_channels, wrong.get("width", padded_width(channels, rank))],
        ),
        "lora_down": (dtype, [wrong.get("down_rows", max(rank, 1)), channels]),
        "bias": (dtype, [wrong.get("bias", out_channels)]),
    }
    attributes: dict[str, int | float] = {"rank": rank, "norm_scale": 1}
    attributes |= {"activation": 0, "activation_from": 0}
    if op == "LynxNormSparseLinear":
        shapes["gain"] = (wrong.get("gain_dtype", dtype), wrong.get("gain", [2, 1, channels]))
        shapes["shift"] = (dtype, wrong.get("shift", [2, 1, channels]))
        attributes |= {"rms": 0, "epsilon": 1e-6}
    if op == "LynxGatedSparseLinear":
        shapes["gate"] = (dtype, [2, "length", wrong.get("gate_channels", channels)])
        attributes |= {"producer_activation": 3, "halves": 0}
    if op == "LynxGeluSparseLinear":
        attributes |= {"producer_activation": 1}
    for name in wrong.get("without", ()):
        del shapes[name]
    attributes |= wrong.get("attributes", {})
    output = (dtype, [2, "length", out_channels])
    return save_model(path, op, shapes, attributes, output), shapes["x"][1][-1]


def sparse_weight_model(path: Path, op: str = "LynxSparseWeightLinear", **wrong: Any) -> tuple[Path, int]:
    """The same for the op whose weights are sparse."""
    dtype, channels, out_channels = TensorProto.BFLOAT16, wrong.get("channels", 192), 576
    padded = -(-out_channels // STEP) * STEP
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "x": (dtype, [2, "length", channels]),
        "values": (wrong.get("values_dtype", dtype), wrong.get("values", [padded, channels // 2])),
        "metadata": (
            wrong.get("metadata_dtype", TensorProto.INT32),
            wrong.get("metadata", [channels // STEP, padded // STEP, 2 * STEP]),
        ),
        "bias": (dtype, wrong.get("bias", [out_channels])),
    }
    attributes = {"metadata_layout": 80, "out_channels": out_channels, "activation": 0, "activation_from": 0}
    attributes |= {"gated": 0} | wrong.get("attributes", {})
    y_channels = wrong.get("y_channels", out_channels)
    return save_model(path, op, shapes, attributes, (dtype, [2, "length", y_channels])), channels


def save_model(
    path: Path,
    op: str,
    shapes: dict[str, tuple[int, list[int | str]]],
    attributes: dict[str, int | float],
    output: tuple[int, list[int | str]],
) -> Path:
    inputs = [oh.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()]
    node = oh.make_node(op, list(shapes), ["y"], domain="lynx")
    marks = {"plugin_namespace": "lynx", "plugin_version": "1"}
    node.attribute.extend(oh.make_attribute(name, value) for name, value in (attributes | marks).items())
    graph = oh.make_graph([node], "node", inputs, [oh.make_tensor_value_info("y", *output)])
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid("lynx", 1)]
    onnx.save(oh.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def build(path: Path, op: str = "LynxSparseLinear", **wrong: Any) -> dict[str, Any]:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    for file in (LIBRARY, ALIAS):
        if not file.exists():
            pytest.skip(f"{file.name} is not built (cmake -S plugins -B build/plugin)")
    make = sparse_weight_model if op == "LynxSparseWeightLinear" else sparse_linear_model
    model, channels = make(path / "node.onnx", op, **wrong)
    command = [sys.executable, "-c", PROBE, str(model), str(LIBRARY), str(ALIAS), str(channels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def holds(*, fp16: bool, layout: int) -> bool:
    """Whether the library was built with these kernels."""
    return bool(ctypes.CDLL(str(LIBRARY)).lynx_holds(int(fp16), layout))


GELU_FROM_64 = {"activation": 1, "activation_from": 64}
GATED_FROM_64 = {"activation": 3, "activation_from": 64, "gated": 1}
NORM, GELU, GATED, WEIGHT = (
    f"Lynx{kind}Linear" for kind in ("NormSparse", "GeluSparse", "GatedSparse", "SparseWeight")
)


@pytest.mark.parametrize(
    ("op", "good"),
    [
        ("LynxSparseLinear", {}),
        ("LynxSparseLinear", {"dtype": TensorProto.FLOAT16, "rank": 0}),
        ("LynxSparseLinear", {"channels": 3072, "rank": 128, "attributes": GELU_FROM_64}),
        (NORM, {}),
        (NORM, {"gain": [192], "shift": [1, 192], "dtype": TensorProto.FLOAT16}),
        (NORM, {"rank": 0, "attributes": GELU_FROM_64 | {"rms": 1, "epsilon": 1e-5}}),
        (GELU, {}),
        (GELU, {"channels": 12288, "dtype": TensorProto.FLOAT16, "attributes": {"producer_activation": 2}}),
        (GATED, {}),
        (GATED, {"channels": 3072, "rank": 128, "attributes": {"producer_activation": 2}}),
        (GATED, {"x_channels": 384, "gate_channels": 384, "attributes": {"halves": 2}}),
        (WEIGHT, {}),
        (WEIGHT, {"y_channels": 320, "attributes": GATED_FROM_64}),
        (WEIGHT, {"attributes": GELU_FROM_64 | {"metadata_layout": 90}}),
    ],
)
def test_node_builds_without_a_gpu(tmp_path: Path, op: str, good: dict[str, Any]) -> None:
    dtype, layout = good.get("dtype"), good.get("attributes", {}).get("metadata_layout", 80)
    found = build(tmp_path, op, **good)
    if not holds(fp16=dtype == TensorProto.FLOAT16, layout=layout):  # built with less
        assert found["engine"] is None and "the plugin library was built without" in found["errors"][0]
        return
    assert found["layers"] == ["LayerType.PLUGIN_V3"]
    assert found["shape"] == [2, -1, good.get("y_channels", 576)]
    assert found["engine"] and found["errors"] == []


@pytest.mark.parametrize(
    ("op", "wrong", "reason"),
    [
        ("LynxSparseLinear", {"channels": 200}, "x has 200 channels, not a multiple of 16"),
        ("LynxSparseLinear", {"out_channels": 12}, "weight has 12 rows, not a multiple of 8"),
        ("LynxSparseLinear", {"width": 192}, "weight has 192 columns where 256 are due"),
        ("LynxSparseLinear", {"down_rows": 8}, "lora_down has 8 rows where 16 are due"),
        ("LynxSparseLinear", {"bias": 8}, "bias has 8 elements where 576 are due"),
        ("LynxSparseLinear", {"rank": 24}, "rank is 24"),
        ("LynxSparseLinear", {"dtype": TensorProto.FLOAT}, "x is neither bf16 nor fp16"),
        ("LynxSparseLinear", {"weight_dtype": TensorProto.FLOAT16}, "weight has the wrong dtype"),
        ("LynxSparseLinear", {"attributes": {"activation": 3}}, "activation is 3"),
        (
            "LynxSparseLinear",
            {"attributes": {"activation": 1, "activation_from": 32}},
            "activation_from is 32",
        ),
        (
            "LynxSparseLinear",
            {"attributes": {"activation": 1, "activation_from": 576}},
            "activation_from is 576",
        ),
        (NORM, {"gain": [2, 1, 96], "shift": [2, 1, 96]}, "gain has 96 channels where 192 are due"),
        (NORM, {"shift": [2, 1, 96]}, "shift has 96 channels where 192 are due"),
        (NORM, {"shift": [1, 1, 192]}, "shift has 1 rows where 2 are due"),
        (NORM, {"gain": [7, 1, 192], "shift": [7, 1, 192]}, "gain has 7 rows for"),
        (NORM, {"gain_dtype": TensorProto.FLOAT16}, "gain has the wrong dtype"),
        (NORM, {"without": ["shift"]}, "the node has 5 inputs instead of 6"),
        (NORM, {"attributes": {"rms": 2}}, "rms is 2"),
        (NORM, {"attributes": {"epsilon": 0.0}}, "epsilon is not positive"),
        (GELU, {"width": 192}, "weight has 192 columns where 256 are due"),
        (GATED, {"gate_channels": 96}, "gate has 96 channels where 192 are due"),
        (GATED, {"x_channels": 385, "gate_channels": 385, "attributes": {"halves": 1}}, "no two halves"),
        (GATED, {"x_channels": 384, "attributes": {"halves": 1}}, "gate has 192 channels where 384 are due"),
        (GATED, {"attributes": {"halves": 3}}, "halves is 3"),
        (GATED, {"attributes": {"producer_activation": 4}}, "producer_activation is 4"),
        (GELU, {"attributes": {"producer_activation": 3}}, "producer_activation is 3"),
        (GATED, {"without": ["gate"]}, "the node has 4 inputs instead of 5"),
        (WEIGHT, {"channels": 96}, "x has 96 channels, not a multiple of 64"),
        (WEIGHT, {"values": [576, 192]}, "values has 192 columns where 96 are due"),
        (WEIGHT, {"values": [512, 96]}, "values has 512 rows where 576 are due"),
        (WEIGHT, {"metadata": [3, 8, 128]}, "metadata has 8 blocks of 64 rows where 9 are due"),
        (WEIGHT, {"metadata": [27, 128]}, "metadata has not 3 dimensions"),
        (WEIGHT, {"bias": [8]}, "bias has 8 elements where 576 are due"),
        (WEIGHT, {"values_dtype": TensorProto.FLOAT16}, "values has the wrong dtype"),
        (WEIGHT, {"metadata_dtype": TensorProto.INT64}, "metadata has the wrong dtype"),
        (WEIGHT, {"attributes": {"metadata_layout": 86}}, "metadata_layout is 86"),
        (WEIGHT, {"attributes": {"out_channels": 12}}, "out_channels is 12, not a multiple of 8"),
        (WEIGHT, {"attributes": {"activation": 1, "activation_from": 8}}, "activation_from is 8"),
        (WEIGHT, {"attributes": {"activation": 3}}, "activation is 3"),
        (WEIGHT, {"attributes": {"gated": 1}}, "activation is 0"),
        (WEIGHT, {"attributes": GATED_FROM_64 | {"out_channels": 568}}, "gated rows are 504"),
    ],
)
def test_wrong_nodes_are_refused_with_a_reason(
    tmp_path: Path, op: str, wrong: dict[str, Any], reason: str
) -> None:
    found = build(tmp_path, op, **wrong)
    assert found["engine"] is None
    assert any(reason in error and error.startswith(f"{op}: ") for error in found["errors"]), found["errors"]
