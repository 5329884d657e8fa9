# SPDX-License-Identifier: Apache-2.0
"""A recording: the calls that a pipeline made of its transformer, on disk, readable without the pipeline.

A folder of ``recording.json`` (what was recorded), and per sample (one run of the pipeline) a JSON file with its
calls and a safetensors file with those of their tensors that no earlier sample holds. A tensor's name there is a hash
of its dtype, shape and bytes, so that conditioning that repeats, or is rebuilt with the same content, is stored once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from lynx_compile.engine.arguments import (
    Parameter,
    Schema,
    Structure,
    differences,
    dtype_of,
    flatten,
    schema,
    unflatten,
)
from lynx_compile.errors import InputError, first_line
from lynx_compile.files.atomic import strict_json

VERSION = 1
HELD_OUT = 8  # one sample of so many, where none was recorded to be
MOST_WAYS = 4  # in which one transformer may be called: each is an engine, with weights of its own
T = TypeVar("T")


@dataclass(frozen=True)
class Component:
    """A recorded module. ``class_name``: ``module:Class``. ``config``: as it was at the first call.

    ``returns``: how many values the tuple had that it returned; None where it returned none.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    parameters: tuple[Parameter, ...]
    returns: int | None = None


@dataclass(frozen=True)
class Header:
    """What was recorded. ``key``: digest of everything that the recording depends on. ``samples``: runs.

    ``held_out``: runs that nothing is fitted to, from which errors are reported.
    """

    version: int
    key: str
    pipeline: str
    components: tuple[Component, ...]
    samples: int
    held_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Signature:
    """What calls share but for the tensors' content. ``calls``: how many there were, recorded or not.

    ``results``: shapes of the tensors that they returned.
    """

    component: str
    structure: Structure
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    calls: int = 0
    results: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Call:
    """A recorded call.

    ``index``: counts the component's calls of the sample, recorded or not. ``branch``: the pipeline's own name of
    the guidance branch where it has one, else a number that counts the calls of the step.
    ``signature``: which of the sample's. ``blobs``: {argument: hash}.
    """

    component: str
    sample: int
    index: int
    step: int
    branch: str
    signature: int
    blobs: dict[str, str]


@dataclass(frozen=True)
class Sample:
    """One run of the pipeline. ``blobs``: tensors that its own safetensors file holds."""

    signatures: tuple[Signature, ...]
    calls: tuple[Call, ...]
    blobs: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """A size that differs between calls: always ``offset`` more than what ``symbol`` stands for.

    ``mask``: an input that tells which entries of this axis count, so that it can be padded; None if there is none.
    """

    tensor: str
    axis: int
    smallest: int
    largest: int
    symbol: str
    mask: str | None
    offset: int = 0


@dataclass(frozen=True)
class Group:
    """Calls that one graph serves: they differ in sizes and contents of tensors alone.

    ``calls``: those recorded. ``calls_made``: by the pipeline.
    """

    component: str
    index: int
    schema: Schema
    axes: tuple[Axis, ...]
    calls: tuple[Call, ...]
    calls_made: int


def part_name(way: Group, ways: tuple[Group, ...]) -> str:
    """The component where there are several, and the number of the way where it is called in several."""
    components = {other.component for other in ways}
    of_its_own = [other for other in ways if other.component == way.component]
    names = [way.component] * (len(components) > 1) + [str(way.index)] * (len(of_its_own) > 1)
    return ".".join(names)


