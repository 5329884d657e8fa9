# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk: safetensors files, written atomically, and one tensor at a time where they are large."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from safetensors.torch import save_file

from lynx_compile.files.atomic import atomic_path


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata) if metadata else None)
        except Exception as error:  # safetensors wraps the system's errors in its own
            if "os error 28" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is read only when it is written, so that a model need not fit in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def write_tensors(path: Path, specs: Sequence[TensorSpec]) -> dict[str, tuple[int, int]]:
    """Write a safetensors file one tensor at a time; returns {name: (offset in the file, bytes)}.

    The library's own writer wants all tensors in memory and does not tell where it put them.
    """
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))  # keeps every start aligned
    header: dict[str, object] = {}
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
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            tensor = spec.read().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            offsets[spec.name] = (file.tell(), tensor.nbytes)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return offsets


def refer(initializer: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make the initializer a view of ``length`` bytes at ``offset`` of the file ``location``."""
    initializer.data_location = onnx.TensorProto.EXTERNAL
    del initializer.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        initializer.external_data.add(key=key, value=value)


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
    torch.complex64: "C64",
}
