# SPDX-License-Identifier: Apache-2.0
"""External weights: from a safetensors file, whose header is not trusted, into GPU memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lynx_compile.engine.arrays import DTYPES, MOST_DIMENSIONS, size_of
from lynx_compile.engine.cuda import ALIGNMENT, Gpu, Memory
from lynx_compile.engine.manifest import Manifest, Tensor
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import strict_json
from lynx_compile.files.progress import Progress

LARGEST_HEADER = 16 << 20  # FLUX.1-dev's is 0.1 MB
PIECE = 32 << 20  # bytes that are read, digested and copied at once

_names = {dtype.safetensors: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Range:
    """A tensor of the file, from byte ``start`` up to ``end`` of it."""

    tensor: Tensor
    start: int
    end: int


@dataclass(frozen=True)
class WeightsFile:
    """An open file whose header fits the manifest. ``ranges``: of the tensors to bind, in the file's order."""

    path: Path
    file: BinaryIO
    header: bytes
    size: int
    sha256: str
    ranges: tuple[Range, ...]


@contextmanager
def open_weights(folder: Path, manifest: Manifest) -> Iterator[WeightsFile | None]:
    """Open the manifest's weights file and check its header; None when the weights are in the engine.

    Raises:
        InputError: the file is missing, cut off or no safetensors file, or lacks a tensor of the manifest or has
            it with another shape or dtype.
    """
    weights = manifest.weights
    if weights.file is None or weights.sha256 is None:
        yield None
        return
    path = folder / weights.file
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        size = file.seek(0, 2)
        header = _header_bytes(path, file, size)
        found = {range_.tensor.name: range_ for range_ in parse_header(path, header, size)}
        for wanted in weights.tensors:
            if (range_ := found.get(wanted.name)) is None:
                raise InputError(f"{path} holds no tensor '{wanted.name}'.", _STALE)
            if range_.tensor != wanted:
                raise InputError(
                    f"{path}: '{wanted.name}' is {said(range_.tensor)}, and the engine takes {said(wanted)}.",
                    _STALE,
                )
        ranges = sorted((found[tensor.name] for tensor in weights.tensors), key=lambda range_: range_.start)
        yield WeightsFile(path, file, header, size, weights.sha256, tuple(ranges))


