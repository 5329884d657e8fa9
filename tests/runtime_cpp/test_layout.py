# SPDX-License-Identifier: Apache-2.0
"""The tables by which the C++ runtime calls TensorRT 11 and TensorRT for RTX are those of NVIDIA's own bindings.

The bindings are given a library that prints which function they call. (TensorRT 10's table is compared with its
headers, here and by the stand-in of plugins/runtime/tests.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.native import PLUGINS, WARNINGS, compile_cpp, header_folder
from tests.runtime_cpp.conftest import output

SITE = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
BINDINGS = {
    "tensorrt_rtx": (
        SITE / "tensorrt_rtx_bindings",
        ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"],
    ),
    "tensorrt_lean": (SITE / "tensorrt_lean_bindings", ["libnvinfer_lean.so.11"]),
    "tensorrt": (
        Path(sys.prefix) / "trt11" / "tensorrt_bindings",
        ["libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"],
    ),
}

# Each step prints its name; what the library prints until the next one is what it called.
PROBE = """
import importlib.util, os, sys

spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
trt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trt)

def step(name, work):
    print(name, flush=True)
    try:
        return work()
    except Exception:
        return None  # what comes back is no real shape or name

runtime = trt.Runtime(trt.Logger())
engine = step("deserialize", lambda: runtime.deserialize_cuda_engine(b"plan"))
context = step("create_context", lambda: engine.create_execution_context())
step("tensor_count", lambda: engine.num_io_tensors)
step("tensor_name", lambda: engine.get_tensor_name(0))
step("tensor_mode", lambda: engine.get_tensor_mode("x"))
step("tensor_shape", lambda: engine.get_tensor_shape("x"))
step("tensor_dtype", lambda: engine.get_tensor_dtype("x"))
step("set_tensor_address", lambda: context.set_tensor_address("x", 256))
step("set_input_shape", lambda: context.set_input_shape("x", (1, 2)))
step("context_tensor_shape", lambda: context.get_tensor_shape("x"))
step("enqueue", lambda: context.execute_async_v3(0))
step("load_library", lambda: trt.get_plugin_registry().load_library("library"))
print("end", flush=True)
os._exit(0)
"""
CLASS_OF = {"deserialize": "runtime", "load_library": "registry"}
CONTEXT = {"set_tensor_address", "set_input_shape", "context_tensor_shape", "enqueue"}


@pytest.mark.parametrize("module", BINDINGS)
def test_layout_is_that_of_the_bindings(programs: Path, tmp_path: Path, module: str) -> None:
    folder, libraries = BINDINGS[module]
    binding = folder / f"{module}.so"
    if not binding.exists():
        pytest.skip(f"{binding.name} is not installed")
    for name in libraries:
        source = PLUGINS / "runtime/tests/layout_recorder.cpp"
        compile_cpp(source, tmp_path / name, *WARNINGS, "-shared", "-fPIC", f"-Wl,-soname,{name}")
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "LD_PRELOAD": str(tmp_path / libraries[0])}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module, str(binding)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout.endswith("end\n"), done.stdout + done.stderr
    called: dict[str, list[str]] = {}
    for line in done.stdout.splitlines()[:-1]:
        if " " in line:
            called[list(called)[-1]].append(line)
        else:
            called[line] = []
    layout = dict(line.split() for line in output(programs / "runtime_probe", "layout", "11").splitlines())
    assert set(called) == set(layout)
    for name, slot in layout.items():
        table = CLASS_OF.get(name, "context" if name in CONTEXT else "engine")
        assert called[name][-1:] == [f"{table} {slot}"], (name, called[name])


def test_layout_is_that_of_the_headers(programs: Path, tmp_path: Path) -> None:
    """Those at hand, of TensorRT 10.14."""
    headers = header_folder("NvInferRuntime.h", "kernel_lens/include/tensorrt")
    cuda = header_folder("cuda_runtime_api.h", "nvidia/cu13/include")
    source = PLUGINS / "runtime/tests/layout_of_headers.cpp"
    compile_cpp(source, tmp_path / "layout", "-w", f"-I{headers}", f"-I{cuda}")
    assert output(tmp_path / "layout") == output(programs / "runtime_probe", "layout", "10")


@pytest.mark.parametrize(
    ("program", "backend", "version"),
    [("runtime_probe", "tensorrt_rtx", "1.7."), ("runtime_probe_lean", "tensorrt", "11.4.")],
)
def test_the_library_that_was_linked_is_known(
    programs: Path, program: str, backend: str, version: str
) -> None:
    if not (programs / program).exists():
        pytest.skip("TensorRT's lean library is not installed")
    found = output(programs / program, "library").split()
    assert (found[0], found[2]) == (backend, "11") and found[1].startswith(version)
