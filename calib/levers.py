# SPDX-License-Identifier: Apache-2.0
"""What further levers are worth for 2:4 weights: ridge, low rank beside them, masks chosen anew, weights of steps.

``python -m calib.levers RECIPE [--folder build/levers] [--minutes 2]``. Every block linear gets 2:4 weights; errors are
|y - y_dense| / |y_dense| of the model's output on calls of prompts that calibration did not see. Tuning is end to end,
from the solved weights, of equal length for every lever. PSNR is of the pipeline's images, mean over prompts. Nothing
here is what the compiler does: it is why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from calib.recorded import recorded
from lynx_compile.files.progress import no_progress
from lynx_compile.models.dit import DiT
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.passes.block_weights import Files, all_linears, split, substituted
from lynx_compile.passes.calibrate import Statistics, calibrate
from lynx_compile.passes.compensate import compensate, dense_weights, load_weights
from lynx_compile.passes.end_to_end import END_RATE, drawn_states, output_error
from lynx_compile.passes.select import SparsityPlan, select
from lynx_compile.passes.tune import samples_a_step
from lynx_compile.recipe import Recipe, Sparsity, load_recipe
from lynx_compile.solve.low_rank import low_rank
from lynx_compile.solve.stacking import State
from lynx_compile.solve.tune import Effort, Rows, TunedLinear, fit
from lynx_compile.tools.held_out import draw, open_sampler
from lynx_compile.tools.images import psnr

RIDGES = (1e-4, 1e-3, 1e-2)
RANKS = (64, 32, 16)  # K over the rank
CHOOSE_EVERY = 25  # steps
SHOWN = (0.7, 1.0, 1.3, 1.6, 2.0, 1.9, 2.2, 1.9, 1.5, 1.1, 0.8, 0.8, 0.6, 0.5, 0.5, 0.4, 0.3, 0.2, 0.2, 0.6)
CURVES: dict[str, Callable[[float], float]] = {  # by the share of the steps that are done
    "alike": lambda at: 1.0,
    "ten to one": lambda at: 10.0 ** (1 - at),
    "by what the image shows": lambda at: SHOWN[
        round(at * (len(SHOWN) - 1))
    ],  # calib.step_weights on digits-flux
}
HYSTERESIS = 1.1  # times as large a pruned weight must have become as the kept one that it replaces


@dataclass(frozen=True)
class Prepared:
    """A calibrated model whose block linears have solved 2:4 weights. ``train`` and ``held_out``: with targets."""

    recipe: Recipe
    folder: Path
    dit: DiT
    plan: SparsityPlan
    statistics: Statistics
    files: Files
    solved: Mapping[str, Rows]
    train: Sequence[State]
    held_out: Sequence[State]
    samples: int

    @property
    def device(self) -> torch.device:
        return next(self.dit.module.parameters()).device

    def error(self, linears: Mapping[str, TunedLinear]) -> float:
        with substituted(self.dit.module, linears):
            return output_error(self.dit.module, self.held_out, self.samples)

    def linears(self, rows: Mapping[str, Rows] | None = None) -> dict[str, TunedLinear]:
        return all_linears(self.files, rows or self.solved, self.device)


def main(
    recipe: Path,
    folder: Annotated[Path, typer.Option(help="What is made on the way is kept there.")] = Path(
        "build/levers"
    ),
    minutes: Annotated[float, typer.Option(help="Of each tuning; 0: none.")] = 2.0,
    steps: int = 2000,
) -> None:
    """Print a line for every lever."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepared = prepare(recipe, folder)
    for ridge in RIDGES:
        print(
            f"ridge {ridge:g}: solved {prepared.error(prepared.linears(_with_ridge(prepared, ridge))):.4f}",
            flush=True,
        )
    tunings: dict[str, Callable[[], dict[str, TunedLinear]]] = {
        "as it is": prepared.linears,
        **{f"low rank K/{part}": lambda part=part: low_ranks(prepared, part) for part in RANKS},  # type: ignore[misc]
        "masks chosen anew": lambda: reselecting(prepared),
    }
    plain = [state.weight for state in prepared.train]
    for name, make in tunings.items():
        linears = make()
        solved = prepared.error(linears)
        tuned = tune(prepared, linears, minutes, steps) if minutes else float("nan")
        print(
            f"{name}: solved {solved:.4f}, tuned {tuned:.4f}, {psnr_of(prepared, linears):.2f} dB", flush=True
        )
    for name, curve in CURVES.items() if minutes else ():
        first, last = max(plain), min(plain)  # of the first step and the last
        share = [(first - weight) / max(first - last, 1e-9) for weight in plain]
        weighed = replace(
            prepared,
            train=[replace(s, weight=curve(at)) for s, at in zip(prepared.train, share, strict=True)],
        )
        linears = prepared.linears()
        tuned = tune(weighed, linears, minutes, steps)
        print(f"steps weighed {name}: tuned {tuned:.4f}, {psnr_of(prepared, linears):.2f} dB", flush=True)


