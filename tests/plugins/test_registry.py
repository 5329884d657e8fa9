# SPDX-License-Identifier: Apache-2.0
"""The library in the plugin registries of TensorRT for RTX and TensorRT (lean), each in its own process."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lynx_compile.ops.fp8_functions import (
    FP8_GATED_OP,
    FP8_GATED_WEIGHT_OP,
    FP8_GELU_OP,
    FP8_GELU_WEIGHT_OP,
    FP8_NORM_OP,
    FP8_NORM_WEIGHT_OP,
    FP8_OP,
    FP8_WEIGHT_OP,
)

from .native import LIBRARY, PLUGINS, compile_cpp, header_folder

MODULES = ("tensorrt_rtx", "tensorrt_lean_bindings")

# Prints one JSON object: what each creator says of itself, and for which of its attributes a plugin came.
PROBE = """
import importlib, json, sys
import numpy as np

trt = importlib.import_module(sys.argv[1])

class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.errors = []

    def log(self, severity, message):
        if severity == trt.ILogger.ERROR:
            self.errors.append(message)

log = Log()
builder = trt.Builder(log) if hasattr(trt, "Builder") else None
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[2]) is not None

values = []  # a field knows the address of its value alone

def field(name, value):
    real = isinstance(value, float)
    values.append(np.array([value], np.float32 if real else np.int32))
    kind = trt.PluginFieldType.FLOAT32 if real else trt.PluginFieldType.INT32
    return trt.PluginField(name, values[-1], kind)

def created(creator, attributes):
    collection = trt.PluginFieldCollection([field(*item) for item in attributes.items()])
    return creator.create_plugin("linear", collection, trt.TensorRTPhase.BUILD) is not None

def tried(name, all_attributes):
    creator = registry.get_creator(name, "1", "lynx")
    return {
        "name": [creator.name, creator.plugin_version, creator.plugin_namespace],
        "fields": [[field.name, str(field.type).split(".")[-1]] for field in creator.field_names],
        "created": [created(creator, attributes) for attributes in all_attributes],
    }

