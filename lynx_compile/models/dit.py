# SPDX-License-Identifier: Apache-2.0
"""The transformer to compile: its checkpoint, the call that is compiled, and its linears."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lynx_compile.engine.arguments import flatten, unflatten
from lynx_compile.models import families
from lynx_compile.models.checkpoint import Checkpoint
from lynx_compile.models.onnx_source import OnnxSource
from lynx_compile.models.place import on_gpu, reclaim
from lynx_compile.models.recording import Axis, Call, Component, Group, Recording
from lynx_compile.models.streamed import Streamed, has_room
from lynx_compile.models.structure import Linear, LinearGroup, find_structure
from lynx_compile.models.weightless import Weightless

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiT:
    """A diffusion transformer. Its weights are loaded when ``module`` is first asked for.

    ``recorded``: how its pipeline calls it. ``component``: its name there. ``calls``: the recorded calls that one graph
    serves. ``arguments``: those of ``forward`` that are compiled, nested; floating tensors have the dtypes of the
    engine's inputs. ``axes``: those of them whose length a run decides.
    ``groups``: every linear of the module, grouped by the tensor it reads. ``digest``: of the checkpoint.
    """

    checkpoint: Checkpoint | OnnxSource
    recorded: Component
    digest: str
    component: str
    calls: Group
    dtype: torch.dtype
    arguments: Mapping[str, Any]
    axes: tuple[Axis, ...]
    groups: tuple[LinearGroup, ...]

    @cached_property
    def module(self) -> torch.nn.Module:
        """In float32 on a CPU, in the engine's dtype on a GPU; block by block where it does not fit as a whole."""
        return self.checkpoint.load(*self._place) if self._streamed is None else self._streamed.module

    @property
    def device(self) -> torch.device:
        """Where ``module`` runs."""
        return torch.device(self._place[1])

    @property
    def is_streamed(self) -> bool:
        """Whether a block of ``module`` has weights only while it is in use."""
        return self._streamed is not None

    def resident(self, block: str) -> AbstractContextManager[None]:
        """Keep the weights of a block of ``module`` meanwhile."""
        return nullcontext() if self._streamed is None else self._streamed.resident(block)

    @property
    def _place(self) -> tuple[torch.dtype, str]:
        return (self.dtype, "cuda") if on_gpu() else (torch.float32, "cpu")

    @cached_property
    def _streamed(self) -> Streamed | None:
        if isinstance(self.checkpoint, OnnxSource) or has_room(self.checkpoint, *self._place):
            return None
        log.info("the weights do not fit into memory: they are loaded block by block")
        return Streamed(self.checkpoint, *self._place)

    def module_on_cpu(self, dtype: torch.dtype) -> torch.nn.Module:
        """The module on the CPU in ``dtype``: ``module`` if it is that already, else read anew, not copied."""
        loaded: torch.nn.Module | None = self.__dict__.get("module")
        if loaded is not None and not self.is_streamed:
            parameter = next(loaded.parameters())
            if (parameter.dtype, parameter.device.type) == (dtype, "cpu"):
                return loaded
        return self.checkpoint.load(dtype)

    def release(self) -> None:
        """Forget ``module``, whose memory a later stage needs; it is read again where it is asked for again."""
        self.__dict__.pop("module", None)
        self.__dict__.pop("_streamed", None)
        reclaim()

    def taken(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """What ``module`` takes of a recorded call."""
        source = self.checkpoint
        return source.taken(arguments) if isinstance(source, OnnxSource) else arguments

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors of ``arguments`` by their flat names: the graph's inputs."""
        return flatten(self.arguments).tensors

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)


def find_dit(
    checkpoint: Checkpoint | OnnxSource, recording: Recording, calls: Group, dtype: torch.dtype
) -> DiT:
    """The transformer as its pipeline calls it in ``calls``.

    Raises:
        InputError: the module cannot be run without weights, or not in ``dtype``.
    """
    component = calls.component
    arguments, axes = compiled_arguments(recording, calls)
    if isinstance(checkpoint, OnnxSource):
        arguments = dict(checkpoint.taken(arguments))
    return DiT(
        checkpoint=checkpoint,
        recorded=recording.component(component),
        digest=checkpoint.digest(),
        component=component,
        calls=calls,
        dtype=dtype,
        arguments=arguments
        if isinstance(checkpoint, OnnxSource)
        else in_engine_dtypes(checkpoint, arguments, dtype),
        axes=axes,
        groups=_groups(checkpoint, arguments, dtype),
    )


