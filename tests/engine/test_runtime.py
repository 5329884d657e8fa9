# SPDX-License-Identifier: Apache-2.0
"""The runtime against a fake GPU and a fake TensorRT (fakes.py), whose results are real."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda.bindings import runtime as real_cuda

from lynx_compile.engine import cuda as cuda_module
from lynx_compile.engine import weights as weights_module
from lynx_compile.engine.arrays import DL_CUDA, DeviceArray, capsule_of
from lynx_compile.engine.runtime import Engine
from lynx_compile.errors import EngineError, InputError
from tests.engine.conftest import TOKENS, Stage
from tests.engine.fakes import FREED, FakeCuda

MakeStage = Callable[..., Stage]
OUT = "blocks.1.proj.relu"
Error = real_cuda.cudaError_t


def random(tokens: int = TOKENS, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(1, tokens, 64)).astype(np.float16)


class OnGpu:
    """A tensor of another library's: in GPU memory, with DLPack. ``streams``: for which it was asked."""

    def __init__(
        self, cuda: FakeCuda, array: np.ndarray[Any, Any], *, offset: int = 0, index: int = 0
    ) -> None:
        self.cuda, self.shape, self.dtype, self.index = cuda, array.shape, array.dtype, index
        self.block = cuda.cudaMalloc(array.nbytes + offset)[1]
        self.address = self.block + offset
        self.cuda.bytes_at(self.address, array.nbytes)[:] = np.frombuffer(array.tobytes(), np.uint8)
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return DL_CUDA, self.index

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return capsule_of(self.address, "fp16", self.shape, self.__dlpack_device__(), self)

    def numpy(self) -> np.ndarray[Any, Any]:
        size = int(np.prod(self.shape)) * 2
        return self.cuda.bytes_at(self.address, size).view(self.dtype).reshape(self.shape).copy()

    def free(self) -> None:
        self.cuda.cudaFree(self.block)


def zeros_on_gpu(stage: Stage) -> OnGpu:
    return OnGpu(stage.cuda, np.zeros((1, TOKENS, 64), np.float16))


# Running.


@pytest.mark.parametrize("external", [False, True])
def test_numpy(stage: MakeStage, external: bool) -> None:
    s = stage(external=external)
    with Engine.open(s.path) as engine:
        assert [(t.name, t.dtype, t.shape) for t in engine.inputs] == [("x", "fp16", (1, TOKENS, 64))]
        for seed in range(3):
            x = random(seed=seed)
            outputs = engine.run({"x": x})
            assert outputs[OUT].dtype == np.float16
            np.testing.assert_array_equal(outputs[OUT], s.expected(x))
    assert s.cuda.leaks() == []
    assert s.loaded == [s.plugin]


def test_results_of_a_run_are_its_own(stage: MakeStage) -> None:
    s = stage()
    with Engine.open(s.path) as engine:
        first = engine.run({"x": random(seed=1)})[OUT]
        before = first.copy()
        engine.run({"x": random(seed=2)})
    np.testing.assert_array_equal(first, before)


def test_dlpack_in_host_memory(stage: MakeStage) -> None:
    s = stage()
    with Engine.open(s.path) as engine:
        found = engine.run({"x": torch.from_numpy(random())})[OUT]
    np.testing.assert_array_equal(found, s.expected(random()))


def test_on_the_gpu_nothing_is_copied(stage: MakeStage) -> None:
    s = stage()
    x, y = OnGpu(s.cuda, random()), zeros_on_gpu(s)
    with Engine.open(s.path) as engine:
        s.cuda.copied.clear()
        outputs = engine.run({"x": x}, outputs={OUT: y})
        assert outputs == {OUT: y}
        np.testing.assert_array_equal(y.numpy(), s.expected(random()))
    assert s.cuda.copied == []
    x.free(), y.free()
    assert s.cuda.leaks() == []


