# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk: safetensors files, written atomically, and one tensor at a time where they are large."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import SafetensorError, safe_open

from lynx_compile.files import disk
from lynx_compile.files.atomic import atomic_file
from lynx_compile.files.progress import Progress, no_progress


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically. What is on a GPU is copied from it one tensor at a time."""
    specs = [TensorSpec(name, x.dtype, tuple(x.shape), partial(_same, x)) for name, x in tensors.items()]
    write_tensors(path, specs, metadata)


def save_keyed(path: Path, key: str, tensors: Mapping[str, torch.Tensor], facts: Any = None) -> None:
    """The same for a run that may be stopped. ``key``: of all that it depends on. ``facts``: more, as JSON has it."""
    save_tensors(path, tensors, {"lynx": json.dumps([key, facts])})


def load_keyed(path: Path, key: str) -> tuple[dict[str, torch.Tensor], Any] | None:
    """Tensors and facts that ``save_keyed`` wrote with this key; None where there is no such whole file."""
    try:
        with safe_open(path, "pt") as file:
            written, facts = json.loads(file.metadata()["lynx"])
            if written != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def map_tensor(path: Path, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor whose bytes lie at ``offset`` of a file; what is written to it does not reach the file.

    Its range alone is mapped; safetensors maps the whole file for each tensor, terabytes of addresses for a large
    model.

    Raises:
        OSError, ValueError: the file cannot be read, or ends before the tensor does.
    """
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    array = np.memmap(path, np.uint8, "c", offset, (count,))
    raw = torch.from_numpy(array if offset % dtype.itemsize == 0 else array.copy())
    return raw.view(dtype).view(tuple(shape))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is read only when it is written, so that a model need not fit in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def write_tensors(
    path: Path,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str] | None = None,
    progress: Progress = no_progress,
) -> dict[str, tuple[int, int]]:
    """Write a safetensors file one tensor at a time; returns {name: (offset in the file, bytes)}.

    The library's own writer wants all tensors in memory and neither tells where it put them nor takes their digest.

    Raises:
        DiskFullError: there is no room for it; known before it is begun.
    """
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))  # keeps every start aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in ordered:
        start, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
        header[spec.name] = {
            "dtype": _SAFETENSORS[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    offsets: dict[str, tuple[int, int]] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.require_room(path, 8 + len(text) + end)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, spec in enumerate(ordered, 1):
            tensor = spec.read().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            offsets[spec.name] = (file.tell(), tensor.nbytes)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            progress(f"wrote {spec.name}", number, len(ordered))
    return offsets


def refer(initializer: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make the initializer a view of ``length`` bytes at ``offset`` of the file ``location``."""
    initializer.data_location = onnx.TensorProto.EXTERNAL
    del initializer.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        initializer.external_data.add(key=key, value=value)


def read_external(initializer: onnx.TensorProto, folder: Path) -> torch.Tensor:
    """What ``refer`` refers to, mapped; ``folder`` is the ONNX file's. ONNX's own reader refuses files elsewhere.

    Raises:
        OSError, ValueError: the file cannot be read, or ends before the tensor does.
    """
    entries = {entry.key: entry.value for entry in initializer.external_data}
    offset = int(entries.get("offset", 0))
    return map_tensor(
        folder / entries["location"], offset, TORCH_DTYPES[initializer.data_type], initializer.dims
    )


TORCH_DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.complex64: "C64",
}
