# SPDX-License-Identifier: Apache-2.0
"""What a budget predicts on a trained model, against what is measured: within a quarter."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.digits_flux import budget
from calib.recorded import recorded
from lynx_compile.files.progress import no_progress
from lynx_compile.passes.budget import choose
from lynx_compile.passes.verify import HeldOut, linears_of
from lynx_compile.recipe import Budget, Compensation, Sparsity, load_recipe
from lynx_compile.tools.budgeted import budgeted


@pytest.mark.nightly
def test_the_prediction_holds_on_digits(tmp_path: Path) -> None:
    given = load_recipe(budget.RECIPE)
    changes = {
        "calibration": given.calibration.model_copy(update={"samples": 40}),
        "sparsity": Sparsity(costs=str(budget.COSTS)),
        "budget": Budget(max_output_error=0.5),
        "compensation": Compensation(tune="off"),
    }
    recipe = given.model_copy(update=changes)
    recording, dit = recorded(recipe, tmp_path)
    made = budgeted(dit, recording, recipe, ("sm90",), tmp_path, "key", no_progress)
    assert made.verified.whole.predicted == pytest.approx(made.verified.whole.solved, rel=0.25)
    for at in made.verified.steps:
        assert at.predicted == pytest.approx(at.solved, rel=0.35)
    half = choose(made.selection.candidates, made.selection.sensitivities, Budget(max_output_error=0.006))
    held_out = HeldOut(dit, recording, no_progress)
    taken = len(half.steps)
    squares = held_out.squares(linears_of(half, taken, made.solved, held_out.device, held_out.dtype))
    assert half.error(taken) == pytest.approx(held_out.error(squares), rel=0.25)