def test_new_results_on_the_gpu(stage: MakeStage) -> None:
    s = stage()
    x = OnGpu(s.cuda, random())
    engine = Engine.open(s.path)
    result = engine.run({"x": x})[OUT]
    assert isinstance(result, DeviceArray)
    assert (result.dtype, result.shape, result.__dlpack_device__()) == ("fp16", (1, TOKENS, 64), (DL_CUDA, 0))
    np.testing.assert_array_equal(result.numpy(), s.expected(random()))
    engine.close()
    np.testing.assert_array_equal(result.numpy(), s.expected(random()))  # it owns its memory
    # One engine's result is another's input.
    with Engine.open(s.path) as engine:
        again = engine.run({"x": result})[OUT].numpy()
    np.testing.assert_array_equal(again, s.expected(s.expected(random())))
    capsule = result.__dlpack__()
    del result
    gc.collect()
    assert len(s.cuda.leaks()) == 2, "a capsule keeps the memory"  # and x
    del capsule
    x.free()
    assert s.cuda.leaks() == []


def test_misaligned_arrays_are_copied(stage: MakeStage) -> None:
    """TensorRT wants 256 bytes; a slice of a torch tensor starts where it does."""
    s = stage()
    x, y = OnGpu(s.cuda, random(), offset=130), OnGpu(s.cuda, np.zeros_like(random()), offset=2)
    with Engine.open(s.path) as engine:
        engine.run({"x": x}, outputs={OUT: y})
    np.testing.assert_array_equal(y.numpy(), s.expected(random()))


def test_without_a_stream_it_waits(stage: MakeStage) -> None:
    s = stage()
    x, y = OnGpu(s.cuda, random()), zeros_on_gpu(s)
    with Engine.open(s.path) as engine:
        engine.run({"x": x}, outputs={OUT: y})
        assert y.numpy().any()
        assert all(stream > 2 for stream in x.streams), "its own stream is made to wait for the input"


def test_in_a_given_stream_it_does_not_wait(stage: MakeStage) -> None:
    s = stage()
    handle = s.cuda.cudaStreamCreateWithFlags(1)[1]
    x, y = OnGpu(s.cuda, random()), zeros_on_gpu(s)
    with Engine.open(s.path) as engine:
        engine.run({"x": x}, outputs={OUT: y}, stream=handle)
        assert not y.numpy().any(), "the fake runs nothing before somebody waits"
        assert x.streams == [handle]
        s.cuda.cudaStreamSynchronize(handle)
        np.testing.assert_array_equal(y.numpy(), s.expected(random()))


class TorchStream:
    cuda_stream = 0


class CupyStream:
    ptr = 0


class CoreStream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0


@pytest.mark.parametrize("stream", [0, TorchStream(), CupyStream(), CoreStream()])
def test_kinds_of_streams(stage: MakeStage, stream: Any) -> None:
    s = stage()
    x, y = OnGpu(s.cuda, random()), zeros_on_gpu(s)
    with Engine.open(s.path) as engine:
        engine.run({"x": x}, outputs={OUT: y}, stream=stream)
        assert x.streams == [1], "DLPack forbids 0 for the default stream"
        s.cuda.legacy.drain()
        np.testing.assert_array_equal(y.numpy(), s.expected(random()))


@pytest.mark.parametrize("stream", ["0", -1, True, 1.5, object()])
def test_what_is_no_stream(stage: MakeStage, stream: Any) -> None:
    s = stage()
    with Engine.open(s.path) as engine, pytest.raises(InputError, match="is no CUDA stream"):
        engine.run({"x": random()}, stream=stream)


def test_a_result_makes_its_reader_wait(stage: MakeStage) -> None:
    s = stage()
    producer, consumer = (s.cuda.cudaStreamCreateWithFlags(1)[1] for _ in range(2))
    x = OnGpu(s.cuda, random())
    with Engine.open(s.path) as engine:
        result = engine.run({"x": x}, stream=producer)[OUT]
        again = engine.run({"x": result}, stream=consumer)[OUT]
        s.cuda.cudaStreamSynchronize(consumer)  # which runs what producer has to do first
        np.testing.assert_array_equal(again.numpy(), s.expected(s.expected(random())))
        with pytest.raises(BufferError):
            result.__dlpack__(dl_device=(1, 0))
        with pytest.raises(BufferError):
            result.__dlpack__(copy=True)


