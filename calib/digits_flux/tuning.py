# SPDX-License-Identifier: Apache-2.0
"""What tuning does for digits-flux: the output's error before and after, on noise that neither it nor calibration saw.

``python -m calib.digits_flux.tuning [--operand activation] [--minutes 20]`` from the repository's root. Stopped, it
goes on at the block where it was, if it is given the same ``--folder``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import typer

from calib.digits_flux import digits
from calib.recorded import recorded
from lynx_compile.files.progress import no_progress
from lynx_compile.models.blocks import block_paths
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.passes.block_weights import rows_of, tuned_linears
from lynx_compile.passes.calibrate import calibrate, replay
from lynx_compile.passes.compensate import compensate
from lynx_compile.passes.select import SparsityPlan, select
from lynx_compile.passes.tune import tune
from lynx_compile.recipe import Compensation, Sparsity, load_recipe

RECIPE = digits.HERE.parents[1] / "engines" / "digits-flux.yaml"
SEED = 1  # of the noise that errors are measured on; the recipe's is 0
SAMPLES = 40


def main(
    operand: str = "weight",
    minutes: float = 20.0,
    steps: int = 800,
    folder: Annotated[Path, typer.Option(help="What is made on the way is kept there.")] = Path(
        "build/tuning"
    ),
) -> None:
    """Compensate and tune with every block linear sparse, and print both errors."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sparsity = Sparsity.model_validate({"operand": operand})
    compensation = Compensation(tune="blockwise", minutes=minutes, steps=steps)
    recipe = load_recipe(RECIPE).model_copy(update={"sparsity": sparsity, "compensation": compensation})
    recording, dit = recorded(recipe, folder / "calibration")
    plan = select(dit.groups, sparsity)
    folder = folder / operand
    statistics = calibrate(dit, plan, recording, recipe, folder / "statistics", no_progress)
    solved = compensate(dit, plan, statistics, sparsity, folder / "weights", no_progress)
    key = f"{recording.header.key} {recipe.model_dump_json()}"
    tuned = tune(dit, plan, solved, statistics, recording, recipe, folder / "tuned", key, no_progress)
    calibration = recipe.calibration.model_copy(update={"seed": SEED, "samples": SAMPLES})
    unseen, _ = recorded(recipe.model_copy(update={"calibration": calibration}), folder.parent / "unseen")
    for name, files in (("solved", solved), ("tuned", tuned.weights)):
        print(f"{operand}, {name}: output error {output_error(dit, plan, files, unseen):.4f}")


def output_error(dit: DiT, plan: SparsityPlan, files: Sequence[Path], recording: Recording) -> float:
    """|v - v_dense| / |v_dense| over all recorded calls."""
    calls = [recording.arguments(call) for call in recording.calls(dit.component)]
    dense = [replay(dit, call)[0] for call in calls]
    by_group = dict(zip(plan.groups, files, strict=True))
    device = next(dit.module.parameters()).device
    patches = []
    for block in block_paths(dit.module):
        for path, linear in tuned_linears(by_group, block, rows_of(by_group, block), device).items():
            patches.append(patch.object(dit.module.get_submodule(path), "forward", linear.forward))
    for one in patches:
        one.start()
    lost = sum(float((replay(dit, c)[0] - y).square().sum()) for c, y in zip(calls, dense, strict=True))
    for one in patches:
        one.stop()
    return float((lost / sum(float(y.square().sum()) for y in dense)) ** 0.5)


if __name__ == "__main__":
    typer.run(main)
