# SPDX-License-Identifier: Apache-2.0
"""Every TensorRT name that the package uses exists in both APIs.

The names are read from the sources of ``lynx_compile/engine``. TensorRT 11's bindings are real, in a wheel
that ``requirements/tensorrt11.txt`` installs; the libraries behind them are not on PyPI, so stand-ins are
linked that export the functions which the bindings want. None is ever called.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda.bindings import runtime as real_cuda

import lynx_compile.engine
from lynx_compile.engine import cuda as cuda_module
from lynx_compile.recipe import GPU_TARGETS
from tests.engine import fakes

PACKAGE = Path(lynx_compile.engine.__file__).parents[1]
SOURCES = [*sorted((PACKAGE / "engine").glob("*.py")), PACKAGE / "passes" / "build.py"]
TENSORRT11 = Path(os.environ.get("LYNX_TENSORRT11", Path(sys.prefix) / "trt11"))

# What a variable of that name always holds in these sources.
OBJECTS = {
    "module": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "registry": "IPluginRegistry",
    "layer": "IPluginV3Layer",
    "core": "IPluginV3OneCore",
    "data_type": "DataType",
    "severity": "ILogger.Severity",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "cuda_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
RESULTS = {"IPluginV3Layer.plugin": "IPluginV3"}
RTX_ONLY = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}  # used in no other function than _set_targets
FAKED = {
    "Runtime": fakes.Runtime,
    "ICudaEngine": fakes.ICudaEngine,
    "IExecutionContext": fakes.IExecutionContext,
}
NOT_TENSORRT = {"IPluginV3Layer.__class__", "__version__"}


def names_in(source: str) -> set[str]:
    """TensorRT names as paths from the module: ``LayerType.PLUGIN_V3``, ``Builder.create_network`` ..."""
    tree = ast.parse(source)
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Attribute) for name in _path(node)}
    return {name for name in found | set(_overridden(tree)) if name} - NOT_TENSORRT


def _path(node: ast.expr) -> Iterator[str]:
    """The one path that an attribute chain stands for, if it starts from a TensorRT object."""
    if isinstance(node, ast.Name) and node.id in OBJECTS:
        yield OBJECTS[node.id]
    elif isinstance(node, ast.Attribute):
        if (
            node.attr == "module"
            and isinstance(node.value, ast.Name)
            and node.value.id in ("backend", "self")
        ):
            yield ""
        for owner in _path(node.value):
            yield f"{RESULTS.get(owner, owner)}.{node.attr}".lstrip(".")


def _overridden(tree: ast.AST) -> Iterator[str]:
    """Methods of classes derived from TensorRT's, but for those of our own."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for base in (path for expression in node.bases for path in _path(expression)):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            yield from (f"{base}.{name}" for name in methods & CALLBACKS[base])
            assert methods >= CALLBACKS[base], f"{node.name} does not override all that {base} wants"


CALLBACKS = {
    "ILogger": {"log"},
    "IProgressMonitor": {"phase_start", "phase_finish", "step_complete"},
    "IStreamWriter": {"write"},
}
USED = sorted(set().union(*(names_in(path.read_text()) for path in SOURCES)))


def test_names_are_found() -> None:
    """A sample of what the sources are known to use: the search itself works."""
    assert {
        "Builder.build_serialized_network_to_stream",
        "IBuilderConfig.plugins_to_serialize",
        "ILogger.Severity.VERBOSE",
        "INetworkDefinition.num_layers",
        "IPluginRegistry.load_library",
        "IPluginV3.get_capability_interface",
        "IProgressMonitor.step_complete",
        "LayerType.PLUGIN_V3",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse_from_file",
        "PluginCapabilityType.CORE",
        "DataType.name",
        "ICudaEngine.get_tensor_dtype",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_input_shape",
        "Runtime.deserialize_cuda_engine",
        "TensorIOMode.INPUT",
    } <= set(USED)
    assert names_in("builder.nonsense(config.more.nonsense, path.name)") == {
        "Builder.nonsense",
        "IBuilderConfig.more",
        "IBuilderConfig.more.nonsense",
    }