def test_runs_in_two_streams_do_not_overlap(stage: MakeStage) -> None:
    """A context's activations are its own, whatever stream it runs in."""
    s = stage()
    one, two = (s.cuda.cudaStreamCreateWithFlags(1)[1] for _ in range(2))
    x, y = OnGpu(s.cuda, random()), zeros_on_gpu(s)
    with Engine.open(s.path) as engine:
        engine.run({"x": x}, outputs={OUT: y}, stream=one)
        s.cuda.calls.clear()
        engine.run({"x": x}, outputs={OUT: y}, stream=two)
        assert "cudaStreamWaitEvent" in s.cuda.calls
        s.cuda.calls.clear()
        engine.run({"x": x}, outputs={OUT: y}, stream=two)
        assert "cudaStreamWaitEvent" not in s.cuda.calls


def test_shapes_that_a_run_decides(stage: MakeStage) -> None:
    s = stage(tokens="tokens")
    with Engine.open(s.path) as engine:
        for tokens in (32, 8, 32, 100):
            x = random(tokens)
            np.testing.assert_array_equal(engine.run({"x": x})[OUT], s.expected(x))
    assert s.cuda.leaks() == []


@pytest.mark.parametrize("tokens", [TOKENS, "tokens"])
def test_cuda_graphs(stage: MakeStage, tokens: int | str) -> None:
    s = stage(tokens=tokens, external=True)
    lengths = (32, 32) if tokens == TOKENS else (32, 8, 32, 8)
    with Engine.open(s.path) as engine, engine.context(cuda_graph=True) as context:
        for turn, length in enumerate((*lengths, *lengths)):
            x = random(length, seed=turn)
            np.testing.assert_array_equal(context.run({"x": x})[OUT], s.expected(x))
            on_gpu = OnGpu(s.cuda, x)
            np.testing.assert_array_equal(context.run({"x": on_gpu}, stream=0)[OUT].numpy(), s.expected(x))
            on_gpu.free()
        shapes = len(set(lengths))
        assert s.trt.log.count("execute") == 2 * shapes, "once to warm up and once to capture, for each shape"
        assert s.cuda.calls.count("cudaGraphInstantiate") == shapes
        assert s.cuda.calls.count("cudaGraphLaunch") == 4 * len(lengths)
        assert s.trt.log.count("create context") == shapes, "a graph is tied to its context"
    assert s.cuda.leaks() == []


def test_contexts_in_threads(stage: MakeStage) -> None:
    s = stage(external=True)
    with Engine.open(s.path) as engine:
        found: dict[int, Any] = {}
        contexts = [engine.context(), engine.context()]

        def work(seed: int) -> None:
            found[seed] = contexts[seed % 2].run({"x": random(seed=seed)})[OUT]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
            thread.join()  # the fake is not thread-safe; the contexts' independence is what counts
        for seed, result in found.items():
            np.testing.assert_array_equal(result, s.expected(random(seed=seed)))
        contexts[0].close()
        np.testing.assert_array_equal(contexts[1].run({"x": random()})[OUT], s.expected(random()))
        with pytest.raises(EngineError, match="is closed"):
            contexts[0].run({"x": random()})
    assert s.cuda.leaks() == []
    assert s.trt.log.count("create context") == 2


def test_the_callers_gpu_stays_current(stage: MakeStage) -> None:
    s = stage(cuda=FakeCuda(count=3))
    s.cuda.device = 2
    with Engine.open(s.path, device=1) as engine:
        assert engine.device == 1
        assert s.cuda.device == 2
        assert {block.device for block in s.cuda.blocks.values()} <= {1}
        engine.run({"x": random()})
        assert s.cuda.device == 2
    assert s.cuda.device == 2
    assert s.cuda.leaks() == []


# Freeing.


def test_order_of_freeing(stage: MakeStage) -> None:
    s = stage(external=True)
    engine = Engine.open(s.path)
    engine.run({"x": random()})
    engine.context(cuda_graph=True).run({"x": random()})
    engine.close()
    assert s.trt.log[-4:] == ["destroy context", "destroy context", "destroy engine", "destroy runtime"]
    assert s.cuda.leaks() == []
    engine.close()
    with pytest.raises(EngineError, match=r"The engine is closed. Open it again."):
        engine.run({"x": random()})
    with pytest.raises(EngineError, match=r"The engine is closed."):
        engine.context()


