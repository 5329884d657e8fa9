# SPDX-License-Identifier: Apache-2.0
"""Build a TensorRT engine from a Lynx ONNX file, and make sure that the plugin really is in it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lynx_compile import recipe
from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Tensor
from lynx_compile.engine.plan import MAGIC, Plan, embeds
from lynx_compile.errors import StageError
from lynx_compile.files.atomic import atomic_path, copy_file
from lynx_compile.files.digest import remember
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.files.resume import StageVersion

if TYPE_CHECKING:
    from lynx_compile.passes.rewrite import LynxOnnx

BUILD = StageVersion("build", 2)  # TensorRT's version, the plugin and the GPU are inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk, and what its manifest tells of it.

    ``plugin``: a copy of the library, beside it. ``plugin_embedded``: whether the engine holds a copy as well.
    ``plugin_layers``: how many it holds. ``gpus``: what it runs on. ``inputs`` include the external weights.
    """

    path: Path
    bytes: int
    sha256: str
    backend: str
    backend_version: str
    gpus: tuple[str, ...]
    plugin: Path
    plugin_sha256: str
    plugin_embedded: bool
    plugin_layers: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    seconds: float


def build(
    lynx: LynxOnnx, engine: recipe.Engine, output: Path, *, progress: Progress | None = None
) -> BuiltEngine:
    """Build ``output`` from ``lynx.path``: strongly typed, static shapes but for its lengths, the plugin library
    embedded.

    With ``tensorrt_rtx`` two builds of the same file are bit-identical. An existing ``output`` is replaced
    only by a whole engine.

    Args:
        progress: called with TensorRT's phase, steps done and steps in all; from another thread.

    Raises:
        InputError: the recipe's backend or plugin is not there.
        StageError: TensorRT refuses the file (its own words are in the message), or the engine does not hold
            exactly one plugin layer per Lynx node.
        LynxError: ``output`` cannot be written.
        KeyboardInterrupt: on Ctrl-C, once TensorRT has stopped (at its next step).
    """
    start = time.monotonic()
    library = trt.plugin_library(engine.plugin)
    backend = trt.backend(engine.backend)
    trt.load_plugin(backend, library, lynx.plugins)
    backend.messages.clear()
    with atomic_path(output) as temporary:
        builder = backend.module.Builder(backend.messages)
        network = _strongly_typed_network(backend, builder)
        parser = backend.module.OnnxParser(network, backend.messages)  # owns the weights: lives until the end
        _parse(backend, parser, lynx.path)
        _check_network(backend, network, lynx)
        config = _config(backend, builder, engine, library)
        _set_lengths(builder, network, config, lynx)
        plan = _serialize(backend, builder, network, config, temporary, progress)
        plugin_layers = _plugin_layers(backend, plan, lynx)
        del parser
    copy_file(library.path, Outputs.of(output).plugin)
    return BuiltEngine(
        path=output,
        bytes=plan.bytes,
        sha256=plan.digest.hexdigest(),
        backend=backend.name,
        backend_version=backend.version,
        gpus=engine.gpus if backend.ahead_of_time else (trt.gpu() or "unknown",),
        plugin=Outputs.of(output).plugin,
        plugin_sha256=library.sha256,
        plugin_embedded=embeds(output, library.path),
        plugin_layers=plugin_layers,
        inputs=tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
        seconds=time.monotonic() - start,
    )


