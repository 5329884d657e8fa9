# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there: every output is written beside its place and then moved."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lynx_compile.errors import InputError, LynxError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, moved to ``path`` at the end and removed on any failure.

    Raises:
        LynxError: the folder cannot be made or written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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


_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from None


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explained(path: Path, error: OSError) -> LynxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LynxError(
            f"The disk is full: {path} could not be written.", "Free some space or choose another output."
        )
    reason = error.strerror or str(error)
    return LynxError(f"{path} could not be written ({reason}).", "Check the folder and its permissions.")
