# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT is taken, and what is said when it or the plugin library cannot be."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lynx_compile.engine import trt
from lynx_compile.errors import EngineError, InputError
from lynx_compile.ops import functions
from lynx_compile.passes.rewrite import LynxOnnx
from lynx_compile.recipe import GPU_TARGETS

Script = Callable[[str, LynxOnnx, Path], list[str]]


@pytest.fixture(autouse=True)
def forget_backends() -> None:
    """The backends are made once per process; here with other modules in their place."""
    trt._backend.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *, tensorrt: bool, gpu: str | None) -> list[str]:
    """Pretend that tensorrt is there or not, with a GPU or not; returns the list of what is imported."""
    imported: list[str] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (object() if tensorrt else None) if name == "tensorrt" else find(name),
    )
    monkeypatch.setattr(trt, "gpu", lambda: gpu)
    real = importlib.import_module("tensorrt_rtx")
    stand_in = SimpleNamespace(__version__="11.4.0.106", ILogger=real.ILogger)

    def import_module(name: str) -> object:
        imported.append(name)
        return real if name == "tensorrt_rtx" else stand_in

    monkeypatch.setattr(importlib, "import_module", import_module)
    return imported


@pytest.mark.parametrize(
    ("choice", "tensorrt", "gpu", "taken"),
    [
        ("auto", True, "sm90", "tensorrt"),
        ("auto", True, None, "tensorrt_rtx"),
        ("auto", False, None, "tensorrt_rtx"),
        ("auto", False, "sm89", "tensorrt_rtx"),
        ("tensorrt_rtx", False, "sm90", "tensorrt_rtx"),
        ("tensorrt_rtx", True, "sm90", "tensorrt_rtx"),
        ("tensorrt", True, "sm90", "tensorrt"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, choice: str, tensorrt: bool, gpu: str | None, taken: str
) -> None:
    imported = install(monkeypatch, tensorrt=tensorrt, gpu=gpu)
    assert trt.backend(choice).name == taken
    assert imported == [taken]


@pytest.mark.parametrize("gpu", ["sm90", "sm100", "sm75"])
def test_a_gpu_that_no_installed_tensorrt_builds_for_is_said(
    monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    install(monkeypatch, tensorrt=False, gpu=gpu)
    message = (
        rf"run on this machine's GPU \({gpu}\): TensorRT for RTX builds for sm80, .*pip install tensorrt-cu13"
    )
    with pytest.raises(InputError, match=message):
        trt.backend("auto")


def test_rtx_has_the_targets_of_a_recipe() -> None:
    assert trt.RTX_GPUS == GPU_TARGETS
    capability = trt.backend("tensorrt_rtx").module.ComputeCapability
    assert all(hasattr(capability, gpu.upper()) for gpu in trt.RTX_GPUS) and not hasattr(capability, "SM90")


def test_tensorrt_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt=True, gpu=None)
    with pytest.raises(InputError, match=r"there is none. Set backend: tensorrt_rtx"):
        trt.backend("tensorrt")


def test_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        InputError, match=r"tensorrt_rtx is not installed. Run: pip install tensorrt-rtx-cu13"
    ):
        trt.backend("tensorrt_rtx")


def test_broken_package_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(InputError, match=r"cannot be loaded \(libtensorrt_rtx.so.1: cannot open"):
        trt.backend("tensorrt_rtx")


@pytest.mark.parametrize("version", ["1.6.1.120", "0.9", "1.0rc1"])
def test_old_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__=version))
    with pytest.raises(
        InputError, match=rf"{version} is too old. Run: pip install -U 'tensorrt-rtx-cu13>=1.7'"
    ):
        trt.backend("tensorrt_rtx")


def test_backend_is_made_once() -> None:
    assert trt.backend("tensorrt_rtx") is trt.backend("tensorrt_rtx")


def test_messages(caplog: pytest.LogCaptureFixture) -> None:
    backend = trt.backend("tensorrt_rtx")
    severity = backend.module.ILogger.Severity
    backend.messages.clear()
    with caplog.at_level(logging.INFO, "lynx_compile.tensorrt"):
        for number in range(20):
            backend.messages.log(severity.ERROR, f"fault {number}.\n  more of it")
        backend.messages.log(severity.WARNING, "careful")
        backend.messages.log(severity.VERBOSE, "chatter")
    assert trt.said(backend).startswith(" TensorRT says: fault 12. more of it; ")
    assert trt.said(backend).endswith("; fault 19. more of it.")
    levels = {record.message: record.levelno for record in caplog.records}
    assert levels["careful"] == logging.WARNING
    assert "chatter" not in levels
    backend.messages.clear()
    assert trt.said(backend) == ""