def test_rtx_only_names_stay_in_one_function() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if getattr(node, "name", "") != "_set_targets"]
        assert not names_in(ast.unparse(tree)) & RTX_ONLY


def test_tensorrt_rtx_has_them() -> None:
    import tensorrt_rtx

    assert missing_in(tensorrt_rtx, USED) == []
    assert missing_in(tensorrt_rtx, [f"ComputeCapability.{gpu.upper()}" for gpu in GPU_TARGETS]) == []
    assert missing_in(tensorrt_rtx, ["Builder.nonsense"]) == ["Builder.nonsense"]


def test_tensorrt_11_has_them(tmp_path: Path) -> None:
    if not (TENSORRT11 / "tensorrt_bindings").is_dir():
        pytest.skip(f"no tensorrt_bindings in {TENSORRT11}; see requirements/tensorrt11.txt")
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ for the stand-in libraries")
    asked = [name for name in USED if name not in RTX_ONLY]
    command = [sys.executable, "-c", LOOK_UP, str(TENSORRT11), json.dumps([*asked, "Builder.nonsense"])]
    stand_ins = _stand_ins(compiler, tmp_path)
    done = subprocess.run([*command, *map(str, stand_ins)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, missing = json.loads(done.stdout)
    assert version.startswith("11.")
    assert missing == ["Builder.nonsense"]


def missing_in(module: object, names: list[str]) -> list[str]:
    def has(name: str) -> bool:
        value = module
        for part in name.split("."):
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True

    return [name for name in names if not has(name)]


def _stand_ins(compiler: str, folder: Path) -> list[Path]:
    """Libraries under the names that the bindings were linked against, with the functions that they want."""
    source = folder / "stand_in.cpp"
    functions = (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
    source.write_text("".join(f'extern "C" void* {name}() {{ return nullptr; }}\n' for name in functions))
    libraries = [folder / f"{name}.so.11" for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")]
    for library in libraries:
        link = [compiler, "-shared", "-fPIC", str(source), f"-Wl,-soname,{library.name}", "-o", str(library)]
        subprocess.run(link, check=True)
    return libraries


LOOK_UP = """
import ctypes, json, sys
for library in sys.argv[3:]:
    ctypes.CDLL(library)
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings
missing = []
for name in json.loads(sys.argv[2]):
    value = tensorrt_bindings
    for part in name.split("."):
        if not hasattr(value, part):
            missing.append(name)
            break
        value = getattr(value, part)
print(json.dumps([tensorrt_bindings.__version__, missing]))
"""


# The fakes of the runtime's tests: nothing in them that the real ones lack, and the same arguments.


@pytest.mark.parametrize("name", list(FAKED))
def test_fake_tensorrt_is_like_the_real_one(name: str) -> None:
    import tensorrt_rtx

    real = getattr(tensorrt_rtx, name)
    methods = [key for key, value in vars(FAKED[name]).items() if callable(value) and key[0] != "_"]
    properties = [key for key, value in vars(FAKED[name]).items() if isinstance(value, property)]
    assert missing_in(real, [*methods, *properties]) == []
    used = {path.split(".")[1] for path in USED if path.startswith(f"{name}.")}
    assert used <= {*methods, *properties}, "the runtime uses what the fake lacks"
    for method in methods:
        parameters = list(inspect.signature(getattr(FAKED[name], method)).parameters)
        assert any(_fits(parameters, signature) for signature in _signatures(real, method)), method
    assert not any(callable(getattr(real, key)) for key in properties)


def test_a_drifted_fake_is_noticed() -> None:
    import tensorrt_rtx

    (signature,) = _signatures(tensorrt_rtx.IExecutionContext, "set_tensor_address")
    assert signature == [("self", False), ("name", False), ("memory", False)]
    assert _fits(["self", "name", "memory"], signature)
    assert not _fits(["self", "name"], signature)
    assert not _fits(["self", "name", "address"], signature)
    assert len(_signatures(tensorrt_rtx.IExecutionContext, "set_input_shape")) > 1


def _signatures(owner: type, method: str) -> list[list[tuple[str, bool]]]:
    """Parameters of every overload, (name, has a default), from the docstring of the binding, which has lines such
    as ``1. f(self: T, name: str, shape: tuple) -> bool``.
    """
    text = getattr(owner, method).__doc__
    found = re.findall(rf"^(?:\d+\. )?{method}\((self: .*)\) -> ", text, re.MULTILINE)
    return [
        [(part.split(":")[0].strip(), "=" in part) for part in re.split(r", (?=\w+: )", parameters)]
        for parameters in found
    ]


def _fits(parameters: list[str], signature: list[tuple[str, bool]]) -> bool:
    """Whether a call with these arguments is one of this overload; what is left out has a default."""
    names = [name for name, _ in signature[: len(parameters)]]
    return names == parameters and all(default for _, default in signature[len(parameters) :])


# CUDA: what the sources call, what the fake has, and the real bindings' own signatures.

CUDA_SOURCE = Path(cuda_module.__file__).read_text()


def cuda_calls(source: str) -> dict[str, set[int]]:
    """{function: numbers of arguments it is called with}, for calls of ``cuda.cudaSomething(...)``."""
    calls: dict[str, set[int]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _is_cuda(node.func):
            assert isinstance(node.func, ast.Attribute) and not node.keywords
            calls.setdefault(node.func.attr, set()).add(len(node.args))
    return calls


def _is_cuda(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cuda"


def _declared(name: str) -> list[str]:
    """Parameters from the docstring's first line: ``cudaMemcpyAsync(dst, src, size_t count, kind: T, stream)``."""
    line = getattr(real_cuda, name).__doc__.strip().splitlines()[0]
    inside = line[line.index("(") + 1 : line.rindex(")")]
    return [part.split(":")[0].split()[-1] for part in inside.split(",") if part.strip()]


def test_cuda_is_called_as_it_is_declared() -> None:
    calls = cuda_calls(CUDA_SOURCE)
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaStreamWaitEvent", "cudaGraphLaunch"} <= calls.keys()
    for name, counts in calls.items():
        assert counts == {len(_declared(name))}, name
    tree = ast.walk(ast.parse(CUDA_SOURCE))
    mentioned = {node.attr for node in tree if isinstance(node, ast.Attribute) and _is_cuda(node)}
    assert missing_in(real_cuda, sorted(mentioned)) == []
    passed_on = {"cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaEventDestroy", "cudaGraphExecDestroy"}
    assert passed_on <= mentioned
    assert all(len(_declared(name)) == 1 for name in passed_on), "they are called with the handle"


def test_cuda_is_called_in_one_module() -> None:
    for path in SOURCES:
        assert path.name == "cuda.py" or not cuda_calls(path.read_text()), path


def test_fake_cuda_is_like_the_real_one() -> None:
    faked = {name: value for name, value in vars(fakes.FakeCuda).items() if name.startswith("cuda")}
    assert cuda_calls(CUDA_SOURCE).keys() <= faked.keys()
    for name, function in faked.items():
        parameters = list(inspect.signature(function).parameters)[1:]
        assert parameters == [_snake(parameter) for parameter in _declared(name)], name


def _snake(name: str) -> str:
    return re.sub(r"([A-Z])", lambda match: f"_{match[1].lower()}", name)


def test_constants_of_cuda() -> None:
    """Whole paths such as ``cudaMemcpyKind.cudaMemcpyDefault``, the errors' names, and what an error is."""
    paths = set(re.findall(r"\bcuda\.(cuda\w+(?:\.cuda\w+)*)", CUDA_SOURCE))
    assert "cudaMemcpyKind.cudaMemcpyDefault" in paths
    assert missing_in(real_cuda, sorted(paths)) == []
    for name in (*cuda_module.NO_GPU, *cuda_module.REMEDIES):
        assert getattr(real_cuda.cudaError_t, name).name == name
    error = real_cuda.cudaGetDeviceCount()[0]
    assert int(error) == error.value and error.name.startswith("cuda")