def find_groups(
    checkpoint: Checkpoint | OnnxSource, recording: Recording, calls: Group, dtype: torch.dtype
) -> tuple[LinearGroup, ...]:
    """``DiT.groups`` alone: the weights' files are not read, nor digested, which takes minutes of a large model.

    Raises:
        InputError: the module cannot be run without weights.
    """
    arguments, _ = compiled_arguments(recording, calls)
    if isinstance(checkpoint, OnnxSource):
        arguments = dict(checkpoint.taken(arguments))
    return _groups(checkpoint, arguments, dtype)


def _groups(
    checkpoint: Checkpoint | OnnxSource, arguments: Mapping[str, Any], dtype: torch.dtype
) -> tuple[LinearGroup, ...]:
    # A pipeline that was recorded in half precision, as on a GPU, gives tensors that fit no weights in float32.
    recorded = dtype if any(map(_is_half, flatten(arguments).tensors.values())) else torch.float32
    skeleton = checkpoint.build("meta", recorded)
    return find_structure(skeleton, arguments, lambda: checkpoint.load(recorded)).groups


def compiled_arguments(recording: Recording, calls: Group) -> tuple[dict[str, Any], tuple[Axis, ...]]:
    """Arguments that stand for all calls of a graph, and their axes that cannot be padded to one length.

    They are those of the longest call; what a mask lets pad has the greatest length of any.
    """
    bare = tuple(axis for axis in calls.axes if axis.mask is None)

    def length(call: Call) -> int:
        shapes = recording.signature(call).shapes
        return sum(shapes[axis.tensor][axis.axis] for axis in bare)

    arguments = recording.arguments(max(calls.calls, key=length))
    if any(p.name == "return_dict" for p in recording.component(calls.component).parameters):
        arguments["return_dict"] = True  # both forms of the result can be made from this one
    return _padded(arguments, calls.axes), bare


def _padded(arguments: Mapping[str, Any], axes: Sequence[Axis]) -> dict[str, Any]:
    """The arguments at the greatest length of every axis that a mask lets pad; what the mask leaves out is zero."""
    flat = flatten(arguments)
    tensors = dict(flat.tensors)
    for axis in axes:
        if axis.mask is None:
            continue
        tensor = tensors[axis.tensor]
        missing = [0, 0] * (tensor.ndim - 1 - axis.axis) + [0, axis.largest - tensor.shape[axis.axis]]
        tensors[axis.tensor] = torch.nn.functional.pad(tensor, missing)
    return dict(unflatten(flat.structure, tensors))


def in_engine_dtypes(
    checkpoint: Checkpoint, arguments: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of a float32 pipeline as the engine takes them: ``dtype``, but float32 where the module takes that.

    A pipeline that was recorded in half precision has decided that itself, but for float64, which no engine takes:
    float32 too. Elsewhere each floating input is tried in float32 without weights: what a linear of ``dtype`` reads
    cannot be, times and positions can.

    Raises:
        InputError: the module does not run in ``dtype``.
    """
    flat = flatten(arguments)
    halves = {
        n: t.to(dtype) if _is_half(t) else t.float() if t.dtype == torch.float64 else t
        for n, t in flat.tensors.items()
    }
    if any(_is_half(t) for t in flat.tensors.values()):
        return dict(unflatten(flat.structure, halves))
    floats = [name for name, t in flat.tensors.items() if t.is_floating_point()]
    skeleton = checkpoint.build("meta", dtype)
    families.prepare(skeleton)  # as it is traced
    everything = halves | {name: halves[name].to(dtype) for name in floats}
    expected = _result_dtypes(skeleton, flat.structure, everything)
    if expected is None:
        log.warning(
            "Which inputs the model takes in float32 cannot be told without its weights: all have %s.", dtype
        )
        return dict(unflatten(flat.structure, everything))
    for name in floats:
        tried = everything | {name: halves[name].float()}
        if _result_dtypes(skeleton, flat.structure, tried) == expected:
            everything = tried
    return dict(unflatten(flat.structure, everything))


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _result_dtypes(
    skeleton: torch.nn.Module, structure: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> list[torch.dtype] | None:
    """Dtypes of what the module returns for such arguments; None where it refuses them."""
    arguments = unflatten(dict(structure), tensors)
    try:
        with torch.no_grad(), warnings.catch_warnings(), Weightless(arguments):
            warnings.simplefilter("ignore")
            result = skeleton(**arguments)
    except Exception:  # whatever torch says of dtypes that do not fit
        return None
    return [tensor.dtype for tensor in flatten(result, "output").tensors.values()]
