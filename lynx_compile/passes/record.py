# SPDX-License-Identifier: Apache-2.0
"""The first stage: the recipe's pipeline runs its own loop, and what it hands its transformer is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.models.capture import capture
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import Opened
from lynx_compile.models.pipeline_loader import load_pipeline
from lynx_compile.models.recording import Recording
from lynx_compile.recipe import Model, Recipe

CAPTURE = StageVersion("capture", 4, ("torch", "diffusers", "transformers"))
Rows = Sequence[Mapping[str, Any]]


def record(recipe: Recipe, opened: Opened, rows: Rows, folder: Path, progress: Progress) -> Recording:
    """Record the pipeline's calls of the denoisers into ``folder``.

    Args:
        rows: per prompt its own arguments of the pipeline's call (``prompts.read``); they take turns.

    Raises:
        InputError: the pipeline or its arguments are wrong. StageError: the pipeline fails.
    """
    calibration = recipe.calibration
    pipe = open_pipeline(recipe, opened, rows)
    return capture(
        pipe,
        list(islice(cycle(rows), calibration.samples)),
        folder,
        call=recipe.call,
        components=named_components(recipe),
        seed=calibration.seed,
        batch=calibration.batch,
        states_per_prompt=calibration.states_per_prompt,
        model_digest=" ".join([str(CAPTURE.number), *(c.digest() for c in opened.checkpoints.values())]),
        progress=progress,
    )


def named_components(recipe: Recipe) -> tuple[str, ...]:
    """The denoisers that the recipe names; none: those that the pipeline calls."""
    return recipe.model.components or () if isinstance(recipe.model, Model) else ()


def open_pipeline(recipe: Recipe, opened: Opened, rows: Rows, dtype: torch.dtype | None = None) -> Any:
    """The recipe's pipeline, in ``dtype``; by default in float32 on a CPU, in the recipe's dtype on a GPU.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    if opened.folder is None or not isinstance(recipe.model, Model):
        raise InputError(
            "A module of your own has no pipeline that could be run for calibration.",
            "Give its recorded calls: 'recording' under 'calibration'.",
        )
    dtype = dtype or (DTYPES[recipe.model.dtype] if torch.cuda.is_available() else torch.float32)
    return load_pipeline(
        opened.folder,
        dtype=dtype,
        pipeline=recipe.model.pipeline,
        variant=recipe.model.variant,
        encoded_prompts="prompt" not in rows[0],
        modules={name: checkpoint.load(dtype) for name, checkpoint in opened.checkpoints.items()},
    )
