# SPDX-License-Identifier: Apache-2.0
"""Where `make runtime` has put the C++ runtime and its test programs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.native import LIBRARY
from tests.plugins.test_build import ALIAS, sparse_linear_model

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "runtime"


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the test programs; skips where they are not built."""
    folder = BUILD / "tests"
    if not (folder / "runtime_probe").exists():
        pytest.skip("the C++ runtime is not built (make runtime)")
    return folder


def run(*command: str | Path, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout)


def output(*command: str | Path) -> str:
    """What a program that must succeed prints."""
    done = run(*command)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


# Builds one node with TensorRT for RTX, the plugin library inside; in a process of its own, whose registry is fresh.
BUILD_ENGINE = """
import ctypes, sys
import tensorrt_rtx as trt

model, library, alias, channels, path = sys.argv[1:]
ctypes.CDLL(alias, mode=ctypes.RTLD_GLOBAL)
builder = trt.Builder(trt.Logger())
builder.get_plugin_registry().load_library(library)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, trt.Logger())
assert parser.parse_from_file(model)
config = builder.create_builder_config()
config.plugins_to_serialize = [library]
profile = builder.create_optimization_profile()
profile.set_shape("x", *[(2, 8, int(channels))] * 3)
config.add_optimization_profile(profile)
with open(path, "wb") as file:
    file.write(builder.build_serialized_network(network, config))
"""


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real engine of one plugin layer, with what of a manifest the runtime reads."""
    for module in ("tensorrt_rtx", LIBRARY, ALIAS):
        there = module.exists() if isinstance(module, Path) else importlib.util.find_spec(module)
        if not there:
            pytest.skip(f"{module} is not there")
    folder = tmp_path_factory.mktemp("engine")
    path = folder / "node.engine"
    model, channels = sparse_linear_model(folder / "node.onnx")
    output(sys.executable, "-c", BUILD_ENGINE, model, LIBRARY, ALIAS, str(channels), path)
    plan = path.read_bytes()
    digest = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    manifest = {
        "format_version": 2,
        "engine": {"file": path.name, "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()},
        "backend": {"name": "tensorrt_rtx", "version": importlib.import_module("tensorrt_rtx").__version__},
        "gpus": ["sm80", "sm86", "sm89", "sm120"],
        "plugin": {"library": LIBRARY.name, "sha256": digest, "embedded": True},
        "inputs": [],
        "outputs": [],
        "weights": {"mode": "embedded", "file": None, "sha256": None, "tensors": []},
    }
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path
