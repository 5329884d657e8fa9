# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile check``: what compiling a recipe will take, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lynx_compile.engine import trt
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.ownership import LOCK
from lynx_compile.models import recording as recordings
from lynx_compile.models.dit import find_groups
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import open_model
from lynx_compile.models.source import download_bytes
from lynx_compile.passes.durations import Calls
from lynx_compile.passes.forecast import forecast
from lynx_compile.passes.record import read_files
from lynx_compile.passes.select import candidates, require_fp8
from lynx_compile.passes.target import target_of
from lynx_compile.recipe import Model, Recipe


def check(recipe: Recipe, output: Path) -> Iterator[str]:
    """Lines for the user, all of them before a refusal. Nothing is downloaded; what is not here yet is only counted.
    Weights that a LoRA or a conversion changes are written into the cache, where a compilation finds them.

    Raises:
        InputError: the recipe or the model is wrong, or the GPUs do not fit.
        DiskFullError, OutOfMemoryError: there is no room.
    """
    outputs = Outputs.of(output.resolve())
    target = target_of(recipe.engine)
    trt.plugin_library(recipe.engine.plugin)
    require_fp8(recipe.sparsity, target.gpus)
    read_files(recipe)
    yield f"{target.name} {target.version}, for {', '.join(target.gpus)}"
    if isinstance(recipe.model, Model) and recipe.checkpoint is None:
        missing = download_bytes(recipe.model.source, recipe.model.revision, recipe.model.variant)
        if missing:
            yield f"{missing / 1e9:.1f} GB have to be downloaded first; check again when they are here."
            return
    was_there = outputs.cache.exists()
    try:
        opened = open_model(recipe, outputs.cache / "converted")
    finally:
        if not was_there and outputs.cache.exists():
            (outputs.cache / LOCK).touch()  # by which a compilation knows its cache
    recorded = recipe.calibration.recording or outputs.cache / "recording"
    if not (Path(recorded) / "recording.json").exists():
        yield (
            "No call is recorded yet: every linear of the blocks is counted, so this is an upper bound, and no time is "
            "known."
        )
        for checkpoint in opened.checkpoints.values():
            yield from forecast(recipe, checkpoint, target, outputs).describe()
        return
    recording = recordings.load(Path(recorded))
    ways = recording.ways()
    for way in ways:
        own = outputs if len(ways) == 1 else outputs.part(recordings.part_name(way, ways))
        checkpoint = opened.of(way.component)
        groups = find_groups(checkpoint, recording, way, DTYPES[recipe.model.dtype])
        found = candidates(groups, recipe.sparsity, target.gpus, by_speed=recipe.judge is None)
        calls = Calls.of(recording, way, groups)
        expected = forecast(recipe, checkpoint, target, own, found, calls)
        yield from expected.describe()
        expected.require(outputs.folder)