def _strongly_typed_network(backend: trt.Backend, builder: Any) -> Any:
    """Strong typing keeps the dtypes of the ONNX file: what is bf16 there is computed in bf16."""
    return builder.create_network(1 << int(backend.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _parse(backend: trt.Backend, parser: Any, path: Path) -> None:
    """From the file, not from bytes: the weights are external data beside it."""
    if not _in_thread(parser.parse_from_file, str(path)):
        raise StageError(
            "build", f"TensorRT cannot parse {path}.{trt.said(backend)}", "Run again with --fresh."
        )


def _check_network(backend: trt.Backend, network: Any, lynx: LynxOnnx) -> None:
    """Exactly the Lynx nodes must have become plugin layers.

    TensorRT takes the model-local function of the same name without a word when it does not find the
    plugin; the engine would work and be dense.
    """
    found = {
        layer.name for layer in map(network.get_layer, range(network.num_layers)) if _is_ours(backend, layer)
    }
    missing = [node for node in lynx.nodes if node not in found]
    if missing or len(found) != len(lynx.nodes):
        cause = f"{len(found)} of {len(lynx.nodes)} Lynx nodes became plugin layers"
        example = f" ({missing[0]} did not)" if missing else ""
        raise StageError("build", f"{cause}{example}.{trt.said(backend)}", "Run again with --fresh.")
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    if absent := [name for name in lynx.external_inputs if name not in inputs]:
        raise StageError(
            "build", f"the weight {absent[0]} is no input of {lynx.path}.", "Run again with --fresh."
        )


def _is_ours(backend: trt.Backend, layer: Any) -> bool:
    module = backend.module
    if layer.type != module.LayerType.PLUGIN_V3:
        return False
    layer.__class__ = module.IPluginV3Layer  # how TensorRT's Python API casts a layer
    core = layer.plugin.get_capability_interface(module.PluginCapabilityType.CORE)
    return core.plugin_name in trt.PLUGIN_NAMES and core.plugin_namespace == trt.PLUGIN_NAMESPACE


def _config(backend: trt.Backend, builder: Any, engine: recipe.Engine, library: trt.PluginLibrary) -> Any:
    config = builder.create_builder_config()
    config.plugins_to_serialize = [str(library.path)]
    if engine.workspace_gib is not None:
        config.set_memory_pool_limit(
            backend.module.MemoryPoolType.WORKSPACE, int(engine.workspace_gib * 2**30)
        )
    if backend.ahead_of_time:
        _set_targets(backend, config, engine.gpus)
    return config


def _set_lengths(builder: Any, network: Any, config: Any, lynx: LynxOnnx) -> None:
    """Inputs of open lengths, tuned for the longest."""
    if not lynx.lengths:
        return
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        own = [length for length in lynx.lengths if length.tensor == tensor.name]
        if not own:
            continue
        smallest, largest = list(tensor.shape), list(tensor.shape)
        for length in own:
            smallest[length.axis], largest[length.axis] = length.smallest, length.largest
        profile.set_shape(tensor.name, smallest, largest, largest)
    config.add_optimization_profile(profile)


def _set_targets(backend: trt.Backend, config: Any, gpus: tuple[str, ...]) -> None:
    """Only TensorRT for RTX has targets; TensorRT builds for the GPU that it finds."""
    config.num_compute_capabilities = len(gpus)
    for index, gpu in enumerate(gpus):
        capability = getattr(backend.module.ComputeCapability, gpu.upper())
        if not config.set_compute_capability(capability, index):
            raise StageError(
                "build", f"TensorRT refuses the target {gpu}.{trt.said(backend)}", "Change 'engine.gpus'."
            )


def _serialize(
    backend: trt.Backend, builder: Any, network: Any, config: Any, path: Path, progress: Progress | None
) -> Plan:
    """Build into ``path``, searching and digesting what passes."""
    stop = threading.Event()
    monitor = config.progress_monitor = _monitor(backend.module, progress or no_progress, stop)
    with path.open("wb") as file:
        plan = Plan(file)
        writer = _writer(backend.module, plan)
        done = _in_thread(builder.build_serialized_network_to_stream, network, config, writer, stop=stop)
        remember(file, plan.digest.hexdigest())
    if failure := writer.failure or monitor.failure:
        raise failure
    if not done:
        raise StageError(
            "build", f"TensorRT built no engine.{trt.said(backend)}", "See the log for all of its messages."
        )
    return plan


def _in_thread(work: Callable[..., bool], *arguments: Any, stop: threading.Event | None = None) -> bool:
    """Run TensorRT in a second thread: Ctrl-C then reaches this one, and never Python code that TensorRT calls,
    where it would be swallowed. Leaving waits for TensorRT to stop, which ``stop`` may ask it to.

    The parser lets no other thread run Python before it is done. If it began while its thread is still being started,
    Ctrl-C would strike there, and an executor does not wait for a thread that it has not seen start: what TensorRT
    reads was freed under it. So the thread is there before it gets the work.
    """
    with ThreadPoolExecutor(1, "tensorrt") as pool:
        pool.submit(int).result()
        try:
            return pool.submit(work, *arguments).result()
        except BaseException:
            if stop is not None:
                stop.set()
            raise


def _monitor(module: ModuleType, progress: Progress, stop: threading.Event) -> Any:
    """TensorRT's progress monitor: reports every step, and cancels the build once ``stop`` is set."""

    class Monitor(module.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.failure: Exception | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                progress(phase, step + 1, max(self.steps[phase], step + 1))
            except Exception as error:  # none may pass through TensorRT's own code
                self.failure = error
                stop.set()
            return not stop.is_set()

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _writer(module: ModuleType, plan: Plan) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.failure: Exception | None = None

        def write(self, piece: bytes) -> int:
            try:
                plan.write(piece)
            except Exception as error:  # none may pass through TensorRT's own code
                self.failure = error
                return 0
            return len(piece)

    return Writer()


def _plugin_layers(backend: trt.Backend, plan: Plan, lynx: LynxOnnx) -> int:
    """How many plugin layers are in the finished engine; it must be one per Lynx node.

    This reads the plan's bytes, because an engine cannot be loaded and inspected without a GPU.
    """
    if plan.magic != MAGIC:
        raise StageError(
            "build", "what TensorRT wrote is no engine.", "Use a version of TensorRT named in the README."
        )
    found, due = plan.records, len(lynx.nodes)
    if not backend.ahead_of_time and not found and plan.names >= due:
        log.warning(
            "%s %s: the plugin layers in its engines cannot be counted", backend.name, backend.version
        )
        return due
    if found != due:
        cause = f"the finished engine holds {found} of {due} plugin layers."
        raise StageError(
            "build", cause, "Please report it with the log: TensorRT has removed or merged some."
        )
    return found


def _tensor(tensor: Any) -> Tensor:
    return Tensor(name=tensor.name, dtype=trt.dtype_name(tensor.dtype), shape=tuple(tensor.shape))