found = {name: tried(name, attributes) for name, attributes in json.loads(sys.argv[3]).items()}
print(json.dumps({
    "creators": sorted(c.name for c in registry.all_creators if c.plugin_namespace == "lynx"),
    "found": found,
    "errors": [e for e in log.errors if e.startswith("Lynx")],
}))
"""
NONE, NORM, GELU, GATED, WEIGHT = (
    "LynxSparseLinear",
    "LynxNormSparseLinear",
    "LynxGeluSparseLinear",
    "LynxGatedSparseLinear",
    "LynxSparseWeightLinear",
)
FIELDS = [
    "rank",
    "norm_scale",
    "activation",
    "activation_from",
]
FP8 = (FP8_OP, FP8_NORM_OP, FP8_GELU_OP, FP8_GATED_OP)
FP8_WEIGHT = (FP8_WEIGHT_OP, FP8_NORM_WEIGHT_OP, FP8_GELU_WEIGHT_OP, FP8_GATED_WEIGHT_OP)
WEIGHT_FIELDS = ["out_channels", "metadata_layout", "activation", "activation_from", "gated"]
# What a node has that uses none of it.
PLAIN: dict[str, dict[str, int | float]] = {
    **{name: dict.fromkeys(FIELDS, 0) for name in (NONE, NORM, GELU, GATED)},
    WEIGHT: dict.fromkeys(WEIGHT_FIELDS, 0),
    **{name: dict.fromkeys(("prune", "activation", "activation_from", "gated"), 0) for name in FP8},
    **{
        name: dict.fromkeys(("out_channels", "activation", "activation_from", "gated"), 0)
        for name in FP8_WEIGHT
    },
}
for name in (NORM, FP8_NORM_OP, FP8_NORM_WEIGHT_OP):
    PLAIN[name] |= {"rms": 0, "epsilon": 1e-6}
for name in (GELU, FP8_GELU_OP, FP8_GELU_WEIGHT_OP):
    PLAIN[name] |= {"producer_activation": 1}
for name in (GATED, FP8_GATED_OP, FP8_GATED_WEIGHT_OP):
    PLAIN[name] |= {"producer_activation": 3, "halves": 0}
Attributes = dict[str, list[dict[str, int | float]]]  # beside the plain ones
GOOD: Attributes = {
    NONE: [
        {},
        {"rank": 16, "norm_scale": 1},
        {"rank": 128},
        {"activation": 1, "activation_from": 64},
        {"activation": 2, "activation_from": 64},
    ],
    NORM: [{}, {"rank": 64, "rms": 1, "epsilon": 1e-5}],
    GELU: [{}, {"rank": 16}, {"producer_activation": 2}],
    GATED: [
        {},
        {"rank": 16},
        {"producer_activation": 1, "halves": 1},
        {"producer_activation": 2, "halves": 2},
    ],
    WEIGHT: [
        {"metadata_layout": 90, "out_channels": 64},
        {"metadata_layout": 80, "out_channels": 8},
        {"metadata_layout": 80, "out_channels": 96, "activation": 3, "activation_from": 64, "gated": 1},
    ],
    **{
        name: [{}, {"prune": 1, "activation": 2, "activation_from": 64}, {"activation": 3, "gated": 1}]
        for name in FP8
    },
    **{
        name: [
            {"out_channels": 8},
            {"out_channels": 136, "activation": 1, "activation_from": 128},
            {"out_channels": 96, "activation": 3, "activation_from": 64, "gated": 1},
        ]
        for name in FP8_WEIGHT
    },
}
BAD: Attributes = {
    NONE: [
        {"rank": 24},
        {"rank": -16},
        {"rank": 144},
        {"norm_scale": 2},
        {"activation": -1},
        {"activation": 3},
        {"activation_from": -8},
    ],
    NORM: [{"epsilon": 0.0}, {"epsilon": -1e-6}, {"epsilon": float("nan")}, {"rms": 2}],
    GELU: [{"norm_scale": -1}, {"producer_activation": 0}, {"producer_activation": 3}],
    GATED: [
        {"rank": 8},
        {"producer_activation": 0},
        {"producer_activation": 4},
        {"halves": 3},
        {"halves": -1},
    ],
    WEIGHT: [
        {},
        {"metadata_layout": 86, "out_channels": 64},
        {"metadata_layout": 80, "out_channels": 12},
        {"metadata_layout": 80, "out_channels": 64, "activation": 1, "activation_from": 64},
        {"metadata_layout": 80, "out_channels": 64, "activation": 3},
        {"metadata_layout": 80, "out_channels": 64, "activation": 3, "gated": 2},
        {"metadata_layout": 80, "out_channels": 64, "gated": 1},
        {"metadata_layout": 80, "out_channels": 72, "activation": 3, "gated": 1},
    ],
    **{name: [{"prune": 2}, {"activation": 3}, {"activation_from": -8}, {"gated": 1}] for name in FP8},
    **{
        name: [
            {},
            {"out_channels": 12},
            {"out_channels": 64, "activation": 1, "activation_from": 64},
            {"out_channels": 72, "activation": 3, "gated": 1},
        ]
        for name in FP8_WEIGHT
    },
}


def probe(module: str, attributes: Attributes) -> tuple[dict[str, Any], str]:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built (cmake -S plugins -B build/plugin)")
    command = [sys.executable, "-c", PROBE, module, str(LIBRARY), json.dumps(attributes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def with_plain(attributes: Attributes) -> Attributes:
    return {name: [PLAIN[name] | of_one for of_one in of_op] for name, of_op in attributes.items()}


@pytest.mark.parametrize("module", MODULES)
def test_creators_are_found_and_make_plugins(module: str) -> None:
    found, _ = probe(module, with_plain(GOOD))
    assert found["creators"] == sorted(GOOD)
    assert found["errors"] == []
    for name, creator in found["found"].items():
        assert creator["name"] == [name, "1", "lynx"]
        assert creator["fields"] == [
            [field, "FLOAT32" if field == "epsilon" else "INT32"] for field in PLAIN[name]
        ]
        assert creator["created"] == [True] * len(GOOD[name])


@pytest.mark.parametrize("module", MODULES)
def test_bad_attributes_give_no_plugin_and_a_reason(module: str) -> None:
    found, stderr = probe(module, with_plain(BAD))
    reasons = (
        found["errors"] if module == "tensorrt_rtx" else stderr.splitlines()
    )  # lean: no builder, so no logger
    for name, creator in found["found"].items():
        assert creator["created"] == [False] * len(BAD[name])
        assert sum(line.startswith(f"{name}: ") for line in reasons) == len(BAD[name])
    said = [line for line in reasons if line.startswith("Lynx")]
    assert "rank is 24" in said[0] and "multiple of 16" in said[0]
    assert sum("epsilon is not positive" in line for line in said) == 3


@pytest.mark.parametrize("module", MODULES)
def test_a_missing_attribute_is_refused_by_name(module: str) -> None:
    """A default in its place would change results without a word."""
    without = {
        name: [{k: v for k, v in plain.items() if k != lost} for lost in plain]
        for name, plain in PLAIN.items()
    }
    found, stderr = probe(module, without)
    reasons = found["errors"] if module == "tensorrt_rtx" else stderr.splitlines()
    for name, plain in PLAIN.items():
        assert not any(found["found"][name]["created"])
        said = [line for line in reasons if line.startswith(f"{name}: ")]
        assert all(f"{lost} is missing" in line for lost, line in zip(plain, said, strict=True))


def test_reasons_reach_the_loggers_of_tensorrt_10(tmp_path: Path) -> None:
    """Its loggers have another layout than TensorRT 11's: a stand-in, built from its headers, takes the message."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built (cmake -S plugins -B build/plugin)")
    tensorrt = header_folder("NvInferRuntime.h", "kernel_lens/include/tensorrt")
    cuda = header_folder("cuda_runtime_api.h", "nvidia/cu13/include")
    options = ["-O1", "-w", "-shared", "-fPIC", f"-I{tensorrt}", f"-I{cuda}", "-ldl"]
    stand_in = ctypes.CDLL(
        str(compile_cpp(PLUGINS / "tests/tensorrt10.cpp", tmp_path / "trt10.so", *options))
    )
    stand_in.probe.restype = ctypes.c_char_p
    for in_engine in (0, 1):
        said = stand_in.probe(str(LIBRARY).encode(), in_engine).decode()
        assert said.startswith("LynxSparseLinear: attribute norm_scale is missing"), said


def test_library_exports_its_interfaces_alone_and_needs_no_cuda() -> None:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built (cmake -S plugins -B build/plugin)")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True
    )
    assert sorted(line.split()[-1] for line in symbols.stdout.splitlines()) == [
        "getCreators",
        "lynx_abi",
        "lynx_fp8_gemm",
        "lynx_fp8_holds",
        "lynx_fp8_linear",
        "lynx_fp8_product",
        "lynx_fp8_product_bytes",
        "lynx_fp8_round",
        "lynx_fp8_runs",
        "lynx_fp8_tile_count",
        "lynx_fp8_workspace_bytes",
        "lynx_holds",
        "lynx_metadata_layout",
        "lynx_prune",
        "lynx_pruned_gemm",
        "lynx_sparse_linear",
        "lynx_sparse_weight_linear",
        "lynx_tile_count",
        "lynx_weight_workspace_bytes",
        "lynx_workspace_bytes",
        "setLoggerFinder",
    ]
    needed = subprocess.run(["ldd", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed and "nvinfer" not in needed and "not found" not in needed
    assert LIBRARY.stat().st_size < 10 * 2**20
