# SPDX-License-Identifier: Apache-2.0
"""Run an engine: from Python, with neither torch nor diffusers.

    with Engine.open("flux.engine") as engine:
        outputs = engine.run({"hidden_states": ..., ...})

Nothing executable is loaded but the plugin library whose digest the manifest names: everything is checked before
TensorRT sees the engine, of which it is known to load embedded libraries without asking.
"""

from __future__ import annotations

import hashlib
import re
import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lynx_compile.engine import trt
from lynx_compile.engine.arrays import DTYPES, DeviceArray, View, size_of, view
from lynx_compile.engine.cuda import ALIGNMENT, Gpu, Handle, Memory
from lynx_compile.engine.manifest import Manifest, Tensor, runs_on
from lynx_compile.engine.weights import PIECE, open_weights, said, upload
from lynx_compile.errors import EngineError, InputError, first_line
from lynx_compile.files.digest import file_digest
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.progress import Progress

ELF = re.compile(rb"\x7fELF[\x01\x02][\x01\x02]\x01.{2}\x00{7}.{2}(..)", re.DOTALL)  # group 1: the machine
ELF_CUDA = b"\xbe\x00"  # device code; any other machine is a host's


class Engine:
    """An engine in GPU memory, ready to run. Made by ``open``; a context manager that frees everything.

    ``manifest``: all about it. ``inputs``, ``outputs``: name, dtype and shape of what ``run`` takes and returns.
    """

    def __init__(
        self, manifest: Manifest, gpu: Gpu, backend: trt.Backend, loaded: _Loaded, resources: ExitStack
    ) -> None:
        self.manifest = manifest
        self._gpu = gpu
        self._backend = backend
        self._loaded = loaded
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._main: Context | None = None
        self._lock = threading.RLock()
        self._free = weakref.finalize(self, resources.close)

    @classmethod
    def open(cls, path: str | Path, *, device: int = 0, progress: Progress | None = None) -> Engine:
        """Load an engine onto a GPU, with what lies beside it: its manifest and, if external, its weights.

        The plugin library is the one beside the engine if there is one, else the installed one; its digest must
        be the manifest's. What a wrong or damaged file can tell is found before TensorRT reads the engine.

        Args:
            path: the engine; its manifest has the suffix ``.json``.
            device: number of the GPU.
            progress: called with ``engine`` or ``weights``, bytes done and bytes in all.

        Raises:
            InputError: a file is missing, damaged or of another engine; TensorRT, the plugin library or the GPU
                is not what the engine was built for (the message names both sides); or a package is missing.
            EngineError: TensorRT or CUDA fails; GPU memory runs out.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"The engine {path} does not exist.", "Check the path, or compile it.")
        progress = progress or _silent
        files = Outputs.find(path)
        path, manifest = files.engine, Manifest.read(files.manifest)
        if manifest.backend.name == "torch":
            raise InputError(
                f"{path} was compiled for torch, and is no engine.",
                f"Call lynx_compile.apply(pipe.transformer, {path.name!r}).",
            )
        _check_tensors(manifest, path)
        gpu = Gpu(device)
        _check_gpu(manifest, gpu, path)
        backend = trt.backend(manifest.backend.name)
        _check_version(manifest, backend, path)
        library = _plugin_library(manifest, path)
        with ExitStack() as resources, open_weights(path.parent, manifest) as weights:
            plan = _read_plan(path, manifest, progress)
            _check_host_code(path, plan, library)
            trt.load_plugin(backend, library)
            with gpu.current():
                loaded = _deserialize(backend, plan, path)
            resources.callback(loaded.clear)
            del plan
            _check_engine(loaded.cuda_engine, backend, manifest, path)
            if weights is not None:
                memory, loaded.weights = upload(weights, gpu, progress)
                resources.enter_context(memory)
            return cls(manifest, gpu, backend, loaded, resources.pop_all())

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.manifest.outputs

    @property
    def device(self) -> int:
        """Number of the GPU."""
        return self._gpu.index

    def run(
        self, inputs: Mapping[str, Any], *, outputs: Mapping[str, Any] | None = None, stream: Any = None
    ) -> dict[str, Any]:
        """Run it once; see ``Context.run``. Concurrent calls take turns: for more, make contexts."""
        with self._lock:
            if self._main is None:
                self._main = self.context()
        return self._main.run(inputs, outputs=outputs, stream=stream)

    def context(self, *, cuda_graph: bool = False) -> Context:
        """A further execution context: activations of its own, the engine's weights.

        Args:
            cuda_graph: capture a CUDA graph at the first run of each set of input shapes, and replay it from then
                on. Inputs and outputs are then copied on the GPU, since a graph's addresses are fixed.

        Raises:
            EngineError: the engine is closed, or GPU memory runs out.
        """
        with self._lock:
            if not self._free.alive:
                raise _closed()
            context = Context(self, cuda_graph)
            self._contexts.add(context)
            return context

    def close(self) -> None:
        """Free everything: the contexts when their runs are done, then the weights and the engine."""
        with self._lock:
            for opened in list(self._contexts):
                opened.close()
            self._free()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Context:
    """One run at a time of an engine. Made by ``Engine.context``, closed with it at the latest."""

    def __init__(self, engine: Engine, cuda_graph: bool) -> None:
        self.engine = engine
        self._gpu = engine._gpu
        self._graphs = cuda_graph
        self._lock = threading.RLock()
        self._slots: dict[tuple[tuple[int, ...], ...], _Slot] = {}
        self._contexts: list[Any] = []  # TensorRT's: one, or with graphs one for each set of shapes
        self._told: tuple[tuple[int, ...], ...] | None = None  # input shapes, TensorRT
        self._last: int | None = None  # stream of the last run
        with ExitStack() as resources, self._gpu.current():
            resources.callback(self._contexts.clear)
            self._create()
            self._stream = resources.enter_context(self._gpu.stream()).value
            self._done = resources.enter_context(self._gpu.event())
            resources.callback(self._slots.clear)
            self._free = weakref.finalize(self, _finish, resources.pop_all(), self._gpu, self._done)

    def run(
        self, inputs: Mapping[str, Any], *, outputs: Mapping[str, Any] | None = None, stream: Any = None
    ) -> dict[str, Any]:
        """Run the engine once.

        Args:
            inputs: by the names, dtypes and shapes of ``Engine.inputs``: numpy arrays (bf16: ml_dtypes), or
                tensors with DLPack (torch, cupy) in host memory or on the engine's GPU. Contiguous. On the GPU they
                are read where they are, but for those that do not start at a multiple of 256 bytes.
            outputs: arrays of the same kinds to write results into, all of ``Engine.outputs`` or none.
            stream: the CUDA stream to run in: its handle, or a stream of torch or cupy. None: one of our own,
                and the call returns when the results are there. With a stream and everything on the GPU it
                returns at once; until the stream has passed this call, the inputs must stay as they are.

        Returns:
            ``outputs``; else numpy arrays if every input is in host memory, else ``DeviceArray`` for
            ``torch.from_dlpack``.

        Raises:
            InputError: a name is unknown or missing; an array is of the wrong kind, dtype, shape or place.
            EngineError: the engine is closed, TensorRT refuses to run, or CUDA reports an error, be it of
                earlier work.
        """
        with self._lock:
            if not self._free.alive:
                raise _closed()
            handle = self._stream if stream is None else _stream_handle(stream)
            with self._gpu.current():
                given = self._views(inputs, handle)
                if self._last not in (None, handle):
                    self._gpu.follow(handle, self._done)  # activations are shared with the run before
                slot = self._slot(tuple(given[tensor.name].shape for tensor in self.engine.inputs))
                results, places = self._results(outputs, slot, given, handle, stream)
                on_gpu = all(place.on_gpu for place in (*given.values(), *places.values()))
                try:
                    self._run(slot, given, places, handle)
                    self._last = handle
                    self._gpu.record(self._done, handle)
                    if stream is None or not on_gpu:
                        self._gpu.wait(self._done)
                except BaseException:
                    self._drain(handle)  # nothing may be read or written when its owner has the error
                    raise
            return results

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes, by the shapes of all inputs.

        Raises:
            InputError: a shape is not the engine's. EngineError: the engine is closed, or TensorRT refuses a shape.
        """
        with self._lock:
            if not self._free.alive:
                raise _closed()
            _check_names("input", shapes, [tensor.name for tensor in self.engine.inputs])
            for tensor in self.engine.inputs:
                _check_shape(tensor.dtype, shapes[tensor.name], tensor)
            with self._gpu.current():
                return dict(self._slot(tuple(shapes[tensor.name] for tensor in self.engine.inputs)).outputs)

    def close(self) -> None:
        """Free its memory, when a run that is under way is done."""
        with self._lock:
            self._free()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _views(self, inputs: Mapping[str, Any], stream: int) -> dict[str, View]:
        """The inputs, all of them, with the engine's dtypes and shapes."""
        wanted = {tensor.name: tensor for tensor in self.engine.inputs}
        _check_names("input", inputs, wanted)
        views = {name: view(name, inputs[name], self._gpu, stream) for name in wanted}
        for name, tensor in wanted.items():
            _check_view(views[name], tensor)
        return views

    def _create(self) -> Any:
        """A context of TensorRT's with the weights bound."""
        self.engine._backend.messages.clear()
        context = self.engine._loaded.cuda_engine.create_execution_context()
        if context is None:
            raise self._failed("TensorRT cannot create an execution context.", "Free memory on the GPU.")
        self._contexts.append(context)
        for name, address in self.engine._loaded.weights.items():
            self._bind(context, name, address)
        return context

    def _slot(self, shapes: tuple[tuple[int, ...], ...]) -> _Slot:
        """What is kept for these input shapes, of which TensorRT is told.

        A graph is tied to the state of the context that it was captured from, so that each gets its own.
        """
        if (slot := self._slots.get(shapes)) is not None and (self._graphs or shapes == self._told):
            return slot
        _check_lengths(self.engine, shapes)
        context = self._create() if self._graphs and self._slots else self._contexts[0]
        self._told = None
        for tensor, shape in zip(self.engine.inputs, shapes, strict=True):
            if not context.set_input_shape(tensor.name, shape):
                raise self._failed(f"TensorRT refuses the shape {list(shape)} of '{tensor.name}'.")
        if slot is None:
            outputs = {t.name: tuple(context.get_tensor_shape(t.name)) for t in self.engine.outputs}
            for name, shape in outputs.items():
                if -1 in shape:
                    raise self._failed(f"TensorRT does not know the shape of '{name}' before the run.")
            slot = self._slots[shapes] = _Slot(context, outputs)
        self._told = shapes
        return slot

    def _results(
        self,
        outputs: Mapping[str, Any] | None,
        slot: _Slot,
        given: Mapping[str, View],
        handle: int,
        stream: Any,
    ) -> tuple[dict[str, Any], dict[str, View]]:
        """What ``run`` returns, and where in it the elements go."""
        wanted = {tensor.name: tensor for tensor in self.engine.outputs}
        on_gpu = any(input_.on_gpu for input_ in given.values())
        if outputs is None:
            made: dict[str, Any] = {}
            places: dict[str, View] = {}
            for name, shape in slot.outputs.items():
                dtype = wanted[name].dtype
                if on_gpu:
                    memory = self._gpu.memory(size_of(dtype, shape), f"the output '{name}'")
                    ready = None if stream is None else handle
                    made[name] = DeviceArray(memory, dtype, shape, self._gpu, ready)
                    places[name] = View(memory.value, dtype, shape, True, memory)
                else:
                    made[name] = np.empty(shape, DTYPES[dtype].numpy)
                    places[name] = view(name, made[name], self._gpu, handle, write=True)
            return made, places
        _check_names("output", outputs, wanted)
        places = {name: view(name, outputs[name], self._gpu, handle, write=True) for name in wanted}
        for name, place in places.items():
            _check_view(place, wanted[name].model_copy(update={"shape": slot.outputs[name]}))
        return dict(outputs), places

    def _run(self, slot: _Slot, given: dict[str, View], places: dict[str, View], stream: int) -> None:
        """Copy what has to be copied, enqueue, copy back; all in the order of ``stream``."""
        moved = [name for name, place in (given | places).items() if self._graphs or not _is_bindable(place)]
        for name in moved:
            if name not in slot.buffers:
                size = (given | places)[name].size
                slot.buffers[name] = self._gpu.memory(size, f"a buffer for '{name}'")
        for name in moved:
            if name in given and given[name].size:
                self._gpu.copy(slot.buffers[name].value, given[name].address, given[name].size, stream)
        for name, place in (given | places).items():
            self._bind(slot.context, name, slot.buffers[name].value if name in moved else place.address)
        if self._graphs:
            if slot.graph is None:
                slot.graph = self._capture(slot.context, stream)
            self._gpu.launch(slot.graph, stream)
        else:
            self._enqueue(slot.context, stream)
        for name in moved:
            if name in places and places[name].size:
                self._gpu.copy(places[name].address, slot.buffers[name].value, places[name].size, stream)

    def _capture(self, context: Any, stream: int) -> Handle:
        """The engine's work on the bound addresses as a graph, captured in a stream of our own: the caller's may be
        the default one. A plain run comes before it, in which TensorRT finishes what a change of shapes left.
        """
        self._enqueue(context, stream)
        self._gpu.synchronize(stream)
        return self._gpu.capture(self._stream, lambda: self._enqueue(context, self._stream))

    def _enqueue(self, context: Any, stream: int) -> None:
        self.engine._backend.messages.clear()
        if not context.execute_async_v3(stream):
            raise self._failed("TensorRT refuses to run the engine.")

    def _bind(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise self._failed(f"TensorRT refuses the address of '{name}'.")

    def _drain(self, stream: int) -> None:
        with suppress(EngineError):  # the one that leads here says more
            self._gpu.synchronize(stream)

    def _failed(self, cause: str, remedy: str = "See TensorRT's messages in the log.") -> EngineError:
        return EngineError(f"{cause}{trt.said(self.engine._backend)}", remedy)


@dataclass
class _Loaded:
    """TensorRT's objects, and the addresses of the external weights."""

    runtime: Any
    cuda_engine: Any
    weights: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        """The engine goes before the runtime that made it."""
        self.cuda_engine = None
        self.runtime = None


@dataclass
class _Slot:
    """One set of input shapes: its context, the outputs' shapes, buffers for what cannot be bound, the graph."""

    context: Any
    outputs: dict[str, tuple[int, ...]]
    buffers: dict[str, Memory] = field(default_factory=dict)
    graph: Handle | None = None


_FILES = "Copy the engine's files again, all of them, or compile it again."


def _check_tensors(manifest: Manifest, path: Path) -> None:
    for tensor in (*manifest.inputs, *manifest.outputs, *manifest.weights.tensors):
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"The manifest of {path}: '{tensor.name}' has the dtype {tensor.dtype!r:.50}, which this "
                "version does not know.",
                "Update lynx-compile.",
            )


