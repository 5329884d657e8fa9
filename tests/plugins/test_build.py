# SPDX-License-Identifier: Apache-2.0
"""One node through TensorRT for RTX: good shapes build, wrong ones are refused with a reason."""

from __future__ import annotations

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

from lynx_compile.sparsity import padded_width

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
    profile.set_shape("x", (1, 1, int(channels)), (1, 300, int(channels)), (2, 4608, int(channels)))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    out["engine"] = None if engine is None else engine.nbytes
out["errors"] = [e for e in log.errors if e.startswith("LynxSparseLinear")]
print(json.dumps(out))
"""


def node_model(path: Path, **wrong: int) -> tuple[Path, int]:
    """A model of one node; ``wrong`` overrides a dimension or a dtype."""
    dtype = wrong.get("dtype", TensorProto.BFLOAT16)
    channels, out_channels, rank = (
        wrong.get("channels", 192),
        wrong.get("out_channels", 576),
        wrong.get("rank", 16),
    )
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "x": (dtype, ["batch", "length", channels]),
        "weight": (
            wrong.get("weight_dtype", dtype),
            [out_channels, wrong.get("width", padded_width(channels, rank))],
        ),
        "lora_down": (dtype, [max(rank, 1), channels]),
        "bias": (dtype, [wrong.get("bias", out_channels)]),
        "order": (wrong.get("order_dtype", TensorProto.INT32), [channels]),
        "centre": (dtype, [channels]),
        "saliency": (dtype, [channels]),
    }
    inputs = [oh.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()]
    output = oh.make_tensor_value_info("y", dtype, ["batch", "length", out_channels])
    flags = dict.fromkeys(("norm_scale", "has_order", "has_centre", "has_saliency"), 1)
    attributes = {"rank": rank, "plugin_namespace": "lynx", "plugin_version": "1", **flags}
    node = oh.make_node("LynxSparseLinear", list(shapes), ["y"], domain="lynx")
    node.attribute.extend(oh.make_attribute(name, value) for name, value in attributes.items())
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid("lynx", 1)]
    onnx.save(
        oh.make_model(oh.make_graph([node], "node", inputs, [output]), opset_imports=opsets, ir_version=9),
        path,
    )
    return path, channels


def build(path: Path, **wrong: int) -> dict[str, Any]:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    for file in (LIBRARY, ALIAS):
        if not file.exists():
            pytest.skip(f"{file.name} is not built (cmake -S plugins -B build/plugin)")
    model, channels = node_model(path / "node.onnx", **wrong)
    command = [sys.executable, "-c", PROBE, str(model), str(LIBRARY), str(ALIAS), str(channels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "good", [{}, {"dtype": TensorProto.FLOAT16, "rank": 0}, {"channels": 3072, "rank": 128}]
)
def test_node_builds_without_a_gpu(tmp_path: Path, good: dict[str, int]) -> None:
    found = build(tmp_path, **good)
    assert found["layers"] == ["LayerType.PLUGIN_V3"]
    assert found["shape"] == [-1, -1, 576]
    assert found["engine"] and found["errors"] == []


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"channels": 200}, "x has 200 channels, not a multiple of 16"),
        ({"channels": 24592}, "x has 24592 channels and an order"),
        ({"out_channels": 12}, "weight has 12 rows, not a multiple of 8"),
        ({"width": 192}, "weight has 192 columns where 256 are due"),
        ({"bias": 8}, "bias has 8 elements where 576 are due"),
        ({"rank": 24}, "rank is 24"),
        ({"dtype": TensorProto.FLOAT}, "x is neither bf16 nor fp16"),
        ({"weight_dtype": TensorProto.FLOAT16}, "weight has the wrong dtype"),
        ({"order_dtype": TensorProto.INT64}, "order has the wrong dtype"),
    ],
)
def test_wrong_nodes_are_refused_with_a_reason(tmp_path: Path, wrong: dict[str, int], reason: str) -> None:
    found = build(tmp_path, **wrong)
    assert found["engine"] is None
    assert any(reason in error for error in found["errors"]), found["errors"]
