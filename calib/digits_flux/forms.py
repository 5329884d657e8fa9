# SPDX-License-Identifier: Apache-2.0
"""What every form of a linear costs in error: all candidates of digits-flux in that form, run in torch.

``python -m calib.digits_flux.forms`` from the repository's root. In float32 but for what is FP8, which is the op's own
definition (``ops.fp8``), x's rounding included. Writes mean layer errors, expected on the calibration's tokens, and the
error of the velocity on trajectories of other noise into ``engines/bench/summary.json``, beside the speeds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import typer
from torch.nn import functional

from calib.digits_flux import digits, sampler, study
from lynx_compile.files.atomic import save_text
from lynx_compile.ops.fp8 import Rounded, fp8_linear
from lynx_compile.ops.sparse_linear import sparse_linear
from lynx_compile.passes.calibrate import Statistics, calibrate
from lynx_compile.passes.compensate import SparseLinearWeights, compensate, load_weights
from lynx_compile.passes.select import select
from lynx_compile.recipe import Sparsity

SUMMARY = digits.HERE.parents[1] / "engines" / "bench" / "summary.json"
FORMS = {
    "bf16_weight": Sparsity(operand="weight"),
    "bf16_activation": Sparsity(operand="activation", rank=0),
    "fp8_dense": Sparsity(operand="none", precision="fp8"),
    "fp8_weight": Sparsity(operand="weight", precision="fp8"),
    "fp8_activation": Sparsity(operand="activation", precision="fp8"),
}
EVERYTHING = FORMS["fp8_activation"]  # needs all moments that there are


def main(samples: int = 50, steps: int = 20, path: Path = SUMMARY) -> None:
    """Measure all forms and write them."""
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(study.set_up(Path(scratch)), list(FORMS), samples, steps)
    for name, value in found.items():
        print(f"{name:<45} {value:.4f}")
    old = json.loads(path.read_text()) if path.exists() else {}
    rounded = {name: round(value, 4) for name, value in found.items()}
    save_text(path, json.dumps(old | rounded, indent=1) + "\n")


def measure(setup: study.Setup, forms: Sequence[str], samples: int, steps: int) -> dict[str, float]:
    """``errors.FORM.layer`` and ``errors.FORM.output`` of each of ``forms``."""
    transformer = sampler.dense(setup.dit.module)
    states: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    labels = torch.arange(digits.CLASSES).repeat(-(-samples // digits.CLASSES))[:samples]
    sampler.sample(study._recorder(transformer, states), labels, study.SEED, steps, batch=study.BATCH)
    statistics = _statistics(setup)
    found = {}
    for form in forms:
        plan = select(setup.dit.groups, FORMS[form])
        paths = compensate(
            setup.dit, plan, statistics, FORMS[form], setup.folder / form, study._counter(form)
        )
        solved = [load_weights(path) for path in paths]
        found[f"errors.{form}.layer"] = float(np.mean([error for one in solved for error in one.errors]))
        with _in_place(setup.dit.module, solved):
            found[f"errors.{form}.output"] = study.output_error(transformer, states)
    return found


def _statistics(setup: study.Setup) -> Statistics:
    plan = select(setup.dit.groups, EVERYTHING)
    recipe = setup.recipe.model_copy(update={"sparsity": EVERYTHING})
    counter = study._counter("calibrate")
    return calibrate(setup.dit, plan, setup.recording, recipe, setup.folder / "statistics", counter)


@contextmanager
def _in_place(module: torch.nn.Module, solved: Sequence[SparseLinearWeights]) -> Iterator[None]:
    """The solved linears in ``module``, which is put back afterwards."""
    changed = []
    try:
        for one in solved:
            end = 0
            for path, size in zip(one.linears, one.out_channels, strict=True):
                linear = module.get_submodule(path)
                linear.forward = _forward(one, slice(end, end + size))
                changed.append(linear)
                end += size
        yield
    finally:
        for linear in changed:
            del linear.forward


def _forward(one: SparseLinearWeights, rows: slice) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias, pruned = one.weight[rows], one.bias[rows], one.operand == "activation"
    if one.weight_scale is not None:
        rounded = Rounded(weight, one.weight_scale[rows])
        return partial(fp8_linear, weight=rounded, bias=bias, prune=pruned)
    if pruned:
        return partial(sparse_linear, weight=weight, lora_down=one.lora_down, bias=bias, rank=one.rank)
    return partial(functional.linear, weight=weight, bias=bias)


if __name__ == "__main__":
    typer.run(main)