def _check_gpu(manifest: Manifest, gpu: Gpu, path: Path) -> None:
    if not runs_on(manifest, gpu.architecture):
        built = ", ".join(manifest.gpus)
        raise InputError(
            f"{path} was built by {manifest.backend.name} for {built}, and GPU {gpu.index} here is "
            f"{gpu.architecture}, which cannot run that.",
            f"Compile it again for {gpu.architecture} (engine.gpus in the recipe, or backend: tensorrt here).",
        )


def _check_version(manifest: Manifest, backend: trt.Backend, path: Path) -> None:
    """TensorRT runs only engines of its very own version."""
    built = manifest.backend
    if (built.name, built.version) != (backend.name, backend.version):
        raise InputError(
            f"{path} was built by {built.name} {built.version}, and installed is {backend.name} {backend.version}.",
            f"Run: pip install {trt.PIP_PACKAGE[built.name]}=={built.version}, or compile the engine again.",
        )


def _plugin_library(manifest: Manifest, path: Path) -> trt.PluginLibrary:
    """The library beside the engine, else the installed one: whichever, it must be the manifest's."""
    plugin = manifest.plugin
    known = (plugin.version, plugin.namespace) == (trt.PLUGIN_VERSION, trt.PLUGIN_NAMESPACE)
    if unknown := [name for name in plugin.names if not known or name not in trt.PLUGIN_NAMES]:
        raise InputError(
            f"{path} needs the plugin {plugin.namespace}::{unknown[0]} version {plugin.version}, and this "
            f"lynx-compile knows {', '.join(trt.PLUGIN_NAMES)} version {trt.PLUGIN_VERSION} of "
            f"{trt.PLUGIN_NAMESPACE}.",
            "Compile the engine again with this version of lynx-compile.",
        )
    places = (path.with_name(plugin.library), trt.LIBRARIES / trt.LIBRARY)
    found = [trt.PluginLibrary(place, file_digest(place)) for place in places if place.is_file()]
    for library in found:
        if library.sha256 == plugin.sha256:
            return library
    there = " and ".join(f"{library.path} has {library.sha256[:12]}" for library in found)
    raise InputError(
        f"{path} was built with a {plugin.library} of SHA-256 {plugin.sha256[:12]}, and "
        f"{there or f'there is none in {path.parent} and {trt.LIBRARIES}'}.",
        "Put the one that it was built with beside the engine, or compile it again.",
    )


