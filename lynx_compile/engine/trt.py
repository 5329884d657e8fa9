# SPDX-License-Identifier: Apache-2.0
"""TensorRT as a value: ``tensorrt`` or ``tensorrt_rtx``, its log, and the plugin library loaded into it.

The two modules have one API as far as it is used here (``tests/engine/test_api.py`` checks every name), so
the rest of the package takes the module from ``Backend`` and imports neither.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import re
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lynx_compile.errors import EngineError, InputError
from lynx_compile.files.digest import file_digest

PLUGIN_NAMES = (
    "LynxSparseLinear",
    "LynxNormSparseLinear",
    "LynxGeluSparseLinear",
    "LynxGatedSparseLinear",
    "LynxSparseWeightLinear",
    "LynxFp8Linear",
    "LynxNormFp8Linear",
    "LynxGeluFp8Linear",
    "LynxGatedFp8Linear",
    "LynxFp8SparseWeightLinear",
    "LynxNormFp8SparseWeightLinear",
    "LynxGeluFp8SparseWeightLinear",
    "LynxGatedFp8SparseWeightLinear",
)
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = "lynx"
EXPORTED = "lynx_sparse_linear"  # by every plugin library
LIBRARY = "liblynx_plugin.so"
LIBRARIES = Path(__file__).resolve().parents[1] / "lib"

PIP_PACKAGE = {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"}
RTX_GPUS = (
    "sm80",
    "sm86",
    "sm89",
    "sm120",
)  # of those that TensorRT for RTX builds for, what the plugin knows
OLDEST = {
    "tensorrt": (10, 13),
    "tensorrt_rtx": (1, 7),
}  # the first with every function used here; tested: 11.4, 1.7

DTYPE_NAMES = {"HALF": "fp16", "FLOAT": "fp32"}  # TensorRT's names where they are not ours
_CHOSEN = "Check 'engine.plugin', or leave it out."
_REBUILD = "Build the library again from this version of lynx-compile."

log = logging.getLogger("lynx_compile.tensorrt")


@dataclass(frozen=True)
class Backend:
    """A TensorRT: ``module`` (its Python API), ``name`` and ``version``, and ``messages``, its logger."""

    module: ModuleType
    name: str
    version: str
    messages: Any

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds without a GPU, for several GPU architectures at once."""
        return self.name == "tensorrt_rtx"


@dataclass(frozen=True)
class PluginLibrary:
    """The plugin library's file."""

    path: Path
    sha256: str


def backend(choice: str = "auto") -> Backend:
    """The TensorRT that the recipe asks for; one object per process and TensorRT.

    Args:
        choice: ``tensorrt``, ``tensorrt_rtx``, or ``auto``: the first where it and a GPU are there, else
            the second.

    Raises:
        InputError: it is not installed, cannot be loaded, is too old, or has no GPU where it needs one; or ``auto``
            leaves one that cannot build for the GPU that is here.
    """
    if choice == "auto":
        here = gpu()
        choice = "tensorrt" if importlib.util.find_spec("tensorrt") and here else "tensorrt_rtx"
        if choice == "tensorrt_rtx" and here is not None and here not in RTX_GPUS:
            raise InputError(
                f"No TensorRT is installed whose engines run on this machine's GPU ({here}): TensorRT for RTX builds "
                f"for {', '.join(RTX_GPUS)}.",
                f"Run: pip install {PIP_PACKAGE['tensorrt']}; or set engine.backend: tensorrt_rtx to build for those.",
            )
    elif choice == "tensorrt" and importlib.util.find_spec("tensorrt") and not gpu():
        raise InputError(
            "TensorRT builds on the GPU that it builds for, and there is none.", "Set backend: tensorrt_rtx."
        )
    return _backend(choice)


def plugin_library(chosen: str | None = None) -> PluginLibrary:
    """The plugin library that the recipe names, else the installed one.

    Raises:
        InputError: the file does not exist, or is no plugin library. EngineError: the installed one does not exist.
    """
    if chosen is None:
        return PluginLibrary(path := _shipped(LIBRARY), file_digest(path))
    path = Path(chosen)
    if not path.is_file():
        raise InputError(f"The plugin library {path} does not exist.", _CHOSEN)
    _check_library(path)
    return PluginLibrary(path, file_digest(path))


def dtype_name(data_type: Any) -> str:
    """Our name of a TensorRT ``DataType``."""
    name: str = data_type.name
    return DTYPE_NAMES.get(name, name.lower())


def metadata_layout(backend: Backend) -> Literal[80, 90]:
    """How 2:4 metadata lie for what ``backend`` builds for: 90 on Hopper, which TensorRT for RTX does not target."""
    return 90 if not backend.ahead_of_time and gpu() == "sm90" else 80


def build_gpu(backend: Backend) -> str | None:
    """The GPU that ``backend`` builds for and no other; None for TensorRT for RTX, whose targets the recipe names."""
    return None if backend.ahead_of_time else f"{gpu()} {_gpu_name()}"


