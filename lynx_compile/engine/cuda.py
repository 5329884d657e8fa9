# SPDX-License-Identifier: Apache-2.0
"""CUDA through cuda-python (``cuda.bindings.runtime``): checked calls, and handles that are freed once.

``tests/engine/test_api.py`` checks every function used here, with its number of arguments, against the real
bindings, which import without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from lynx_compile.errors import EngineError, InputError

ALIGNMENT = 256  # what TensorRT wants of every tensor, and cudaMalloc gives
NO_GPU = ("cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorSystemDriverMismatch")

log = logging.getLogger(__name__)


class Gpu:
    """One GPU. Every method makes it current, and the caller's own again behind it.

    ``architecture``: such as ``sm89``.

    Raises:
        InputError: cuda-python is not installed, or there is no such GPU. Every method raises EngineError for
            what CUDA reports.
    """

    def __init__(self, index: int) -> None:
        cuda = self._cuda = bindings()
        error, count = cuda.cudaGetDeviceCount()
        if error.name in NO_GPU or (error == cuda.cudaError_t.cudaSuccess and not count):
            raise InputError(
                f"There is no NVIDIA GPU here that CUDA can use ({error.name}).",
                "Run it on a machine with a GPU and NVIDIA's driver; building needs neither.",
            )
        check((error, count), "count the GPUs")
        if type(index) is not int or not 0 <= index < count:
            raise InputError(f"There is no GPU {index} here, but {count}.", f"Give a device below {count}.")
        self.index = index
        major, minor = (
            check(cuda.cudaDeviceGetAttribute(attribute, index), "read the GPU's architecture")
            for attribute in (
                cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor,
                cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.architecture = f"sm{major}{minor}"

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this GPU the thread's own for a while: others in the process (torch) have theirs."""
        cuda = self._cuda
        before = check(cuda.cudaGetDevice(), "ask for the current GPU")
        check(cuda.cudaSetDevice(self.index), f"use GPU {self.index}")
        try:
            yield
        finally:
            cuda.cudaSetDevice(before)  # not checked: it would hide the error that leads here

    def memory(self, size: int, what: str) -> Memory:
        """``size`` bytes on the GPU, aligned to ``ALIGNMENT``."""
        cuda = self._cuda
        with self.current():
            address = check(cuda.cudaMalloc(max(size, ALIGNMENT)), f"allocate {size / 1e6:.1f} MB for {what}")
        return Memory(self, int(address), cuda.cudaFree, size)

    def pinned(self, size: int) -> Memory:
        """``size`` bytes of host memory that the GPU copies from directly."""
        cuda = self._cuda
        with self.current():
            address = check(cuda.cudaMallocHost(size), f"pin {size / 1e6:.1f} MB of host memory")
        return Memory(self, int(address), cuda.cudaFreeHost, size)

    def stream(self) -> Handle:
        """A stream of our own, which does not wait for the legacy default stream."""
        cuda = self._cuda
        with self.current():
            stream = check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking), "create a stream")
        return Handle(self, int(stream), cuda.cudaStreamDestroy)

    def event(self) -> Handle:
        cuda = self._cuda
        with self.current():
            event = check(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming), "create an event")
        return Handle(self, event, cuda.cudaEventDestroy)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy between host and GPU or within the GPU, as the addresses say, in the order of ``stream``."""
        cuda = self._cuda
        with self.current():
            check(
                cuda.cudaMemcpyAsync(to, source, size, cuda.cudaMemcpyKind.cudaMemcpyDefault, stream),
                f"copy {size} bytes",
            )

    def record(self, event: Handle, stream: int) -> None:
        """``event`` happens when all of ``stream`` so far is done."""
        cuda = self._cuda
        with self.current():
            check(cuda.cudaEventRecord(event.value, stream), "record an event")

    def follow(self, stream: int, event: Handle) -> None:
        """What ``stream`` gets from now on starts behind ``event``."""
        cuda = self._cuda
        with self.current():
            check(cuda.cudaStreamWaitEvent(stream, event.value, 0), "order two streams")

    def wait(self, event: Handle) -> None:
        """Return when ``event`` has happened."""
        cuda = self._cuda
        with self.current():
            check(cuda.cudaEventSynchronize(event.value), "finish the work on the GPU")

    def synchronize(self, stream: int) -> None:
        """Return when ``stream`` is done."""
        cuda = self._cuda
        with self.current():
            check(cuda.cudaStreamSynchronize(stream), "finish the work on the GPU")

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Handle:
        """What ``enqueue`` puts into ``stream``, as a graph that ``launch`` runs; nothing is run here.

        Only this thread's calls are held to the rules of capturing, so that others may allocate meanwhile.
        """
        cuda = self._cuda
        with self.current():
            mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            check(cuda.cudaStreamBeginCapture(stream, mode), "capture a graph")
            try:
                enqueue()
            except BaseException:
                error, graph = cuda.cudaStreamEndCapture(stream)  # the stream is unusable without
                if error == cuda.cudaError_t.cudaSuccess:
                    cuda.cudaGraphDestroy(graph)
                raise
            graph = check(cuda.cudaStreamEndCapture(stream), "capture a graph")
            try:
                executable = check(cuda.cudaGraphInstantiate(graph, 0), "instantiate a graph")
            finally:
                cuda.cudaGraphDestroy(graph)
        return Handle(self, executable, cuda.cudaGraphExecDestroy)

    def launch(self, graph: Handle, stream: int) -> None:
        cuda = self._cuda
        with self.current():
            check(cuda.cudaGraphLaunch(graph.value, stream), "launch a graph")


class Handle:
    """Something of CUDA's. ``close`` destroys it, once; so does the end of its last reference.

    What CUDA says to that is only logged: the handle is gone in any case, and an error raised here would hide
    the one that led here.
    """

    def __init__(self, gpu: Gpu, value: Any, destroy: Callable[[Any], tuple[Any, ...]]) -> None:
        self.value = value
        self.close = weakref.finalize(self, _destroy, gpu, value, destroy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Memory(Handle):
    """``size`` bytes at ``value``."""

    def __init__(self, gpu: Gpu, address: int, free: Callable[[Any], tuple[Any, ...]], size: int) -> None:
        super().__init__(gpu, address, free)
        self.size = size

    def bytes(self) -> memoryview:
        """The bytes of pinned host memory, to be written."""
        return memoryview((ctypes.c_ubyte * self.size).from_address(self.value)).cast("B")


def bindings() -> Any:
    """cuda-python's runtime API.

    Raises:
        InputError: it is not installed or cannot be loaded.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        raise InputError(
            "The Python package cuda.bindings is not installed.", "Run: pip install cuda-bindings"
        ) from None
    except (ImportError, OSError) as error:
        raise InputError(
            f"The Python package cuda.bindings cannot be loaded ({error}).",
            "Run: pip install --force-reinstall cuda-bindings",
        ) from None


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a CUDA call, which returns (error, value) or (error,).

    Raises:
        EngineError: CUDA reports an error; ``what`` says what it cannot do.
    """
    error, *values = result
    if int(error):
        remedy = REMEDIES.get(error.name, "Restart the process; if it happens again, look the error up.")
        raise EngineError(f"CUDA cannot {what} ({error.name}).", remedy)
    return values[0] if values else None


REMEDIES = {
    "cudaErrorMemoryAllocation": "Free memory on the GPU (other engines, other programs), or use smaller shapes."
}


def _destroy(gpu: Gpu, value: Any, destroy: Callable[[Any], tuple[Any, ...]]) -> None:
    """Free what the GPU holds, also where CUDA cannot make that GPU the current one first."""
    with ExitStack() as stack:
        try:
            stack.enter_context(gpu.current())
        except EngineError as error:
            log.warning("%s", error)
        try:
            check(destroy(value), "free a resource")
        except EngineError as error:
            log.warning("%s", error)