def _read_plan(path: Path, manifest: Manifest, progress: Progress) -> bytearray:
    """The engine's bytes, of the manifest's size and digest; those that TensorRT gets."""
    due = manifest.engine
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size != due.bytes:
                what = "is cut off" if size < due.bytes else "is too long"
                raise InputError(f"{path} {what}: it has {size} of {due.bytes} bytes.", _FILES)
            file.seek(0)
            plan = bytearray(size)
            digest = hashlib.sha256()
            position = 0
            while position < size:
                piece = memoryview(plan)[position : position + PIECE]
                if not (count := file.readinto(piece)):
                    raise InputError(f"{path} was cut off while it was read.", _FILES)
                digest.update(piece[:count])
                position += count
                progress("engine", position, size)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}).", "Check its permissions and its disk."
        ) from None
    except MemoryError:
        raise InputError(
            f"{path} does not fit into memory ({due.bytes / 1e9:.1f} GB).", "Use external weights."
        ) from None
    if digest.hexdigest() != due.sha256:
        raise InputError(f"{path} is damaged, or of another manifest (SHA-256).", _FILES)
    return plan


def _check_host_code(path: Path, plan: bytearray, library: trt.PluginLibrary) -> None:
    """All host code in the engine must be a copy of the plugin library.

    TensorRT loads a library that an engine carries without asking: ``engine_host_code_allowed`` is about lean
    runtimes only (seen in the messages of TensorRT for RTX 1.7 and TensorRT 11.4), of which our engines hold
    none, so that it stays off.
    """
    code = library.path.read_bytes()
    if hashlib.sha256(code).hexdigest() != library.sha256:
        raise InputError(f"{library.path} was changed while it was read.", "Open the engine again.")
    ends = 0
    for match in ELF.finditer(plan):
        if match[1] == ELF_CUDA or match.start() < ends:
            continue
        ends = match.start() + len(code)
        if memoryview(plan)[match.start() : ends] != code:
            raise InputError(
                f"{path} carries host code that is not {library.path.name} of SHA-256 {library.sha256[:12]}.",
                "Do not load it; compile it again.",
            )