def parse_header(path: Path, header: bytes, size: int) -> tuple[Range, ...]:
    """Every tensor of a safetensors file of ``size`` bytes that begins with ``header`` (its length included).

    As strict as the safetensors library, and stricter: no key twice, no more than ``MOST_DIMENSIONS`` dimensions,
    no dtype but those that an engine takes.

    Raises:
        InputError: it is anything but a header whose tensors cover the rest of the file without gap or overlap.
    """
    try:
        values = strict_json(header[8:])
    except (ValueError, RecursionError) as error:
        raise _no_safetensors(path, f"its header is no JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise _no_safetensors(path, "its header is no mapping")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _no_safetensors(path, "its metadata are no strings")
    entries = sorted(
        (_entry(path, name, value) for name, value in values.items()), key=lambda entry: entry[1:3]
    )
    end = 0
    for name, start, stop, *_ in entries:
        if start != end:
            raise _no_safetensors(path, f"{name!r:.200} overlaps another tensor or leaves a gap")
        end = stop
    if end != size - len(header):
        raise _no_safetensors(path, f"its tensors take {end} bytes, and there are {size - len(header)}")
    return tuple(
        Range(Tensor(name=name, dtype=_names[dtype], shape=shape), len(header) + start, len(header) + stop)
        for name, start, stop, dtype, shape in entries
    )


def upload(weights: WeightsFile, gpu: Gpu, progress: Progress) -> tuple[Memory, dict[str, int]]:
    """Copy the tensors to the GPU; returns their memory and {name: address in it}.

    The file is read once, piece by piece into pinned memory, from where the GPU fetches it while the next piece
    is read; what is digested is what is copied. It is read and not mapped: reading a map of a file that another
    process cuts off would end this one.

    Raises:
        InputError: the file is cut off meanwhile, or its content is not what the manifest names.
        EngineError: CUDA fails.
    """
    offsets: dict[str, int] = {}
    total = 0
    for range_ in weights.ranges:
        offsets[range_.tensor.name] = total
        total += -(-(range_.end - range_.start) // ALIGNMENT) * ALIGNMENT
    with ExitStack() as on_failure, ExitStack() as resources:
        memory = on_failure.enter_context(gpu.memory(total, "the weights"))
        stream = resources.enter_context(gpu.stream()).value
        staging = [
            (resources.enter_context(gpu.pinned(PIECE)), resources.enter_context(gpu.event()))
            for _ in range(2)
        ]
        resources.callback(gpu.synchronize, stream)  # before anything is freed
        digest = hashlib.sha256(weights.header)
        weights.file.seek(len(weights.header))
        position, turn = len(weights.header), 0
        while position < weights.size:
            pinned, copied = staging[turn % 2]
            gpu.wait(copied)  # the piece before the last has left its place
            count = _read_into(weights, pinned.bytes()[: weights.size - position])
            digest.update(pinned.bytes()[:count])
            for range_, start, stop in _within(weights.ranges, position, position + count):
                to = memory.value + offsets[range_.tensor.name] + start - range_.start
                gpu.copy(to, pinned.value + start - position, stop - start, stream)
            gpu.record(copied, stream)
            position, turn = position + count, turn + 1
            progress("weights", position, weights.size)
        if digest.hexdigest() != weights.sha256:
            raise InputError(f"{weights.path} is damaged, or of another engine (SHA-256).", _STALE)
        on_failure.pop_all()
    return memory, {name: memory.value + offset for name, offset in offsets.items()}


def said(tensor: Tensor) -> str:
    """Such as ``bf16 [64, 192]``."""
    return f"{tensor.dtype} {list(tensor.shape)}"


_STALE = "Copy the engine's files again, all of them, or compile it again."


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    file.seek(0)
    length = int.from_bytes(_read(path, file, 8), "little")
    if size < 8 or length > size - 8:
        raise _no_safetensors(path, "it ends within its header")
    if length > LARGEST_HEADER:
        raise _no_safetensors(path, f"its header would take {length} bytes")
    file.seek(0)
    header = _read(path, file, 8 + length)
    if len(header) != 8 + length:
        raise _no_safetensors(path, "it ends within its header")
    return header


def _entry(path: Path, name: str, value: Any) -> tuple[str, int, int, str, tuple[int, ...]]:
    """Name, start, end, dtype and shape of one tensor."""
    what = f"its entry {name!r:.200} is wrong"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _no_safetensors(path, what)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and _naturals(shape, 2**31) and _naturals(offsets, 2**63)):
        raise _no_safetensors(path, what)
    if len(shape) > MOST_DIMENSIONS or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _no_safetensors(path, what)
    if dtype not in _names:
        raise _no_safetensors(path, f"{what}: no engine takes its dtype")
    if size_of(_names[dtype], tuple(shape)) != offsets[1] - offsets[0]:
        raise _no_safetensors(path, f"{what}: its shape does not fit its bytes")
    return name, offsets[0], offsets[1], dtype, tuple(shape)


def _naturals(values: Any, limit: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < limit for value in values)


def _read(path: Path, file: BinaryIO, count: int) -> bytes:
    try:
        return file.read(count)
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_into(weights: WeightsFile, place: memoryview) -> int:
    try:
        count: int = weights.file.readinto(place)  # type: ignore[attr-defined]
    except OSError as error:
        raise _unreadable(weights.path, error) from None
    if not count:
        raise InputError(f"{weights.path} was cut off while it was read.", _STALE)
    return count


def _within(ranges: Sequence[Range], start: int, end: int) -> Iterator[tuple[Range, int, int]]:
    """The parts of ``ranges`` that lie between two bytes of the file."""
    for range_ in ranges:
        first, last = max(range_.start, start), min(range_.end, end)
        if first < last:
            yield range_, first, last


def _unreadable(path: Path, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(
            f"The weights {path} do not exist.", "Keep them beside the engine, or compile again."
        )
    return InputError(f"{path} cannot be read ({error.strerror}).", "Check its permissions and its disk.")


def _no_safetensors(path: Path, why: str) -> InputError:
    return InputError(f"{path} is cut off or no safetensors file ({why}).", _STALE)
