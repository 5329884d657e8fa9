# SPDX-License-Identifier: Apache-2.0
"""Weights in their authors' own layout (other names, merged projections) turned into diffusers' by diffusers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lynx_compile.errors import InputError, first_line
from lynx_compile.files.tensors import TensorSpec, write_tensors
from lynx_compile.models.weight_files import StoredTensor

log = logging.getLogger(__name__)


def convert_original(
    model_class: Any,
    place: Path,
    files: Sequence[Path],
    tensors: Mapping[str, StoredTensor],
    converted: Path | None,
) -> Path:
    """The weights in ``converted``, under diffusers' names; made there unless an earlier run did.

    Raises:
        InputError: diffusers cannot convert them, or ``converted`` is None.
    """
    example = next(iter(tensors), "no tensor at all")
    cause = f"{place} holds weights in another layout than diffusers' ('{example}')"
    if not hasattr(model_class, "from_single_file") or len(files) != 1:
        raise InputError(
            f"{cause}, and diffusers converts none such.", "Give the checkpoint in diffusers' layout."
        )
    if converted is None:
        raise InputError(
            f"{cause}.",
            f"Convert them once: {model_class.__name__}.from_single_file('{files[0]}', config='{place}')"
            ".save_pretrained(...).",
        )
    path = converted / f"{_name(place, files[0])}.safetensors"
    if path.exists():
        return path
    log.info("%s; converting them to %s", cause, path)
    module = _converted(model_class, place, files[0], _widest(tensors), cause)
    state = module.state_dict()
    specs = [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape), partial(state.__getitem__, name))
        for name, tensor in state.items()
    ]
    write_tensors(path, specs)
    return path


def _converted(model_class: Any, place: Path, file: Path, dtype: torch.dtype, cause: str) -> torch.nn.Module:
    try:
        module = model_class.from_single_file(
            str(file), config=str(place), torch_dtype=dtype, local_files_only=True
        )
    except Exception as error:  # what a conversion makes of names that it does not know
        raise InputError(
            f"{cause}, and diffusers makes no {model_class.__name__} of them "
            f"({type(error).__name__}: {first_line(error)}).",
            "Give the checkpoint in diffusers' layout.",
        ) from None
    if empty := [name for name, tensor in module.state_dict().items() if tensor.is_meta]:
        raise InputError(
            f"{cause}, and their conversion to a {model_class.__name__} lacks '{empty[0]}'.",
            "Give the checkpoint in diffusers' layout.",
        )
    return module


def _widest(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The one dtype that holds all of them; mapped files are not copied where it is the only one."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _name(place: Path, file: Path) -> str:
    """Another name for another content: the file's place, size and time, and the config."""
    status = file.stat()
    text = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode()
    return hashlib.sha256(text + (place / "config.json").read_bytes()).hexdigest()[:24]