def test_forgotten_engines_are_freed(stage: MakeStage) -> None:
    s = stage(external=True)
    engine = Engine.open(s.path)
    engine.run({"x": random()})
    del engine
    assert s.cuda.leaks() == []
    assert s.trt.log[-3:] == ["destroy context", "destroy engine", "destroy runtime"]


def test_a_context_keeps_its_engine(stage: MakeStage) -> None:
    s = stage(external=True)
    context = Engine.open(s.path).context()
    gc.collect()
    np.testing.assert_array_equal(context.run({"x": random()})[OUT], s.expected(random()))


def test_closing_waits_for_the_last_run(stage: MakeStage) -> None:
    s = stage(external=True)
    x, y = OnGpu(s.cuda, random()), zeros_on_gpu(s)
    engine = Engine.open(s.path)
    engine.run({"x": x}, outputs={OUT: y}, stream=0)
    engine.close()
    np.testing.assert_array_equal(y.numpy(), s.expected(random()))


# Weights.


def test_weights_pass_in_pieces(stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    s = stage(external=True)
    monkeypatch.setattr(weights_module, "PIECE", 1000)
    seen: list[tuple[str, int, int]] = []
    with Engine.open(s.path, progress=lambda *step: seen.append(step)) as engine:
        np.testing.assert_array_equal(engine.run({"x": random()})[OUT], s.expected(random()))
    size = s.lynx.weights_path.stat().st_size
    steps = [step for step in seen if step[0] == "weights"]
    assert len(steps) > 50
    assert steps[-1] == ("weights", size, size)
    assert seen[0][0] == "engine" and seen[0][1] <= seen[0][2] == s.path.stat().st_size
    pinned = [block for block in s.cuda.freed if block.kind == "pinned"]
    assert [block.size for block in pinned] == [1000, 1000]
    starts = {block.address for block in pinned}
    uploaded = sum(count for _, source, count in s.cuda.copied if _in(source, starts))
    assert uploaded == size - 8 - int.from_bytes(s.lynx.weights_path.read_bytes()[:8], "little")


def _in(address: int, starts: set[int]) -> bool:
    return any(start <= address < start + 1000 for start in starts)


def test_weights_cut_off_while_they_are_read(stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    s = stage(external=True)
    monkeypatch.setattr(weights_module, "PIECE", 1000)

    def cut(what: str, done: int, total: int) -> None:
        if what == "weights":
            with s.lynx.weights_path.open("r+b") as file:
                file.truncate(done)

    with pytest.raises(InputError, match="was cut off while it was read"):
        Engine.open(s.path, progress=cut)
    assert s.cuda.leaks() == []


# What CUDA and TensorRT refuse.


def outcome(s: Stage) -> None:
    """Open, run with and without a graph, close."""
    x = OnGpu(s.cuda, random(), offset=2)
    try:
        with Engine.open(s.path) as engine:
            engine.run({"x": random()})
            engine.run({"x": x}, stream=0)
            engine.context(cuda_graph=True).run({"x": random()})
    finally:
        x.free()


def complaint(s: Stage) -> str | None:
    """What ``outcome`` says; the exception goes, and with it the frames that hold what is freed."""
    try:
        outcome(s)
    except EngineError as error:
        return str(error)
    return None


CALLS = [
    "cudaDeviceGetAttribute", "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventSynchronize",
    "cudaGetDevice", "cudaGetDeviceCount", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaMalloc",
    "cudaMallocHost", "cudaMemcpyAsync", "cudaSetDevice", "cudaStreamBeginCapture", "cudaStreamCreateWithFlags",
    "cudaStreamEndCapture", "cudaStreamSynchronize", "cudaStreamWaitEvent",
]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_failure_of_cuda(stage: MakeStage, name: str) -> None:
    """The first, the second ... call of each function fails: one clear error each time, and nothing is left."""
    s = stage(external=True)
    failures = 0
    for count in (1, 2, 3, 5, 8, 13, 21, 34, 55):
        s.cuda.fail[name] = (
            count + (name == "cudaMalloc"),
            Error.cudaErrorMemoryAllocation,
        )  # not the test's own
        message = complaint(s)
        if message is not None:
            failures += 1
            assert message.startswith("CUDA cannot ")
            assert "(cudaErrorMemoryAllocation). Free memory on the GPU" in message
        s.cuda.fail.clear()
        s.cuda.legacy.drain()
        assert s.cuda.leaks() == []
        assert s.cuda.device == 0
    assert failures
    outcome(s)


@pytest.mark.parametrize("name", ["cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaEventDestroy"])
def test_failures_to_free_are_logged(stage: MakeStage, name: str, caplog: pytest.LogCaptureFixture) -> None:
    s = stage(external=True)
    s.cuda.fail[name] = (1, Error.cudaErrorIllegalAddress)
    outcome(s)
    assert "CUDA cannot free a resource (cudaErrorIllegalAddress). Restart the process" in caplog.text


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Runtime", r"TensorRT cannot start \(pybind11.*TensorRT says: CUDA initialization failure"),
        (
            "deserialize_cuda_engine",
            r"TensorRT cannot load .*small.engine. TensorRT says: Serialization assertion",
        ),
        ("create_execution_context", "cannot create an execution context. TensorRT says: Requested amount"),
        ("set_input_shape", r"TensorRT refuses the shape \[1, 32, 64\] of 'x'"),
        ("set_tensor_address", r"TensorRT refuses the address of 'blocks.0.proj.\w+'"),
        ("execute_async_v3", "TensorRT refuses to run the engine. TensorRT says: Error Code 1: Cask"),
    ],
)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_failures_of_tensorrt(stage: MakeStage, method: str, message: str, cuda_graph: bool) -> None:
    s = stage(external=True)
    s.trt.fail.add(method)

    def run() -> None:
        with Engine.open(s.path) as engine, engine.context(cuda_graph=cuda_graph) as context:
            context.run({"x": random()})

    with pytest.raises(EngineError, match=message):
        run()
    assert s.cuda.leaks() == []


def test_a_run_that_fails_is_over(stage: MakeStage) -> None:
    """Nothing of it is under way when its caller has the error, and the next run is right."""
    s = stage()
    with Engine.open(s.path) as engine:
        s.trt.fail.add("execute_async_v3")
        with pytest.raises(EngineError):
            engine.run({"x": random(seed=1)})
        assert all(not value.work for value in s.cuda.objects.values() if hasattr(value, "work"))
        s.trt.fail.clear()
        np.testing.assert_array_equal(engine.run({"x": random()})[OUT], s.expected(random()))


def test_a_capture_that_fails_is_ended(stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    s = stage()
    begin = FakeCuda.cudaStreamBeginCapture

    def begin_and_break(self: FakeCuda, stream: Any, mode: Any) -> tuple[Any, ...]:
        s.trt.fail.add("execute_async_v3")
        return begin(self, stream, mode)

    with Engine.open(s.path) as engine, engine.context(cuda_graph=True) as context:
        monkeypatch.setattr(FakeCuda, "cudaStreamBeginCapture", begin_and_break)
        with pytest.raises(EngineError, match="refuses to run"):
            context.run({"x": random()})
        monkeypatch.undo()
        monkeypatch.setattr(cuda_module, "bindings", lambda: s.cuda)
        s.trt.fail.clear()
        np.testing.assert_array_equal(context.run({"x": random()})[OUT], s.expected(random()))
    assert s.cuda.leaks() == []


# What callers get wrong.


def wrong_inputs() -> dict[str, tuple[Any, str]]:
    x = random()
    return {
        "none": ({}, r"The input 'x' is missing. This engine's inputs are x\."),
        "extra": ({"x": x, "y": x}, r"There is no input 'y'\."),
        "list": ({"x": [1]}, r"'x' is a list\. Give a numpy array"),
        "dtype": (
            {"x": x.astype(np.float32)},
            r"'x' is fp32, and the engine has fp16 \[1, 32, 64\]\. Convert",
        ),
        "byte order": ({"x": x.astype(">f2")}, r"has the dtype >f2, which no engine takes"),
        "shape": ({"x": x[:, :3]}, r"'x' is fp16 \[1, 3, 64\], and the engine has fp16 \[1, 32, 64\]"),
        "rank": ({"x": x[0]}, r"'x' is fp16 \[32, 64\], and the engine has"),
        "transposed": ({"x": x.swapaxes(1, 2)}, "'x' is not contiguous"),
        "gradient": ({"x": torch.from_numpy(x).requires_grad_()}, r"through DLPack \(.*gradient"),
        "strided": ({"x": torch.from_numpy(x)[..., ::2]}, "'x' is not contiguous"),
        "complex": ({"x": torch.zeros(2, dtype=torch.complex64)}, "has a dtype that no engine takes"),
        "meta": ({"x": torch.zeros(1, TOKENS, 64, device="meta")}, "through DLPack"),
        "nine": ({"x": torch.zeros([1] * 9)}, r"through DLPack \(9 dimensions\)"),
    }


@pytest.mark.parametrize("case", list(wrong_inputs()))
def test_wrong_inputs(stage: MakeStage, case: str) -> None:
    s = stage()
    inputs, message = wrong_inputs()[case]
    with Engine.open(s.path) as engine:
        with pytest.raises(InputError, match=message):
            engine.run(inputs)
        assert "execute" not in s.trt.log


def test_wrong_places(stage: MakeStage) -> None:
    s = stage(cuda=FakeCuda(count=2))
    elsewhere = OnGpu(s.cuda, random(), index=1)
    frozen = np.zeros((1, TOKENS, 64), np.float16)
    frozen.flags.writeable = False
    with Engine.open(s.path) as engine:
        with pytest.raises(InputError, match="'x' is on GPU 1, and the engine on GPU 0"):
            engine.run({"x": elsewhere})
        with pytest.raises(InputError, match=f"'{OUT}' is read-only"):
            engine.run({"x": random()}, outputs={OUT: frozen})
        with pytest.raises(InputError, match=f"The output '{OUT}' is missing"):
            engine.run({"x": random()}, outputs={})
        with pytest.raises(
            InputError, match=rf"'{OUT}' is fp16 \[3\], and the engine has fp16 \[1, 32, 64\]"
        ):
            engine.run({"x": random()}, outputs={OUT: np.zeros(3, np.float16)})


def test_read_only_inputs_are_fine(stage: MakeStage) -> None:
    s = stage()
    x = random()
    x.flags.writeable = False
    with Engine.open(s.path) as engine:
        np.testing.assert_array_equal(engine.run({"x": x})[OUT], s.expected(x))


# The module itself.


def test_neither_torch_nor_diffusers() -> None:
    code = """
import sys
import lynx_compile
import lynx_compile.engine.runtime
assert callable(lynx_compile.load)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "diffusers", "onnx", "transformers"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_cuda_python(stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    s = stage()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(InputError, match=r"cuda.bindings is not installed. Run: pip install cuda-bindings"):
        Engine.open(s.path)


def test_no_gpu(stage: MakeStage) -> None:
    s = stage(cuda=FakeCuda(count=0))
    with pytest.raises(InputError, match=r"no NVIDIA GPU here that CUDA can use \(cudaErrorNoDevice\)"):
        Engine.open(s.path)


def test_no_driver(stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real bindings on a machine like CI's, or the fake ones' answer where there is a GPU."""
    s = stage()
    if int(real_cuda.cudaGetDeviceCount()[0]):
        monkeypatch.setattr(cuda_module, "bindings", lambda: real_cuda)
    s.cuda.fail["cudaGetDeviceCount"] = (1, Error.cudaErrorInsufficientDriver)
    with pytest.raises(InputError, match="There is no NVIDIA GPU here that CUDA can use"):
        Engine.open(s.path)


@pytest.mark.parametrize("device", [1, -1, "0", True])
def test_no_such_gpu(stage: MakeStage, device: Any) -> None:
    s = stage()
    with pytest.raises(InputError, match=rf"There is no GPU {device} here, but 1"):
        Engine.open(s.path, device=device)


def test_the_fake_sees_freed_memory(stage: MakeStage) -> None:
    """The tests above rely on it."""
    s = stage()
    x = OnGpu(s.cuda, random())
    x.free()
    with pytest.raises(AssertionError, match="freed memory"):
        x.numpy()
    assert set(s.cuda.freed[-1].array.tolist()) == {FREED}