def prepare(path: Path, folder: Path) -> Prepared:
    """Record, calibrate and solve, as the compiler does."""
    recipe = load_recipe(path)
    sparsity = Sparsity(operand="weight", include=recipe.sparsity.include, exclude=recipe.sparsity.exclude)
    recipe = recipe.model_copy(update={"sparsity": sparsity})
    recording, dit = recorded(recipe, folder)
    plan = select(dit.groups, sparsity)
    statistics = calibrate(dit, plan, recording, recipe, folder / "statistics", no_progress)
    paths = compensate(dit, plan, statistics, sparsity, folder / "weights", no_progress)
    files = dict(zip(plan.groups, paths, strict=True))
    samples = samples_a_step(dit, plan.groups, recording)
    train, held_out = drawn_states(dit, recording, recipe, samples)
    dit.module.requires_grad_(False)
    return Prepared(recipe, folder, dit, plan, statistics, files, _rows_of(paths), train, held_out, samples)


def _rows_of(paths: Sequence[Path]) -> dict[str, Rows]:
    return {linear: rows for path in paths for linear, rows in split(load_weights(path)).items()}


def _with_ridge(prepared: Prepared, ridge: float) -> dict[str, Rows]:
    sparsity = prepared.recipe.sparsity.model_copy(update={"ridge": ridge})
    folder = prepared.folder / f"ridge-{ridge:g}"
    return _rows_of(
        compensate(prepared.dit, prepared.plan, prepared.statistics, sparsity, folder, no_progress)
    )


def low_ranks(prepared: Prepared, part: int) -> dict[str, TunedLinear]:
    """A branch x A^T B^T beside the solved weights, of rank K / ``part``: the best for what they leave."""
    rows = dict(prepared.solved)
    for group in prepared.plan.groups:
        weight, _ = dense_weights(prepared.dit, group)
        solved = torch.cat([prepared.solved[linear.path].weight for linear in group.linears])
        moments = prepared.statistics.load(group.name)
        down, up = low_rank((weight - solved).T, moments.xx, group.in_channels // part, 1e-3, group.name)
        offset = -(up @ (down @ moments.x_mean))
        sizes = [linear.out_channels for linear in group.linears]
        parts = zip(group.linears, up.split(sizes), offset.split(sizes), strict=True)
        for linear, own, moved in parts:
            old = rows[linear.path]
            rows[linear.path] = replace(old, lora_down=down, lora_up=own, bias=old.bias + moved)
    return prepared.linears(rows)


class Reselecting(TunedLinear):
    """2:4 weights whose mask follows what gradients make of all of them: pruned ones move too, unseen."""

    def _kept(self) -> torch.Tensor:
        assert self.keep is not None, "its weights are 2:4"
        return self.weight + (self.weight * self.keep - self.weight).detach()

    @torch.no_grad()
    def choose(self) -> int:
        """Take the 2 largest of every 4, where kept ones count ``HYSTERESIS`` times; how many weights were swapped."""
        assert self.keep is not None, "its weights are 2:4"
        keep = keep_mask(self.weight * torch.where(self.keep, HYSTERESIS, 1.0))
        swapped = int((keep & ~self.keep).sum())
        self.keep.copy_(keep)
        return swapped


def reselecting(prepared: Prepared) -> dict[str, TunedLinear]:
    """Pruned weights begin at zero, and have to earn their place."""
    return {path: Reselecting(rows).to(prepared.device) for path, rows in prepared.solved.items()}


def psnr_of(prepared: Prepared, linears: Mapping[str, TunedLinear]) -> float:
    """Mean PSNR in dB of the pipeline's images against the dense model's, on prompts that calibration did not see."""
    sampler = open_sampler(prepared.recipe, prepared.folder / "converted")
    assert sampler is not None, "the recipe has a pipeline"
    module = getattr(sampler.pipe, prepared.dit.component).to(next(iter(linears.values())).weight.device)
    dense = draw(sampler, no_progress)
    with substituted(module, linears):
        found = draw(sampler, no_progress)
    if dense is None or found is None:
        return float("nan")
    return float(np.mean([psnr(*pair) for pair in zip(dense, found, strict=True)]))


def tune(prepared: Prepared, linears: Mapping[str, TunedLinear], minutes: float, steps: int) -> float:
    """The held-out error after tuning end to end."""
    effort = Effort(steps, 60 * minutes, prepared.samples, 0, END_RATE)

    def after_step(what: str, done: int, total: int) -> None:
        choosing = [linear for linear in linears.values() if isinstance(linear, Reselecting)]
        if (
            choosing and done % CHOOSE_EVERY == 1 and done < 0.7 * total
        ):  # right after a look, and then they settle
            logging.info("step %d: %d weights swapped", done, sum(linear.choose() for linear in choosing))

    with substituted(prepared.dit.module, linears):
        outcome = fit(
            prepared.dit.module, linears.values(), prepared.train, prepared.held_out, effort, after_step
        )
        logging.info("%s", outcome)
        return output_error(prepared.dit.module, prepared.held_out, prepared.samples)


if __name__ == "__main__":
    typer.run(main)