@dataclass(frozen=True)
class Recording:
    """Recorded calls, read from ``folder`` when they are asked for."""

    folder: Path

    @cached_property
    def header(self) -> Header:
        """What was recorded."""
        return read(self.folder / "recording.json", Header)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the recorded modules in their pipeline."""
        return tuple(component.name for component in self.header.components)

    def component(self, name: str) -> Component:
        """A recorded module.

        Raises:
            InputError: it was not recorded.
        """
        for component in self.header.components:
            if component.name == name:
                return component
        raise InputError(
            f"{self.folder} holds no calls of '{name}'.", f"It has those of {', '.join(self.components)}."
        )

    def calls(self, component: str) -> tuple[Call, ...]:
        """The component's recorded calls, in the order they were made."""
        self.component(component)
        return tuple(c for sample in self._samples for c in sample.calls if c.component == component)

    def held_out(self, calls: Sequence[Call]) -> set[int]:
        """Positions of the calls that nothing is fitted to, and from which errors are reported.

        They are those of the samples kept apart; where there are none among the calls, or no others, every eighth
        sample's, the last one's at least; of one sample every eighth call, the last one at least.
        """
        apart = {number for number, call in enumerate(calls) if call.sample in self.header.held_out}
        if 0 < len(apart) < len(calls):
            return apart
        samples = {call.sample for call in calls}
        units = [call.sample if len(samples) > 1 else number for number, call in enumerate(calls)]
        order = sorted(set(units))
        out = set(order[HELD_OUT - 1 :: HELD_OUT] or order[-1:])
        return {number for number, unit in enumerate(units) if unit in out}

    def signature(self, call: Call) -> Signature:
        """Structure, dtypes and shapes of a call."""
        return self._samples[call.sample].signatures[call.signature]

    def tensors(self, call: Call) -> dict[str, torch.Tensor]:
        """The call's tensors by their flat names, on the CPU.

        Raises:
            InputError: a file of the recording is damaged.
        """
        known = self.signature(call)
        files = {name: self._file(blob) for name, blob in call.blobs.items()}
        tensors: dict[str, torch.Tensor] = {}
        for path in dict.fromkeys(files.values()):
            names = {name: call.blobs[name] for name, file in files.items() if file == path}
            tensors |= _tensors(path, names)
        for name, tensor in tensors.items():
            is_known = (dtype_of(tensor), tuple(tensor.shape)) == (known.dtypes[name], known.shapes[name])
            if not is_known or blob_of(tensor) != call.blobs[name]:
                raise _damaged(files[name], f"'{name}' is another tensor")
        return {name: tensors[name] for name in call.blobs}

    def arguments(self, call: Call) -> dict[str, Any]:
        """Every parameter of ``forward`` with its nested value, as the pipeline gave it."""
        return dict(unflatten(self.signature(call).structure, self.tensors(call)))

    def groups(self, component: str) -> tuple[Group, ...]:
        """The component's calls by the graph that serves them, in the order of their first calls."""
        self.component(component)
        found: dict[str, list[tuple[int, int, Signature]]] = {}
        for number, sample in enumerate(self._samples):
            for place, signature in enumerate(sample.signatures):
                if signature.component == component:
                    found.setdefault(schema_key(signature), []).append((number, place, signature))
        calls = self.calls(component)
        groups = []
        for index, members in enumerate(found.values()):
            places = {(number, place) for number, place, _ in members}
            signatures = [signature for _, _, signature in members]
            groups.append(
                Group(
                    component=component,
                    index=index,
                    schema=schema_of(signatures[0]),
                    axes=_axes(signatures),
                    calls=tuple(c for c in calls if (c.sample, c.signature) in places),
                    calls_made=sum(signature.calls for signature in signatures),
                )
            )
        return tuple(groups)

    def ways(self) -> tuple[Group, ...]:
        """The groups of all components: an engine each.

        Raises:
            InputError: a component is called in so many ways that an engine for each is no answer.
        """
        found: list[Group] = []
        for name in self.components:
            groups = self.groups(name)
            if len(groups) > MOST_WAYS:
                raise InputError(
                    f"'{name}' is called in {len(groups)} ways, each of which needs an engine of its own. "
                    f"{' '.join(_described(groups)[:6])}",
                    "Record calls that differ in tensors alone: one size, one kind of guidance, encoded prompts of "
                    "one length.",
                )
            found += groups
        return tuple(found)

    def example(self, component: str, group: int = 0) -> dict[str, Any]:
        """Arguments of the first recorded call of a group: what an export runs with."""
        return self.arguments(self.groups(component)[group].calls[0])

    def describe(self) -> list[str]:
        """Lines for the user: what was recorded, which sizes vary, and why there is more than one graph."""
        return [line for name in self.components for line in _described(self.groups(name))]

    @cached_property
    def _samples(self) -> tuple[Sample, ...]:
        found = tuple(read(sample_path(self.folder, i), Sample) for i in range(self.header.samples))
        for sample in found:
            for call in sample.calls:
                if not (0 <= call.sample < len(found) and 0 <= call.signature < len(sample.signatures)):
                    raise _damaged(self.folder, "a call names what is not there")
        return found

    @cached_property
    def _places(self) -> dict[str, int]:
        return {blob: i for i, sample in enumerate(self._samples) for blob in sample.blobs}

    def _file(self, blob: str) -> Path:
        if blob not in self._places:
            raise _damaged(self.folder, f"the tensor {blob} is missing")
        return tensors_path(self.folder, self._places[blob])


def load(folder: Path) -> Recording:
    """Open a whole recording.

    Raises:
        InputError: there is none, it is incomplete, damaged, or of another version.
    """
    recording = Recording(folder)
    header = recording.header
    if header.version != VERSION:
        raise InputError(f"{folder} is a recording of version {header.version}.", "Record it again.")
    done = count_samples(folder, header.samples)
    if done < header.samples:
        raise InputError(
            f"The recording {folder} is incomplete: {done} of {header.samples} samples are there.",
            "Run the same capture again; it goes on where it stopped.",
        )
    for name in recording.components:
        recording.calls(name)
    return recording


def schema_of(signature: Signature) -> Schema:
    """What of a signature must not change within a graph."""
    tensors = {
        name: torch.empty(signature.shapes[name], dtype=getattr(torch, dtype), device="meta")
        for name, dtype in signature.dtypes.items()
    }
    return schema(flatten(unflatten(signature.structure, tensors)))


