# SPDX-License-Identifier: Apache-2.0
"""The user's own pipeline, from a local folder or a hub id."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from lynx_compile.errors import InputError

ENCODERS = ("text_encoder", "tokenizer")  # how components start that encoded prompts make needless


def load_pipeline(
    source: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    device: str | None = None,
    encoded_prompts: bool = False,
    without: Collection[str] = (),
) -> Any:
    """A diffusers pipeline with its own scheduler, from safetensors alone; no code of the checkpoint ever runs.

    Components that the folder does not hold are left out, as are text encoders where prompts are encoded already.

    Args:
        source: a folder with ``model_index.json``, or a hub id.
        device: by default ``cuda`` where there is one.
        without: other components to leave out.

    Raises:
        InputError: it is no pipeline, needs code of its own, lacks safetensors, or cannot be loaded.
    """
    folder = _folder(str(source), revision)
    index = {name: value for name, value in _index(folder).items() if isinstance(value, list)}
    left_out = {
        name: None
        for name, where in index.items()
        if name in without
        or (encoded_prompts and name.startswith(ENCODERS))
        or _is_missing(folder, name, where)
    }
    kind = _pipeline_class(folder)
    try:
        with _without_progress_bars():
            pipe = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **left_out,
            )
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise InputError(
            f"The pipeline in {folder} cannot be loaded ({_reason(error)}).",
            "Fetch the whole checkpoint, as safetensors; pickles are never loaded.",
        ) from None
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _folder(source: str, revision: str | None) -> Path:
    """A local folder; a hub id is fetched (or found in the local hub cache) first, and only what is needed of it."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise InputError(f"The model folder {folder} does not exist.", "Correct model.source in the recipe.")
    try:
        return Path(
            DiffusionPipeline.download(
                source, revision=revision, use_safetensors=True, trust_remote_code=False
            )
        )
    except Exception as error:  # huggingface_hub raises many kinds: offline, gated, unknown id, bad revision
        raise InputError(
            f"'{source}' cannot be fetched ({_reason(error)}).",
            "Check the id and the connection, or give a folder.",
        ) from None


def _index(folder: Path) -> dict[str, Any]:
    """``model_index.json``: the pipeline's class, and {component: [library, class]}."""
    path = folder / "model_index.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no model_index.json.", "model.source must be a diffusers pipeline's folder."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({_reason(error)}).", "Fetch the checkpoint again."
        ) from None
    return values if isinstance(values, dict) else {}


def _pipeline_class(folder: Path) -> Any:
    """The class itself: ``DiffusionPipeline.from_pretrained`` loads optional components that are to be left out."""
    name = _index(folder).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, DiffusionPipeline):
        raise InputError(
            f"{folder} names no pipeline of the installed diffusers ({name!r:.60}).",
            "Update diffusers; pipelines that bring their own code are never run.",
        )
    return found


def _is_missing(folder: Path, name: str, where: list[Any]) -> bool:
    return where == [None, None] or not (folder / name).is_dir()


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
