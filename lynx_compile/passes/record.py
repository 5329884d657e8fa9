# SPDX-License-Identifier: Apache-2.0
"""The first stage: the recipe's pipeline runs its own loop, and what it hands its transformer is recorded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.models import prompts
from lynx_compile.models.capture import capture
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import Opened
from lynx_compile.models.pipeline_loader import load_pipeline
from lynx_compile.models.place import on_gpu, reclaim
from lynx_compile.models.recording import Recording
from lynx_compile.passes.speed_table import CostTable
from lynx_compile.recipe import Model, Recipe

log = logging.getLogger(__name__)

CAPTURE = StageVersion("capture", 5, ("torch", "diffusers", "transformers"))
PROMPTS = 512  # that calibration sees; what fewer cost is in the warning
HELD_OUT = 8  # runs to one more, for prompts kept apart
Rows = Sequence[Mapping[str, Any]]


def record(recipe: Recipe, opened: Opened, rows: Rows, folder: Path, progress: Progress) -> Recording:
    """Record the pipeline's calls of the denoisers into ``folder``, and an eighth more for prompts kept apart.

    Args:
        rows: per prompt its own arguments of the pipeline's call (``prompts.read``). Those that calibration may run
            (``prompts.split``) take turns, and so do the others.

    Raises:
        InputError: the pipeline or its arguments are wrong. StageError: the pipeline fails.
    """
    calibration = recipe.calibration
    split = prompts.split(rows, calibration.held_out)
    _warn_of_few(split, calibration.samples)
    recording = capture(
        open_pipeline(recipe, opened, rows),
        [rows[number] for number in islice(cycle(split.calibration), calibration.samples)],
        folder,
        held_out=[
            rows[number] for number in islice(cycle(split.held_out), -(-calibration.samples // HELD_OUT))
        ],
        call=recipe.call,
        components=named_components(recipe),
        seed=calibration.seed,
        batch=calibration.batch,
        states_per_prompt=calibration.states_per_prompt,
        model_digest=" ".join([str(CAPTURE.number), *(c.digest() for c in opened.checkpoints.values())]),
        progress=progress,
    )
    reclaim()  # whether the model fits is asked next, and the pipeline has text encoders beside it
    return recording


def read_files(recipe: Recipe) -> Rows:
    """The recipe's prompts, none where it has a recording. What is wrong with them, or with its costs, is said by this
    before a model is fetched or run.

    Raises:
        InputError: a file is missing or damaged.
    """
    given = recipe.calibration.prompts
    rows = [] if given is None else prompts.read(Path(given))
    if recipe.sparsity.costs is not None:
        CostTable.load(Path(recipe.sparsity.costs))
    return rows


def _warn_of_few(split: prompts.Split, samples: int) -> None:
    count = min(len(split.calibration), samples)
    if split.shared:
        log.warning(
            "%d prompts are too few to keep some apart: errors are reported on other noise of the same prompts.",
            len(split.calibration),
        )
    if count < PROMPTS:
        log.warning(
            "Calibration sees %d prompts, and %d are better: on a model of 156 M parameters 256 prompts in place of "
            "2,048, of as many states, raised the output's error from .027 to .036 before tuning, and from .018 to "
            ".030 after it. Give more under calibration.prompts (none: 2,048 of the package's own), or raise "
            "calibration.samples.",
            count,
            PROMPTS,
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
    dtype = dtype or (DTYPES[recipe.model.dtype] if on_gpu() else torch.float32)
    return load_pipeline(
        opened.folder,
        dtype=dtype,
        pipeline=recipe.model.pipeline,
        variant=recipe.model.variant,
        encoded_prompts="prompt" not in rows[0],
        modules={name: checkpoint.load(dtype) for name, checkpoint in opened.checkpoints.items()},
    )
