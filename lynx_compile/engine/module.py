# SPDX-License-Identifier: Apache-2.0
"""An engine in the place of a pipeline's transformer, whichever it is: its manifest says how it is called."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lynx_compile.engine.arguments import Arguments, bind, dtype_of, flatten, signature
from lynx_compile.engine.calls import check_constants, result_of
from lynx_compile.engine.manifest import Call, Padding, Tensor
from lynx_compile.engine.model_class import ModelClass
from lynx_compile.engine.runtime import Engine
from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
IGNORED = -10000.0  # what diffusers adds to the attention of what a mask leaves out
Tensors = Mapping[str, torch.Tensor]


def load(
    path: str | Path,
    *others: str | Path,
    device: int = 0,
    cuda_graph: bool = False,
    progress: Progress | None = None,
) -> EngineModule:
    """Load an engine, or several, as a transformer of a pipeline; see ``lynx_compile.load``."""
    engines: list[Engine] = []
    try:
        for each in (path, *others):
            engines.append(Engine.open(each, device=device, progress=progress))
            if engines[-1].manifest.call is None:
                raise InputError(
                    f"{each} was not compiled from a torch module, so that no pipeline can call it.",
                    "Run it with lynx_compile.engine.runtime.Engine.",
                )
            if _model(engines[-1]) != _model(engines[0]):
                raise InputError(
                    f"{each} is not of the model that {path} is of.",
                    "Load the engines of one transformer together, and each transformer by itself.",
                )
        return EngineModule(engines, cuda_graph)
    except BaseException:
        for engine in engines:
            engine.close()
        raise


def _model(engine: Engine) -> tuple[str, str]:
    """Which weights, in which dtype."""
    return engine.manifest.source.sha256, engine.manifest.dtype


class EngineModule(torch.nn.Module):
    """The transformer, for a pipeline that only runs it: no parameters, adapters, caches or attention processors.

    ``engines``: what runs, each for one way in which the pipeline calls its transformer. ``engine``: the first.
    ``config``: of the model that was compiled.
    """

    def __init__(self, engines: Sequence[Engine], cuda_graph: bool = False) -> None:
        super().__init__()
        self.engines = tuple(engines)
        self.engine = self.engines[0]
        self.config = Config(self.engine.manifest.source.config)
        self._ways = [_Way(engine, cuda_graph) for engine in engines]
        self._signature = signature(self._ways[0].call.parameters)
        self._class = ModelClass(self._ways[0].call.class_name, self.config, torch.device("meta"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the engines' weights and activations."""
        return DTYPES[self.engine.manifest.dtype]

    @property
    def device(self) -> torch.device:
        """The GPU that the engines are on."""
        return torch.device("cuda", self.engine.device)

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The transformer's own ``forward``, with its parameters: some pipelines read them.

        A call may differ from the compiled one in its tensors' contents, in lengths that can be padded, and in dtypes:
        results are then in the one that the pipeline computes in. On the GPU it runs in torch's current stream and does
        not wait; tensors in host memory are copied.

        Raises:
            InputError: a constant, a shape or None-ness is not that of the compiled call.
            EngineError: the run fails.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        forward.__signature__ = self._signature  # type: ignore[attr-defined]
        return forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what runs is TensorRT's: there is nothing to trace
    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        bound = bind(self._ways[0].call.parameters, args, kwargs)
        return_dict = bound.pop("return_dict", None)
        given = flatten(bound)
        refusals = []
        for way in self._ways:
            try:
                return way.run(given, return_dict)
            except InputError as refusal:  # before anything runs
                refusals.append(refusal)
        if len(refusals) == 1:
            raise refusals[0]
        names = [engine.manifest.engine.file for engine in self.engines]
        causes = " ".join(f"{name}: {r.cause}" for name, r in zip(names, refusals, strict=True))
        raise InputError(f"No engine serves this call. {causes}", refusals[0].remedy)

    @contextmanager
    def cache_context(self, name: str, **state: Any) -> Iterator[None]:
        """Nothing: an engine has no caches that conditional and unconditional runs would have to keep apart."""
        yield

    @property
    def is_cache_enabled(self) -> bool:
        """Never: diffusers' caches are hooks on blocks, which an engine has not."""
        return False

    def to(self, *arguments: Any, **keywords: Any) -> EngineModule:
        """Itself, if that asks for nothing else than what the engine is.

        Raises:
            InputError: it asks for another device or dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **keywords)
        if device is not None and (device.type != "cuda" or device.index not in (None, self.engine.device)):
            raise InputError(
                f"The engine is on {self.device} and cannot move to {device}.",
                f"Move the pipeline to {self.device}, or load the engine with device=.",
            )
        if dtype is not None and dtype != self.dtype:
            raise InputError(
                f"The engine computes in {self.dtype} and cannot turn to {dtype}.",
                "Compile it with another model.dtype.",
            )
        return self

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines:
            engine.close()

    def __getattr__(self, name: str) -> Any:
        """What else pipelines ask of a transformer; see ``ModelClass``."""
        if name.startswith("_") or "_class" not in self.__dict__:
            return super().__getattr__(name)
        return self._class.attribute(name)


class _Way:
    """An engine, and how the pipeline calls the transformer that it was compiled for."""

    def __init__(self, engine: Engine, cuda_graph: bool) -> None:
        assert engine.manifest.call is not None, "load has checked it"
        self.call = engine.manifest.call
        self._engine = engine
        self._checked: dict[
            str, tuple[weakref.ref[torch.Tensor], int]
        ] = {}  # fixed tensors: object and version
        self._context = engine.context(cuda_graph=cuda_graph)

    def run(self, given: Arguments, return_dict: bool | None) -> Any:
        """The result of a call.

        Raises:
            InputError: the engine does not serve such a call. EngineError: the run fails.
        """
        check_constants(self.call, given)
        tensors = {name: torch.as_tensor(tensor) for name, tensor in given.tensors.items()}
        device = next((t.device for t in tensors.values() if t.device.type == "cuda"), torch.device("cpu"))
        inputs = fitted(self.call, self._engine.inputs, tensors, device)
        self._check_fixed(tensors, inputs)
        outputs = self._run(inputs, device)
        return result_of(
            self.call.result, _converted(outputs, self.call, tensors), return_dict, self.call.returns
        )

    def _check_fixed(self, given: Tensors, inputs: Tensors) -> None:
        """Whether tensors whose content the graph fixes are the compiled call's. A pipeline gives the same objects in
        every step: each is read once.
        """
        for fixed in self.call.fixed:
            whole = inputs.get(fixed.tensor, given.get(fixed.tensor))
            source = given.get(fixed.tensor, whole)
            if source is None or whole is None:
                continue  # its absence was compared
            seen, version = self._checked.get(fixed.tensor, (lambda: None, -1))
            if seen() is source and version == source._version:
                continue
            if digest_of(whole) != fixed.sha256:
                raise InputError(
                    f"'{fixed.tensor}' is not that of the compiled call, which {fixed.where} decides on: the engine "
                    "was compiled for that one alone.",
                    "Call it as it was recorded (prompts of one length, one size), or compile another engine for this.",
                )
            self._checked[fixed.tensor] = weakref.ref(source), source._version

    def _run(self, inputs: Tensors, device: torch.device) -> dict[str, torch.Tensor]:
        """Outputs are torch's: their memory goes back to its allocator, which knows of its streams."""
        shapes = self._context.output_shapes({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        outputs = {
            tensor.name: torch.empty(shapes[tensor.name], dtype=DTYPES[tensor.dtype], device=device)
            for tensor in self._engine.outputs
        }
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        self._context.run(inputs, outputs=outputs, stream=stream)
        return outputs


class Config(dict[str, Any]):
    """A model's configuration, whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the model's configuration has no '{name}'")
        return self[name]


def fitted(
    call: Call, inputs: tuple[Tensor, ...], given: Tensors, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the engine takes: its inputs in its dtypes, on ``device``, padded where the manifest says so.

    Complex numbers are pairs, in a last dimension of 2.

    Raises:
        InputError: a length is beyond the engine's, or a number would lose its fraction.
    """
    given = {**given, **_whole_masks(call, given)}
    out = {}
    for tensor in inputs:
        value = given[tensor.name].detach().to(device)
        if value.is_complex():
            value = torch.view_as_real(value)
        for pad in call.padding:
            if pad.tensor == tensor.name:
                value = _padded(value, pad, tensor)
        out[tensor.name] = _as_dtype(value, tensor).contiguous()
    return out


def digest_of(value: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and content."""
    head = f"{dtype_of(value)} {list(value.shape)} ".encode()
    content = value.detach().cpu().contiguous().flatten().clone().view(torch.uint8)
    return hashlib.sha256(head + content.numpy().tobytes()).hexdigest()


def _whole_masks(call: Call, given: Tensors) -> dict[str, torch.Tensor]:
    """Masks of ones for those that a call leaves out: all that it gives counts."""
    out: dict[str, torch.Tensor] = {}
    for pad in call.padding:
        if pad.mask in given or pad.mask in out or pad.tensor not in given:
            continue
        value, axes = given[pad.tensor], [p.axis for p in call.padding if p.tensor == pad.mask]
        dtype = call.tensors[pad.mask]
        if axes != [1] or "float" in dtype:
            raise InputError(
                f"This call gives no '{pad.mask}', which the engine needs to tell padding.", "Give that mask."
            )
        shape = (value.shape[0], value.shape[pad.axis])
        out[pad.mask] = torch.ones(shape, dtype=getattr(torch, dtype), device=value.device)
    return out


def _padded(value: torch.Tensor, pad: Padding, wanted: Tensor) -> torch.Tensor:
    """Zeros behind ``value``; behind a mask, what leaves them out."""
    if value.ndim != len(wanted.shape):
        return value  # the engine says what it takes
    length, due = value.shape[pad.axis], wanted.shape[pad.axis]
    if length > due != -1:
        raise InputError(
            f"'{wanted.name}' has {length} entries, and the engine was compiled for at most {due}.",
            "Shorten the prompt (most pipelines have max_sequence_length), or compile for longer ones.",
        )
    if length == due or due == -1:
        return value
    shape = [*value.shape]
    shape[pad.axis] = due
    # A mask of numbers is 1 for what counts, or is added to the attention: 0 for what counts.
    is_added = pad.tensor == pad.mask and value.is_floating_point() and not bool((value > 0).any())
    out = value.new_full(shape, IGNORED if is_added else 0)
    out.narrow(pad.axis, 0, length).copy_(value)
    return out


def _as_dtype(value: torch.Tensor, wanted: Tensor) -> torch.Tensor:
    dtype = DTYPES[wanted.dtype]
    if value.is_floating_point() and not dtype.is_floating_point:
        raise InputError(
            f"'{wanted.name}' is {dtype_of(value)}, and the engine was compiled for {dtype_of(wanted)}.",
            "Use the scheduler and dtypes of the recorded pipeline.",
        )
    return value.to(dtype)


def _converted(outputs: Tensors, call: Call, given: Tensors) -> Tensors:
    """Results for a pipeline that computes in another dtype than the recorded one did."""
    for name, value in given.items():
        if value.is_floating_point() and name in call.tensors:
            if dtype_of(value) == call.tensors[name]:
                return outputs
            return {key: t.to(value.dtype) if t.is_floating_point() else t for key, t in outputs.items()}
    return outputs
