# SPDX-License-Identifier: Apache-2.0
"""The user's own pipeline, from its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from lynx_compile.errors import InputError, first_line, is_out_of_memory
from lynx_compile.models.checkpoint import read_json
from lynx_compile.models.place import device_type
from lynx_compile.models.source import INDEX, only_variant

ENCODERS = ("text_encoder", "tokenizer")  # how components start that encoded prompts make needless


def load_pipeline(
    folder: Path,
    *,
    dtype: torch.dtype,
    pipeline: str | None = None,
    variant: str | None = None,
    device: str | None = None,
    encoded_prompts: bool = False,
    modules: Mapping[str, torch.nn.Module | None] | None = None,
) -> Any:
    """A diffusers pipeline with its own scheduler, from safetensors alone; no code of the checkpoint ever runs.

    Components that the folder does not hold are left out, as are text encoders where prompts are encoded already.

    Args:
        folder: with ``model_index.json``.
        pipeline: another class than the one it names. variant: of the weight files' names; by default that in
            which alone a component is there.
        device: by default ``cuda`` where ``place`` says so.
        modules: components that are loaded already; None in the place of one leaves it out.

    Raises:
        InputError: it is no pipeline, needs code of its own, lacks safetensors, or cannot be loaded.
    """
    values = read_json(folder / INDEX)
    index = {name: value for name, value in values.items() if isinstance(value, list)}
    given: dict[str, torch.nn.Module | None] = {
        name: None
        for name, where in index.items()
        if (encoded_prompts and name.startswith(ENCODERS)) or _is_missing(folder, name, where)
    }
    given |= modules or {}
    variant = variant or only_variant(folder, [name for name in index if name not in given])
    kind = pipeline_class(pipeline or values.get("_class_name"), str(folder))
    try:
        with _without_progress_bars():
            pipe = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant=variant,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **given,
            )
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"The pipeline in {folder} cannot be loaded ({first_line(error)}).",
            "Fetch the whole checkpoint, as safetensors; pickles are never loaded.",
        ) from None
    return pipe.to(device or device_type())


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _without_fallbacks() -> Iterator[None]:
    """Where torchvision is missing, transformers says of every image processor that its other one serves as well."""
    importing = getLogger("transformers.utils.import_utils")
    before = importing.level
    importing.setLevel(ERROR)
    try:
        yield
    finally:
        importing.setLevel(before)


def pipeline_class(name: object, source: str) -> Any:
    """The class itself: ``DiffusionPipeline.from_pretrained`` loads optional components that are to be left out.

    Raises:
        InputError: ``name``, which ``source`` gives, is no pipeline of the installed diffusers.
    """
    with _without_fallbacks():
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, DiffusionPipeline):
        raise InputError(
            f"{source} names no pipeline of the installed diffusers ({name!r:.60}).",
            "Update diffusers; pipelines that bring their own code are never run.",
        )
    return found


def _is_missing(folder: Path, name: str, where: list[Any]) -> bool:
    return where == [None, None] or not (folder / name).is_dir()