def test_errors_belong_to_the_thread_that_called() -> None:
    """One that comes in a thread of TensorRT's own may be of any call."""
    backend = trt.backend("tensorrt_rtx")
    error = backend.module.ILogger.Severity.ERROR
    there: list[str] = []

    def call() -> None:
        backend.messages.clear()
        backend.messages.log(error, "of the other thread.")
        there.append(trt.said(backend))

    def in_thread(work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    backend.messages.clear()
    in_thread(call)
    backend.messages.log(error, "of this one.")
    assert there == [" TensorRT says: of the other thread."]
    assert trt.said(backend) == " TensorRT says: of this one."
    in_thread(lambda: backend.messages.log(error, "of a worker"))
    assert trt.said(backend) == " TensorRT says: of this one; of a worker."


def test_installed_library() -> None:
    library = trt.plugin_library()
    assert library.path == trt.LIBRARIES / "liblynx_plugin.so"
    assert library.sha256 == hashlib.sha256(library.path.read_bytes()).hexdigest()


def test_missing_library_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.so does not exist. Check 'engine.plugin'"):
        trt.plugin_library(str(tmp_path / "nowhere.so"))


def test_missing_installed_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt, "LIBRARIES", tmp_path)
    with pytest.raises(EngineError, match=r"liblynx_plugin.so is missing. Reinstall lynx-compile"):
        trt.plugin_library()


def test_another_library_is_refused_once_one_is_loaded() -> None:
    backend = trt.backend("tensorrt_rtx")
    library = trt.plugin_library()
    trt.load_plugin(backend, library)
    trt.load_plugin(backend, library)
    with pytest.raises(EngineError, match="already loaded another LynxSparseLinear plugin"):
        trt.load_plugin(backend, trt.PluginLibrary(library.path, "0" * 64))


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (
            {"LynxNothing": ()},
            r"liblynx_plugin.so holds no LynxNothing version 1 plugin. Build the library again",
        ),
        (
            {"LynxSparseLinear": ("rank", "colour")},
            "the LynxSparseLinear plugin in .* does not know 'colour'. Build",
        ),
    ],
)
def test_a_library_that_lacks_what_the_model_needs_is_refused(needed: dict, message: str) -> None:  # type: ignore[type-arg]
    """A plugin or a field of it; also when the library is loaded already."""
    backend, library = trt.backend("tensorrt_rtx"), trt.plugin_library()
    trt.load_plugin(backend, library, {"LynxSparseLinear": ("rank", "norm_scale")})
    with pytest.raises(EngineError, match=message):
        trt.load_plugin(backend, library, needed)


@pytest.mark.parametrize(
    ("choice", "gpu", "layout"),
    [
        ("tensorrt", "sm90", 90),
        ("tensorrt", "sm89", 80),
        ("tensorrt", "sm120", 80),
        ("tensorrt_rtx", "sm90", 80),
    ],
)
def test_metadata_layout_is_that_of_the_gpu_built_for(
    monkeypatch: pytest.MonkeyPatch, choice: str, gpu: str, layout: int
) -> None:
    """TensorRT for RTX has no sm90 target: there the file is for mma.sp whatever GPU is in the machine."""
    install(monkeypatch, tensorrt=True, gpu=gpu)
    assert trt.metadata_layout(trt.backend(choice)) == layout


LOAD = """
try:
    trt.load_plugin(trt.backend("tensorrt_rtx"), trt.plugin_library(str(output)))
except LynxError as error:
    print(error)
"""


def test_file_that_is_no_library(tmp_path: Path, lynx: LynxOnnx, script: Script) -> None:
    text, elf = tmp_path / "text.so", tmp_path / "elf.so"
    text.write_text("no library")
    elf.write_bytes(b"\x7fELF, but no library")
    for path, message in (
        (text, f"{text} is no plugin library of lynx-compile."),
        (elf, f"The plugin library {elf} cannot be loaded ({elf}: "),
    ):
        said = subprocess.run(script(LOAD, lynx, path), capture_output=True, text=True, check=True).stdout
        assert message in said


def test_library_without_the_plugin(lynx: LynxOnnx, script: Script) -> None:
    path = trt.LIBRARIES / "rtx_alias" / "libtensorrt_rtx.so"
    said = subprocess.run(script(LOAD, lynx, path), capture_output=True, text=True, check=True).stdout
    assert f"{path} is no plugin library of lynx-compile." in said


def test_every_op_has_a_plugin_and_a_function() -> None:
    """The names stand in two places: engines are loaded where there is no torch, which ``functions`` needs."""
    assert set(trt.PLUGIN_NAMES) == set(functions.FUNCTIONS)
    assert (trt.PLUGIN_VERSION, trt.PLUGIN_NAMESPACE) == (functions.OP_VERSION, functions.DOMAIN)


def test_full_tensorrt_finds_the_plugins(lynx: LynxOnnx, tmp_path: Path, script: Script) -> None:
    """TensorRT 11's own plugin registry, from the lean runtime's wheel, with the same code."""
    pytest.importorskip("tensorrt_lean_bindings")
    code = """
import tensorrt_lean_bindings as module
backend = trt.Backend(module, "tensorrt", module.__version__, trt._message_log(module))
registry = module.get_plugin_registry()
print([name for name in trt.PLUGIN_NAMES if trt._creator(registry, name)])
activation = ("activation", "activation_from")
needed = dict.fromkeys(trt.PLUGIN_NAMES, activation) | {"LynxNormSparseLinear": (*activation, "rms", "epsilon")}
trt.load_plugin(backend, trt.plugin_library(), needed)
for name in trt.PLUGIN_NAMES:
    print(registry.get_creator(name, "1", "lynx").name)
"""
    done = subprocess.run(script(code, lynx, tmp_path), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", *trt.PLUGIN_NAMES], done.stderr
    assert done.returncode == 0, done.stderr