def schema_key(signature: Signature) -> str:
    """Equal for signatures that one graph serves."""
    found = schema_of(signature)
    types = {name: [kind.dtype, kind.rank] for name, kind in found.tensors.items()}
    return json.dumps([signature.component, types, found.constants], sort_keys=True)


def blob_of(tensor: torch.Tensor) -> str:
    """The name of a contiguous CPU tensor in a recording: a hash of its dtype, shape and bytes."""
    digest = hashlib.sha256(f"{dtype_of(tensor)} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:40]


def read(path: Path, kind: type[T]) -> T:
    """A dataclass from its JSON file.

    Raises:
        InputError: the file is missing or holds something else.
    """
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    try:
        return adapter.validate_python(strict_json(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.", "Give the folder of a recording.") from None
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise _damaged(path, first_line(error)) from None


def count_samples(folder: Path, samples: int) -> int:
    """How many samples are there, from the first on. A sample's JSON is written last."""
    return next((i for i in range(samples) if not sample_path(folder, i).exists()), samples)


def sample_path(folder: Path, sample: int) -> Path:
    """The JSON file of a sample."""
    return folder / "samples" / f"{sample:05}.json"


def tensors_path(folder: Path, sample: int) -> Path:
    """The safetensors file of a sample."""
    return sample_path(folder, sample).with_suffix(".safetensors")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"The recording {path} is damaged ({why}).", "Record it again.")


def _tensors(path: Path, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """{name: tensor} of {name: blob} in one file."""
    try:
        with safe_open(path, "pt") as file:
            # Copied to where torch puts tensors, at multiples of 64 bytes: MKL adds up in another order elsewhere (seen
            # on an AMD EPYC), and a replay would differ from the pipeline in the last bit.
            return {name: file.get_tensor(blob).clone() for name, blob in names.items()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None


def _axes(signatures: Sequence[Signature]) -> tuple[Axis, ...]:
    """Sizes that differ between the signatures of a group."""
    sizes = {
        (name, axis): tuple(signature.shapes[name][axis] for signature in signatures)
        for name, shape in signatures[0].shapes.items()
        for axis in range(len(shape))
    }
    varying = {place: values for place, values in sizes.items() if len(set(values)) > 1}
    names: dict[tuple[int, ...], list[str]] = {}
    for (name, _), values in varying.items():
        names.setdefault(values, []).append(name)
    symbols = _symbols(list(names))
    masks = {
        values: mask
        for values, of_size in names.items()
        for mask in of_size
        if _is_mask(mask)
        and not all(map(_is_mask, of_size))  # a mask of nothing but masks marks something else
    }
    # A text that is padded is longer than what counts its tokens without a mask: then neither is.
    bare = {symbols[values][0] for values in names if values not in masks}
    # Nor where the result is as long: it would come back padded.
    bare |= {symbols[values][0] for values in symbols if _step(values) in _result_steps(signatures)}
    return tuple(
        Axis(
            name, axis, min(values), max(values), symbols[values][0],
            None if symbols[values][0] in bare else masks[values], symbols[values][1],
        )
        for (name, axis), values in varying.items()
    )  # fmt: skip


def _symbols(sizes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[str, int]]:
    """{sizes: symbol and offset}. Sizes that always differ by the same, as with an image behind a text, share one."""
    steps = {values: _step(values) for values in sizes}
    smallest: dict[tuple[int, ...], int] = {}
    for values, step in steps.items():
        smallest[step] = min(values[0], smallest.get(step, values[0]))
    symbols = {step: f"s{i}" for i, step in enumerate(smallest)}
    return {values: (symbols[step], values[0] - smallest[step]) for values, step in steps.items()}


def _step(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How a size changes from the first."""
    return tuple(size - sizes[0] for size in sizes)


def _result_steps(signatures: Sequence[Signature]) -> set[tuple[int, ...]]:
    """How the sizes of the results change between the signatures, where they do."""
    shapes = [[size for shape in signature.results for size in shape] for signature in signatures]
    if len({len(sizes) for sizes in shapes}) > 1:
        return set()
    return {step for sizes in zip(*shapes, strict=True) if any(step := _step(sizes))}


def _is_mask(name: str) -> bool:
    return "mask" in name.rpartition(".")[2]


def _described(groups: Sequence[Group]) -> list[str]:
    lines = []
    for group in groups:
        name = group.component if len(groups) == 1 else f"{group.component}, graph {group.index}"
        lines.append(f"{name}: {len(group.calls)} of {group.calls_made} calls recorded")
        if group.index:
            why = differences(groups[0].schema, group.schema)
            lines.append(f"  differs from graph 0: {'; '.join(why[:3])}{'; ...' if len(why) > 3 else ''}")
        for axis in group.axes:
            how = f"can be padded, with {axis.mask}" if axis.mask else "no mask tells of padding"
            lines.append(f"  {axis.tensor}[{axis.axis}]: {axis.smallest} to {axis.largest} ({how})")
    return lines
