# SPDX-License-Identifier: Apache-2.0
"""A recipe's recording and its transformer, as the compiler would take them, for the scripts that measure here."""

from __future__ import annotations

from pathlib import Path

from lynx_compile.files.progress import no_progress
from lynx_compile.models import prompts
from lynx_compile.models.dit import DiT, find_dit
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import open_model
from lynx_compile.models.recording import Recording
from lynx_compile.passes.record import record
from lynx_compile.recipe import Recipe


def recorded(recipe: Recipe, folder: Path) -> tuple[Recording, DiT]:
    """Record the pipeline's calls into ``folder``, all of one graph; what is there is not recorded again."""
    opened = open_model(recipe, folder / "converted")
    rows = prompts.read(Path(recipe.calibration.prompts or ""))
    recording = record(recipe, opened, rows, folder / "recording", no_progress)
    (calls,) = recording.ways()
    checkpoint = opened.checkpoints[calls.component]
    return recording, find_dit(checkpoint, recording, calls, DTYPES[recipe.model.dtype])