def _deserialize(backend: trt.Backend, plan: bytearray, path: Path) -> _Loaded:
    backend.messages.clear()
    try:
        runtime = backend.module.Runtime(backend.messages)
    except Exception as error:  # pybind's word for a null pointer
        raise EngineError(
            f"TensorRT cannot start ({first_line(error):.200}).{trt.said(backend)}",
            "Check the GPU's driver with nvidia-smi.",
        ) from None
    cuda_engine = runtime.deserialize_cuda_engine(plan)
    if cuda_engine is None:
        raise EngineError(
            f"TensorRT cannot load {path}.{trt.said(backend)}",
            "Free memory on the GPU if it says so; else compile the engine again here.",
        )
    return _Loaded(runtime, cuda_engine)


def _check_engine(cuda_engine: Any, backend: trt.Backend, manifest: Manifest, path: Path) -> None:
    """The engine's own inputs and outputs are the manifest's."""
    module = backend.module
    found = {True: set[Tensor](), False: set[Tensor]()}
    for index in range(cuda_engine.num_io_tensors):
        name = cuda_engine.get_tensor_name(index)
        dtype = trt.dtype_name(cuda_engine.get_tensor_dtype(name))
        shape = tuple(cuda_engine.get_tensor_shape(name))
        is_input = cuda_engine.get_tensor_mode(name) == module.TensorIOMode.INPUT
        found[is_input].add(Tensor(name=name, dtype=dtype, shape=shape))
    due = {True: {*manifest.inputs, *manifest.weights.tensors}, False: {*manifest.outputs}}
    for is_input, what in ((True, "input"), (False, "output")):
        for tensor in sorted(found[is_input] ^ due[is_input], key=lambda tensor: tensor.name):
            has = "has an" if tensor in found[is_input] else "has no"
            raise InputError(
                f"{path} {has} {what} '{tensor.name}', {said(tensor)}, unlike its manifest.", _FILES
            )


