# SPDX-License-Identifier: Apache-2.0
"""Write a recording sample by sample, with nothing but the current call in memory."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from lynx_compile.engine.arguments import Arguments, dtype_of
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import save_text
from lynx_compile.files.tensors import TensorSpec, write_tensors
from lynx_compile.models.recording import (
    Call,
    Component,
    Header,
    Sample,
    Signature,
    blob_of,
    read,
    sample_path,
    schema_key,
    tensors_path,
)


class Writer:
    """A recording that grows by samples, and takes over those of an earlier writer of the same key.

    ``components``: those recorded; None until the first sample is there. ``missing``: samples that are not there.
    ``schemas``: keys of the graphs that the first sample's calls need. ``calls``: how many it made, by component.
    Several processes may write different samples.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        """``header``: of the whole recording, but for its components."""
        self.components: tuple[Component, ...] | None = None
        self.missing = set(range(header.samples))
        self.schemas: set[str] = set()
        self.calls: dict[str, int] = {}
        self._folder = folder
        self._header = header
        self._blobs: set[str] = set()
        sample_path(folder, 0).parent.mkdir(parents=True, exist_ok=True)
        old = _header(folder)
        if old is None or replace(old, components=()) != self._header:
            _clear(folder)
            return
        self.components = old.components
        for number in range(header.samples):
            if sample_path(folder, number).exists():
                self._note(number, read(sample_path(folder, number), Sample))

    def begin(self, number: int) -> SampleWriter:
        """A sample, to be filled and given to ``finish``."""
        return SampleWriter(self._folder, number)

    def finish(self, sample: SampleWriter, components: tuple[Component, ...]) -> None:
        """Write the calls of these components: first the tensors, and last the JSON that makes the sample count."""
        content = sample.content({component.name for component in components}, self._blobs)
        if content.blobs:
            write_tensors(
                tensors_path(self._folder, sample.number), [sample.spec(blob) for blob in content.blobs]
            )
        if self.components is None:
            self.components = components
            _save(self._folder / "recording.json", replace(self._header, components=components))
        _save(sample_path(self._folder, sample.number), content)
        self._note(sample.number, content)

    def _note(self, number: int, content: Sample) -> None:
        self._blobs.update(content.blobs)
        if number == 0:
            self.schemas.update(schema_key(signature) for signature in content.signatures)
            for signature in content.signatures:
                self.calls[signature.component] = self.calls.get(signature.component, 0) + signature.calls
        self.missing.discard(number)


class SampleWriter:
    """The calls of one run of the pipeline. Tensors go to a temporary file at once."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._specs: dict[str, TensorSpec] = {}
        self._signatures: list[Signature] = []
        self._places: dict[str, int] = {}
        self._calls: dict[tuple[str, int], Call] = {}

    def count(self, component: str, arguments: Arguments) -> int:
        """Note a call; returns the place of its signature among the sample's."""
        dtypes = {name: dtype_of(tensor) for name, tensor in arguments.tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in arguments.tensors.items()}
        key = json.dumps([component, arguments.structure, dtypes, shapes])
        place = self._places.setdefault(key, len(self._signatures))
        if place == len(self._signatures):
            self._signatures.append(Signature(component, arguments.structure, dtypes, shapes))
        known = self._signatures[place]
        self._signatures[place] = replace(known, calls=known.calls + 1)
        return place

    def note_results(self, place: int, results: tuple[tuple[int, ...], ...]) -> None:
        """The shapes that the calls at this place return."""
        self._signatures[place] = replace(self._signatures[place], results=results)

    def signature(self, place: int) -> Signature:
        """The signature at a place that ``count`` returned."""
        return self._signatures[place]

    def keep(self, call: Call, arguments: Arguments) -> None:
        """Store a call, which has no ``blobs`` yet, and its tensors."""
        blobs = {name: self._store(tensor) for name, tensor in arguments.tensors.items()}
        self._calls[call.component, call.index] = replace(call, sample=self.number, blobs=blobs)

    def drop(self, component: str, index: int) -> None:
        """Forget a stored call."""
        del self._calls[component, index]

    def content(self, components: set[str], known: set[str]) -> Sample:
        """What goes to disk, of these components: blobs that are ``known`` are there already."""
        places = [i for i, signature in enumerate(self._signatures) if signature.component in components]
        calls = tuple(
            replace(call, signature=places.index(call.signature))
            for call in self._calls.values()
            if call.component in components
        )
        blobs = {blob for call in calls for blob in call.blobs.values()} - known
        return Sample(tuple(self._signatures[i] for i in places), calls, tuple(sorted(blobs)))

    def spec(self, blob: str) -> TensorSpec:
        """A stored tensor, to be read when it is written."""
        return self._specs[blob]

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    def _store(self, tensor: torch.Tensor) -> str:
        """Copy the tensor to the end of the file, unless its content is there; returns its hash."""
        fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(
            tensor
        )  # on the CPU, contiguous whatever it was
        shape, dtype = tuple(fresh.shape), fresh.dtype
        data = fresh.flatten().view(torch.uint8).numpy().data
        blob = blob_of(fresh)
        if blob not in self._specs:
            start, size = self._file.seek(0, 2), len(data)
            self._file.write(data)
            self._specs[blob] = TensorSpec(blob, dtype, shape, lambda: self._load(start, size, dtype, shape))
        return blob

    def _load(self, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if not size:
            return torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=dtype).reshape(shape)


def _header(folder: Path) -> Header | None:
    """That of an earlier run, if it can be read."""
    try:
        return read(folder / "recording.json", Header)
    except InputError:
        return None


def _clear(folder: Path) -> None:
    """Remove an earlier recording, and nothing else."""
    (folder / "recording.json").unlink(missing_ok=True)
    for pattern in ("[0-9]*.json", "[0-9]*.safetensors"):
        for path in (folder / "samples").glob(pattern):
            path.unlink()


def _save(path: Path, value: Any) -> None:
    values = TypeAdapter(type(value)).dump_python(value, mode="json")
    save_text(path, json.dumps(values, separators=(",", ":")) + "\n")
