# SPDX-License-Identifier: Apache-2.0
"""A CUDA and a TensorRT for machines without a GPU, with real memory and real results.

``FakeCuda`` stands in for ``cuda.bindings.runtime``. GPU memory is host memory. Work in a stream is not done before
somebody waits for it, so that a wait which is forgotten shows as a wrong result, as does an order between streams.
Every access is checked against what is allocated. ``FakeTensorRT`` stands in for the TensorRT module; its engines run
an ONNX file in ONNX Runtime. ``test_api.py`` checks both against the real ones' names and arguments.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tensorrt_rtx
from cuda.bindings import runtime as real_cuda

from lynx_compile.engine.arrays import DTYPES

POISON, FREED = 0xAA, 0xDD
Error = real_cuda.cudaError_t
OK = Error.cudaSuccess


@dataclass
class _Stream:
    work: list[Callable[[], None]] = field(default_factory=list)
    capturing: list[Callable[[], None]] | None = None

    def put(self, work: Callable[[], None]) -> None:
        (self.work if self.capturing is None else self.capturing).append(work)

    def drain(self) -> None:
        while self.work:
            self.work.pop(0)()


@dataclass
class _Mark:
    """A place in a stream."""

    stream: _Stream
    passed: bool = False

    def passes(self) -> None:
        self.passed = True

    def wait(self) -> None:
        while not self.passed:
            assert self.stream.work, "waits for what never comes"
            self.stream.work.pop(0)()


@dataclass
class _Event:
    """``mark``: where it was recorded last; who waits for one that never was does not wait."""

    mark: _Mark | None = None


@dataclass
class _Block:
    address: int
    size: int
    kind: str  # "gpu" or "pinned"
    array: Any  # keeps the memory, also when it is freed, so that its poison is seen
    device: int


class FakeCuda:
    """``calls``: names of the functions called. ``fail[name] = (n, error)``: the n-th call from now on fails."""

    def __init__(self, *, architecture: tuple[int, int] = (8, 9), count: int = 1) -> None:
        self.architecture = architecture
        self.count = count
        self.calls: list[str] = []
        self.fail: dict[str, tuple[int, Any]] = {}
        self.device = 0
        self.blocks: dict[int, _Block] = {}
        self.freed: list[_Block] = []
        self.legacy = _Stream()
        self.objects: dict[int, Any] = {}
        self.copied: list[tuple[int, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        """Enumerations and constants are the real ones."""
        value = getattr(real_cuda, name)
        assert not name.startswith("cuda") or isinstance(value, type | int), f"{name} is not faked"
        return value

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda"):
            return value

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            count, error = self.fail.get(name, (0, OK))
            if count:
                self.fail[name] = (count - 1, error)
                if count == 1:
                    if name == "cudaStreamEndCapture":  # the capture is over in any case
                        self.stream(arguments[0]).capturing = None
                    return (error, None)
            return value(*arguments)

        return call

    # What a test asks.

    def leaks(self) -> list[str]:
        """What was allocated or created and not freed."""
        if self.blocks or self.objects:
            gc.collect()
        left = [f"{block.size} bytes of {block.kind} memory" for block in self.blocks.values()]
        return left + [type(value).__name__ for value in self.objects.values()]

    def bytes_at(self, address: int, size: int, kind: str | None = None) -> np.ndarray[Any, Any]:
        """The bytes there, which must lie in one block of memory of ``kind`` if it is a block of ours at all."""
        for block in self.freed:
            inside = block.address <= address < block.address + block.size
            assert not inside or self._block(address) is not None, "reads or writes freed memory"
        block = self._block(address)
        assert kind is None or (block is not None and block.kind == kind), f"{address:#x} is no {kind} memory"
        assert block is None or address + size <= block.address + block.size, "runs over the end of a block"
        return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))

    def _block(self, address: int) -> _Block | None:
        return next((b for b in self.blocks.values() if b.address <= address < b.address + b.size), None)

    def stream(self, handle: Any) -> _Stream:
        return self.legacy if int(handle) in (0, 1) else self._object(handle, _Stream)

    def _object(self, handle: Any, kind: type) -> Any:
        value = self.objects.get(int(handle))
        assert isinstance(value, kind), f"{handle} is no {kind.__name__}, or it was destroyed"
        return value

    def _new(self, value: Any) -> int:
        handle = max(self.objects, default=1000) + 8
        self.objects[handle] = value
        return handle

    # The device.

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:  # noqa: N802
        return (OK, self.count) if self.count else (Error.cudaErrorNoDevice, None)

    def cudaGetDevice(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.device

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        if not 0 <= device < self.count:
            return (Error.cudaErrorInvalidDevice,)
        self.device = device
        return (OK,)

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> tuple[Any, ...]:  # noqa: N802
        kinds = real_cuda.cudaDeviceAttr
        major, minor = self.architecture
        values = {
            kinds.cudaDevAttrComputeCapabilityMajor: major,
            kinds.cudaDevAttrComputeCapabilityMinor: minor,
        }
        return OK, values[attr]

    # Memory.

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        return self._allocate(size, "gpu")

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        return self._allocate(size, "pinned")

    def _allocate(self, size: int, kind: str) -> tuple[Any, ...]:
        array = np.full(size + 256, POISON, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.blocks[address] = _Block(address, size, kind, array, self.device)
        return OK, address

    def cudaFree(self, dev_ptr: int) -> tuple[Any, ...]:  # noqa: N802
        self.synchronize()  # as CUDA does
        return self._release(dev_ptr, "gpu")

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:  # noqa: N802
        return self._release(ptr, "pinned")

    def _release(self, address: int, kind: str) -> tuple[Any, ...]:
        block = self.blocks.pop(address)
        assert (block.kind, block.device) == (kind, self.device)
        block.array[:] = FREED
        self.freed.append(block)
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> tuple[Any, ...]:  # noqa: N802
        assert kind == real_cuda.cudaMemcpyKind.cudaMemcpyDefault
        self.copied.append((dst, src, count))

        content = self.bytes_at(src, count)
        if self._block(src) is None:  # pageable: CUDA has read it when the call returns
            content = content.copy()

        def copy() -> None:
            if self._block(src) is not None:
                self.bytes_at(src, count)  # is it still there?
            self.bytes_at(dst, count)[:] = content

        self.stream(stream).put(copy)
        return (OK,)

    # Streams and events.

    def synchronize(self) -> None:
        for value in [self.legacy, *self.objects.values()]:
            if isinstance(value, _Stream):
                value.drain()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._new(_Stream())

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:  # noqa: N802
        self._object(stream, _Stream).drain()
        del self.objects[int(stream)]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:  # noqa: N802
        assert self.stream(stream).capturing is None
        self.stream(stream).drain()
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._new(_Event())

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:  # noqa: N802
        del self.objects[int(event)]
        return (OK,)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:  # noqa: N802
        where = self.stream(stream)
        mark = self._object(event, _Event).mark = _Mark(where)
        where.put(mark.passes)
        return (OK,)

    def cudaEventSynchronize(self, event: Any) -> tuple[Any, ...]:  # noqa: N802
        if mark := self._object(event, _Event).mark:
            mark.wait()
        return (OK,)

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> tuple[Any, ...]:  # noqa: N802
        if mark := self._object(event, _Event).mark:
            self.stream(stream).put(mark.wait)
        return (OK,)

    # Graphs.

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]:  # noqa: N802
        assert int(stream) not in (0, 1), "the legacy stream cannot be captured"
        where = self.stream(stream)
        assert where.capturing is None
        where.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:  # noqa: N802
        where = self.stream(stream)
        assert where.capturing is not None
        graph, where.capturing = _Graph(where.capturing), None
        return OK, self._new(graph)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._new(_Executable(self._object(graph, _Graph).work))

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:  # noqa: N802
        del self.objects[int(graph)]
        return (OK,)

    def cudaGraphLaunch(self, graph_exec: Any, stream: Any) -> tuple[Any, ...]:  # noqa: N802
        for work in self._object(graph_exec, _Executable).work:
            self.stream(stream).put(work)
        return (OK,)

    def cudaGraphExecDestroy(self, graph_exec: Any) -> tuple[Any, ...]:  # noqa: N802
        del self.objects[int(graph_exec)]
        return (OK,)


@dataclass
class _Graph:
    work: list[Callable[[], None]]


@dataclass
class _Executable:
    work: list[Callable[[], None]]


class FakeTensorRT:
    """``log``: what happened, in order. ``fail``: names of methods that report failure from now on.

    ``model``: the ONNX file that every engine runs.
    """

    __version__ = "1.7.1.116"
    ILogger = tensorrt_rtx.ILogger
    TensorIOMode = tensorrt_rtx.TensorIOMode

    def __init__(self, cuda: FakeCuda, model: Path) -> None:
        self.cuda = cuda
        self.model = model
        self.log: list[str] = []
        self.fail: set[str] = set()
        self.host_code_allowed = False
        self.deserialized: list[bytes] = []

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802
        if "Runtime" in self.fail:
            logger.log(tensorrt_rtx.ILogger.ERROR, "CUDA initialization failure with error: 35.")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Runtime(self, logger)


class Runtime:
    """TensorRT's objects tell the log when they go. Each keeps alive what made it, as pybind's do."""

    def __init__(self, module: FakeTensorRT, logger: Any) -> None:
        self.module = module
        self.logger = logger
        module.log.append("create runtime")

    @property
    def engine_host_code_allowed(self) -> bool:
        return self.module.host_code_allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self.module.host_code_allowed = allowed

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        self.module.log.append("deserialize")
        self.module.deserialized.append(bytes(serialized_engine))
        if "deserialize_cuda_engine" in self.module.fail:
            self.logger.log(tensorrt_rtx.ILogger.ERROR, "Serialization assertion failed.")
            return None
        return ICudaEngine(self)

    def __del__(self) -> None:
        self.module.log.append("destroy runtime")


class ICudaEngine:
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.module = runtime.module
        model = onnx.load(self.module.model, load_external_data=False)
        stored = {initializer.name for initializer in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in stored]
        self.tensors = {value.name: _Io(value, True) for value in inputs}
        self.tensors |= {value.name: _Io(value, False) for value in model.graph.output}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.module.model, options, ["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> Any:
        return tensorrt_rtx.Dims(self.tensors[name].shape)

    def get_tensor_mode(self, name: str) -> Any:
        mode = tensorrt_rtx.TensorIOMode
        return mode.INPUT if self.tensors[name].is_input else mode.OUTPUT

    def create_execution_context(self) -> IExecutionContext | None:
        if "create_execution_context" in self.module.fail:
            self.runtime.logger.log(tensorrt_rtx.ILogger.ERROR, "Requested amount of GPU memory.")
            return None
        return IExecutionContext(self)

    def __del__(self) -> None:
        self.module.log.append("destroy engine")


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.module = engine.module
        self.addresses: dict[str, int] = {}
        self.shapes = {name: tensor.shape for name, tensor in engine.tensors.items() if tensor.is_input}
        self.busy: _Stream | None = None
        self.module.log.append("create context")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        due = self.engine.tensors[name].shape
        fits = len(due) == len(shape) and all(a in (b, -1) for a, b in zip(due, shape, strict=True))
        if "set_input_shape" in self.module.fail or not fits:
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Any:
        """Of outputs, with the named dimensions that the inputs' shapes fix."""
        tensors = self.engine.tensors
        if name in self.shapes:
            return tensorrt_rtx.Dims(self.shapes[name])
        known = {
            symbol: extent
            for key, shape in self.shapes.items()
            for symbol, extent in zip(tensors[key].symbols, shape, strict=True)
            if symbol
        }
        return tensorrt_rtx.Dims(
            [
                known.get(symbol, extent)
                for symbol, extent in zip(tensors[name].symbols, tensors[name].shape, strict=True)
            ]
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if "set_tensor_address" in self.module.fail or name not in self.engine.tensors:
            return False
        assert memory % 256 == 0, f"the address of {name} is not aligned"
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if "execute_async_v3" in self.module.fail or self.addresses.keys() != self.engine.tensors.keys():
            self.engine.runtime.logger.log(tensorrt_rtx.ILogger.ERROR, "Error Code 1: Cask.")
            return False
        addresses = dict(self.addresses)
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in addresses}
        self.module.log.append("execute")
        self.module.cuda.stream(stream_handle).put(lambda: self._run(addresses, shapes))
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        arrays = {name: self._array(name, address, shapes[name]) for name, address in addresses.items()}
        tensors = self.engine.tensors
        inputs = {name: array for name, array in arrays.items() if tensors[name].is_input}
        names = [name for name in arrays if not tensors[name].is_input]
        for name, value in zip(names, self.engine.session.run(names, inputs), strict=True):
            arrays[name][...] = value

    def _array(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = DTYPES[self.engine.tensors[name].name].numpy
        data = self.module.cuda.bytes_at(address, math.prod(shape) * dtype.itemsize, "gpu")
        return data.view(dtype).reshape(shape)

    def __del__(self) -> None:
        self.module.log.append("destroy context")


class _Io:
    def __init__(self, value: onnx.ValueInfoProto, is_input: bool) -> None:
        names = {"FLOAT16": "HALF"}
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        self.dtype = getattr(tensorrt_rtx.DataType, names.get(kind, kind))
        self.name = {"FLOAT16": "fp16", "FLOAT": "fp32"}.get(kind, kind.lower())
        dims = value.type.tensor_type.shape.dim
        self.symbols = [dim.dim_param for dim in dims]
        self.shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)
        self.is_input = is_input