def _check_names(what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    given, wanted = list(given), list(wanted)
    names = f"This engine's {what}s are {', '.join(wanted)}."
    for name in wanted:
        if name not in given:
            raise InputError(f"The {what} '{name}' is missing.", names)
    for name in given:
        if name not in wanted:
            raise InputError(f"There is no {what} {name!r:.100}.", names)


def _check_view(given: View, wanted: Tensor) -> None:
    if given.dtype != wanted.dtype:
        raise InputError(
            f"'{wanted.name}' is {given.dtype}, and the engine has {said(wanted)}.", "Convert it."
        )
    _check_shape(given.dtype, given.shape, wanted)


def _check_shape(dtype: str, shape: tuple[int, ...], wanted: Tensor) -> None:
    fits = len(shape) == len(wanted.shape) and all(
        due in (extent, -1) for extent, due in zip(shape, wanted.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"'{wanted.name}' is {dtype} {list(shape)}, and the engine has {said(wanted)}.",
            "Give the shapes that the recipe names, or compile again with others.",
        )


def _check_lengths(engine: Engine, shapes: tuple[tuple[int, ...], ...]) -> None:
    given = {tensor.name: shape for tensor, shape in zip(engine.inputs, shapes, strict=True)}
    for length in engine.manifest.lengths:
        found = given[length.tensor][length.axis]
        if not length.smallest <= found <= length.largest:
            raise InputError(
                f"'{length.tensor}' has {found} entries along axis {length.axis}, and the engine is for "
                f"{length.smallest} to {length.largest}.",
                "Give prompts as long as those it was compiled with, or compile with such as this one.",
            )


def _is_bindable(place: View) -> bool:
    return place.on_gpu and place.address % ALIGNMENT == 0


def _stream_handle(stream: Any) -> int:
    """The handle of a stream: a number, or an object of cuda.core, torch or cupy."""
    if hasattr(stream, "__cuda_stream__"):
        stream = stream.__cuda_stream__()[1]
    handle = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if not hasattr(handle, "__int__") or isinstance(handle, bool | float) or int(handle) < 0:
        raise InputError(
            f"{stream!r:.100} is no CUDA stream.", "Give a handle, or a stream of torch or cupy, or None."
        )
    return int(handle)


def _finish(resources: ExitStack, gpu: Gpu, done: Handle) -> None:
    """Wait for the last run, which uses what is freed then."""
    with suppress(EngineError):  # whoever waits for that run is told
        gpu.wait(done)
    resources.close()


def _closed() -> EngineError:
    return EngineError("The engine is closed.", "Open it again.")


def _silent(what: str, done: int, total: int) -> None:
    pass