def load_plugin(
    backend: Backend, library: PluginLibrary, needed: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Load ``library`` into TensorRT's plugin registry. It stays there as long as the process lives.

    Args:
        needed: names of plugins that it must hold, each with fields that the plugin must know; TensorRT drops
            a node's other attributes without a word.

    Raises:
        EngineError: the library cannot be loaded, lacks what is needed, or another one is loaded already.
    """
    if library.sha256 != _loaded.get(backend.name):
        _load(backend, library, backend.module.get_plugin_registry())
    for name, fields in (needed or {}).items():
        creator = _creator(backend.module.get_plugin_registry(), name)
        if creator is None:
            cause = f"{library.path} holds no {name} version {PLUGIN_VERSION} plugin.{said(backend)}"
            raise EngineError(cause, _REBUILD)
        if lacking := set(fields) - {field.name for field in creator.field_names}:
            cause = f"the {name} plugin in {library.path} does not know '{min(lacking)}'."
            raise EngineError(cause, _REBUILD)


def said(backend: Backend) -> str:
    """The errors of this thread's last call of TensorRT, as the end of a sentence; empty when there are none."""
    lines = [" ".join(line.split()) for line in backend.messages.errors if "--- " not in line]
    return f" TensorRT says: {'; '.join(line.rstrip('.') for line in lines)}." if lines else ""


def gpu() -> str | None:
    """Architecture of the first NVIDIA GPU, such as ``sm90``; None when there is no GPU or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in (
        (major, 75),
        (minor, 76),
    ):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"sm{major.value}{minor.value}"


def _check_library(path: Path) -> None:
    """Opening it is what a build does too, hours later."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        held = magic == b"\x7fELF" and hasattr(ctypes.CDLL(str(path)), EXPORTED)
    except OSError as error:
        raise InputError(f"The plugin library {path} cannot be loaded ({error}).", _CHOSEN) from None
    if not held:
        raise InputError(f"{path} is no plugin library of lynx-compile.", _CHOSEN)


def _gpu_name() -> str:
    driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return "unknown"
    return name.value.decode(errors="replace")


_loaded: dict[str, str] = {}  # backend name: SHA-256 of the plugin library in its registry


def _load(backend: Backend, library: PluginLibrary, registry: Any) -> None:
    if loaded := [name for name in PLUGIN_NAMES if _creator(registry, name) is not None]:
        cause = f"this process has already loaded another {loaded[0]} plugin than {library.path}."
        raise EngineError(cause, "Use one library per process.")
    if backend.name == "tensorrt_rtx":
        # Its ONNX parser aborts the process without a "libtensorrt_rtx.so", which its wheel does not ship.
        _open(_shipped("rtx_alias/libtensorrt_rtx.so"))
    _open(library.path)  # the registry itself does not say why a library cannot be loaded
    backend.messages.clear()
    registry.load_library(str(library.path))
    if not any(_creator(registry, name) for name in PLUGIN_NAMES):
        cause = f"{library.path} holds no {PLUGIN_NAMES[0]} version {PLUGIN_VERSION} plugin.{said(backend)}"
        raise EngineError(cause, _REBUILD)
    _loaded[backend.name] = library.sha256


@cache
def _backend(name: str) -> Backend:
    package = PIP_PACKAGE[name]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        raise InputError(
            f"The Python package {name} is not installed.", f"Run: pip install {package}"
        ) from None
    except (ImportError, OSError) as error:
        reinstall = f"Run: pip install --force-reinstall {package}"
        raise InputError(f"The Python package {name} cannot be loaded ({error}).", reinstall) from None
    version = str(module.__version__)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST[name]:
        wanted = ".".join(map(str, OLDEST[name]))
        raise InputError(f"{name} {version} is too old.", f"Run: pip install -U '{package}>={wanted}'")
    log.info("%s %s", name, version)
    return Backend(module, name, version, _message_log(module))


def _message_log(module: ModuleType) -> Any:
    """A TensorRT logger that keeps the last errors, for exceptions, and writes to Python's logging.

    ``clear`` begins a call in a thread, and ``errors`` are those since then: of that thread, and of threads without a
    call (TensorRT's own, or the one that a build runs in), which may belong to any.
    """
    severity = module.ILogger.Severity
    levels = {severity.WARNING: logging.WARNING, severity.INFO: logging.INFO, severity.VERBOSE: logging.DEBUG}

    class MessageLog(module.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._lock = threading.Lock()
            self._own = threading.local()
            self._calls: weakref.WeakSet[_Errors] = weakref.WeakSet()  # of threads that live

        def log(self, level: Any, message: str) -> None:
            if level not in levels:
                own = getattr(self._own, "errors", None)
                with self._lock:
                    for call in list(self._calls) if own is None else [own]:
                        call.messages.append(message)
            log.log(
                levels.get(level, logging.INFO), "%s", message
            )  # an error is raised later, not printed twice

        def clear(self) -> None:
            with self._lock:
                self._own.errors = _Errors()
                self._calls.add(self._own.errors)

        @property
        def errors(self) -> tuple[str, ...]:
            with self._lock:
                own = getattr(self._own, "errors", None)
                return () if own is None else tuple(own.messages)

    return MessageLog()


class _Errors:
    """The last errors of one thread's call."""

    def __init__(self) -> None:
        self.messages: deque[str] = deque(maxlen=8)


def _shipped(name: str) -> Path:
    path = LIBRARIES / name
    if not path.is_file():
        raise EngineError(
            f"{path} is missing.", "Reinstall lynx-compile, or run 'make plugin' in its sources."
        )
    return path


def _open(path: Path) -> None:
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"{path} cannot be loaded ({error}).", "Build it again on this machine.") from None


def _creator(registry: Any, name: str) -> Any:
    """The plugin's creator; None when there is none."""
    return registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
