# SPDX-License-Identifier: Apache-2.0
"""A recipe's own transformers as ``bench --model`` measures them: its checkpoint, and the calls of its pipeline.

The calls are those of ``calibration.recording``; without one, the pipeline runs once for one batch of prompts. What
cannot be had, or is not wanted, is made up where that changes no time: random weights for a config that the folder or
the recording tells, and for models of known size (``full_size``) the call too, by ``height``, ``width`` and
``max_sequence_length`` of the recipe's ``call``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lynx_compile.errors import InputError
from lynx_compile.files.progress import no_progress
from lynx_compile.models import prompts
from lynx_compile.models.checkpoint import Checkpoint
from lynx_compile.models.dit import compiled_arguments, in_engine_dtypes
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import Opened, open_model
from lynx_compile.models.recording import Component, Group, Recording, load
from lynx_compile.passes.record import record
from lynx_compile.recipe import Model, OnnxModel, Recipe, load_recipe
from lynx_compile.tools import full_size
from lynx_compile.tools.full_size import RANDOM
from lynx_compile.tools.step_model import StepModel, turn_in_real_numbers, with_random_weights

Log = Callable[[str], None]


def step_models(path: Path, folder: Path, *, random_weights: bool, log: Log) -> tuple[StepModel, ...]:
    """What the recipe at ``path`` compiles: a model for every way in which its pipeline calls a denoiser.

    Args:
        folder: for what is recorded or converted on the way.
        random_weights: do not read the checkpoint's.

    Raises:
        InputError: the recipe is wrong; or its calls cannot be had.
    """
    recipe = load_recipe(path)
    if isinstance(recipe.model, OnnxModel):
        raise InputError(
            f"{path} names an ONNX file, and a step is measured of a torch module.", "Give the model itself."
        )
    known = full_size.of_source(recipe.model.source) if isinstance(recipe.model, Model) else None
    recorded = recipe.calibration.recording
    if random_weights and known and recorded is None:
        return (_of_known_size(path.stem, recipe, known),)
    try:
        opened = open_model(recipe, folder / "converted")
    except InputError as error:
        if recorded is None and known is None:
            raise
        log(f"{error} Weights are random.")
        if recorded is None and known is not None:
            return (_of_known_size(path.stem, recipe, known),)
        opened = None
    recording = load(Path(recorded)) if recorded else _recorded(recipe, opened, folder / "recording", log)
    ways = recording.ways()
    return tuple(
        _of_way(
            path.stem if len(ways) == 1 else f"{path.stem}.{number}",
            recipe,
            opened,
            recording,
            way,
            random_weights,
        )
        for number, way in enumerate(ways)
    )


def _of_known_size(name: str, recipe: Recipe, known: full_size.FullSize) -> StepModel:
    size = full_size.Size.of_call(recipe.call, recipe.calibration.batch)
    return full_size.step_model(
        dataclasses.replace(known, size=size), name=name, dtype=DTYPES[recipe.model.dtype],
        sparsity=recipe.sparsity, gpus=recipe.engine.gpus,
    )  # fmt: skip


def _recorded(recipe: Recipe, opened: Opened | None, folder: Path, log: Log) -> Recording:
    """One run of the pipeline."""
    assert opened is not None and recipe.calibration.prompts is not None, "there is no recording"
    log("the pipeline runs once, to see how it calls its transformer")
    calibration = recipe.calibration
    once = calibration.model_copy(update={"samples": calibration.batch, "states_per_prompt": None})
    rows = prompts.read(Path(recipe.calibration.prompts))
    return record(recipe.model_copy(update={"calibration": once}), opened, rows, folder, no_progress)


def _of_way(
    name: str, recipe: Recipe, opened: Opened | None, recording: Recording, way: Group, random_weights: bool
) -> StepModel:
    dtype = DTYPES[recipe.model.dtype]
    checkpoint = (
        _described(recording.component(way.component)) if opened is None else opened.of(way.component)
    )
    assert isinstance(checkpoint, Checkpoint), "no ONNX file"
    random = random_weights or opened is None
    arguments, _ = compiled_arguments(recording, way)
    arguments = in_engine_dtypes(checkpoint, arguments, dtype)
    arguments.pop("return_dict", None)

    def build(device: str) -> nn.Module:
        turn_in_real_numbers()
        if device == "meta":
            return checkpoint.build("meta", dtype)
        return (
            with_random_weights(checkpoint.build("cpu", dtype), device)
            if random
            else checkpoint.load(dtype, device)
        )

    def step(device: str) -> dict[str, Any]:
        moved: dict[str, Any] = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)
        return moved

    return StepModel(
        name=name,
        class_name=checkpoint.class_name,
        weights=RANDOM if random else f"weights of {getattr(recipe.model, 'source', checkpoint.folder)}",
        size=f"as called by {recording.header.pipeline}{_in_words(recipe.call)}",
        dtype=dtype,
        sparsity=recipe.sparsity,
        gpus=recipe.engine.gpus,
        build=build,
        step=step,
    )


def _described(component: Component) -> Checkpoint:
    """A checkpoint without weights, by what was recorded of the module; classes of diffusers alone."""
    module, _, name = component.class_name.partition(":")
    if module.split(".")[0] != "diffusers":
        raise InputError(
            f"The weights cannot be read, and the recorded {name} is no class of diffusers.",
            "Give the model where its weights are.",
        )
    return Checkpoint(Path(), f"diffusers:{name}", component.config, (), {})


def _in_words(call: Mapping[str, Any]) -> str:
    """The picture's size, where the call tells."""
    return f", {call['width']}x{call['height']} pixels" if {"width", "height"} <= call.keys() else ""
