# SPDX-License-Identifier: Apache-2.0
"""What a recipe's model section names: the pipeline's folder and the checkpoints of its denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin

from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.models.capture import may_denoise
from lynx_compile.models.checkpoint import Checkpoint, open_checkpoint, open_module, read_json
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.lora import fold
from lynx_compile.models.onnx_model import open_onnx
from lynx_compile.models.onnx_source import OnnxSource
from lynx_compile.models.pipeline_loader import pipeline_class
from lynx_compile.models.source import INDEX, fetch, pipeline_parts
from lynx_compile.recipe import Lora, Model, ModuleModel, Recipe

ONLY = "model"  # the one component of what is no pipeline


@dataclass(frozen=True)
class Opened:
    """``folder``: the pipeline's; None where there is none. ``checkpoints``: by the components' names."""

    folder: Path | None
    checkpoints: Mapping[str, Checkpoint | OnnxSource]

    def of(self, component: str) -> Checkpoint | OnnxSource:
        """The checkpoint of a recorded component; what is no pipeline has one, whatever the recording calls it.

        Raises:
            InputError: the model has no such component.
        """
        found = self.checkpoints.get(component) or self.checkpoints.get(ONLY)
        if found is None:
            raise InputError(
                f"The recording has calls of '{component}', and the model has {', '.join(self.checkpoints)}.",
                "Give the recording of this pipeline, or name the component in model.components.",
            )
        return found

    def check_values(self, dtype: torch.dtype, progress: Progress = no_progress) -> None:
        """Read every weight once, so that what ``dtype`` cannot hold is said before hours of work.

        Raises:
            InputError: a weight is not finite in ``dtype``.
        """
        for checkpoint in self.checkpoints.values():
            checkpoint.check_values(dtype, progress)


def open_model(recipe: Recipe, converted: Path, progress: Progress = no_progress) -> Opened:
    """Find the model and see from its headers that it can be compiled; nothing is loaded.

    Args:
        converted: folder for weights that have to be converted to diffusers' layout first.

    Raises:
        InputError: something is missing, is of a kind that cannot be compiled, or does not fit.
    """
    model = recipe.model
    if isinstance(model, ModuleModel):
        config = model.config if isinstance(model.config, dict) else Path(model.config)
        return Opened(None, {ONLY: open_module(model.module, config, Path(model.weights))})
    if not isinstance(model, Model):
        return Opened(None, {ONLY: OnnxSource(open_onnx(Path(model.onnx), DTYPES[model.dtype]), converted)})
    folder = fetch(model.source, revision=model.revision, variant=model.variant, progress=progress)
    if recipe.calibration.recording is not None and not (folder / INDEX).exists():
        if model.loras:
            raise InputError(
                f"{folder} holds a model alone, and what a LoRA is called its pipeline knows.",
                "Give the whole pipeline as model.source, or fuse the LoRA and save the model.",
            )
        return Opened(
            folder, {ONLY: open_checkpoint(folder, None, variant=model.variant, converted=converted)}
        )
    encodes = not (recipe.calibration.prompts or ".safetensors").endswith(".safetensors")
    parts = pipeline_parts(folder) if encodes else _named(folder)
    names = model.components or [
        name for name, (library, kind) in parts.items() if _denoises(name, library, kind)
    ]
    if unknown := [name for name in names if name not in parts]:
        raise InputError(
            f"{folder} has no component '{unknown[0]}'.",
            f"It has {', '.join(parts)}: correct model.components.",
        )
    if not names:
        raise InputError(
            f"{folder} holds no diffusion transformer.", "Name the component in model.components."
        )
    checkpoints = {
        name: open_checkpoint(folder, name, variant=model.variant, converted=converted) for name in names
    }
    for name, loras in _loras(model, names).items():
        kind = pipeline_class(model.pipeline or read_json(folder / INDEX).get("_class_name"), str(folder))
        checkpoints[name] = fold(checkpoints[name], name, loras, kind, converted, progress)
    return Opened(folder, checkpoints)


def _loras(model: Model, names: Sequence[str]) -> dict[str, list[Lora]]:
    """The recipe's LoRAs by the denoiser that they are for."""
    found: dict[str, list[Lora]] = {}
    for lora in model.loras:
        name = lora.component or names[0]
        if name not in names:
            raise InputError(
                f"The LoRA {lora.source} is for '{name}', which is not compiled.",
                f"What is compiled is {', '.join(names)}: correct model.loras.",
            )
        found.setdefault(name, []).append(lora)
    return found


def _named(folder: Path) -> dict[str, tuple[str, str]]:
    """Components whose folders are there, where no prompt has to be encoded."""
    return {
        name: (str(value[0]), str(value[1]))
        for name, value in read_json(folder / INDEX).items()
        if isinstance(value, list) and len(value) == 2 and None not in value and (folder / name).is_dir()
    }


def _denoises(name: str, library: str, kind: str) -> bool:
    found = getattr(diffusers, kind, None) if library == "diffusers" else None
    return isinstance(found, type) and issubclass(found, ModelMixin) and may_denoise(name, found)
