# SPDX-License-Identifier: Apache-2.0
"""What a compilation would decide under a budget, for those who measure it: the same stages, without a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lynx_compile.files.progress import Progress
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.passes.budget import Selection, choose
from lynx_compile.passes.calibrate import calibrate
from lynx_compile.passes.compensate import compensate
from lynx_compile.passes.select import candidates
from lynx_compile.passes.sensitivity import sensitivity
from lynx_compile.passes.tune import is_tuned, tune
from lynx_compile.passes.verify import Verified, Weights, verify, within_error
from lynx_compile.recipe import Budget, Recipe


@dataclass(frozen=True)
class Budgeted:
    """``verified.weights`` are the files of what was decided; ``solved``: those of every node that could be."""

    selection: Selection
    verified: Verified
    solved: Weights

    @property
    def speed(self) -> float:
        """How many times as fast as dense the blocks' linears are together."""
        return self.selection.speed(self.verified.taken)


def budgeted(
    dit: DiT,
    recording: Recording,
    recipe: Recipe,
    gpus: tuple[str, ...],
    folder: Path,
    key: str,
    progress: Progress,
) -> Budgeted:
    """Decide for ``gpus`` by the recipe's ``sparsity`` and ``budget``, the default one where it has none.

    Args:
        folder: for what is left on the way. key: of all that it depends on; of the same one, probes and tuning go on.

    Raises:
        InputError: nothing is open to the budget, or it leaves no linear to change.
    """
    found = candidates(dit.groups, recipe.sparsity, gpus)
    everything = found.everything()
    statistics = calibrate(dit, everything, recording, recipe, folder / "statistics", progress)
    files = compensate(dit, everything, statistics, recipe.sparsity, folder / "weights", progress)
    measured = sensitivity(dit, found.nodes, files, recording, recipe, folder / "sensitivity", key, progress)
    is_moved = is_tuned(dit, found.fastest(), recipe)
    selection = choose(found, measured, recipe.budget or Budget(), tuned=is_moved)
    taken, solved = len(selection.steps), dict(zip(found.nodes, files, strict=True))
    if selection.is_optimistic:
        taken = within_error(dit, selection, solved, recording, progress)
    plan, tuned = selection.plan(taken), None
    if is_moved:
        weights = [solved[group] for group in plan.groups]
        made = tune(
            dit, plan, weights, statistics, recording, recipe, folder / "tuned", f"{key} {plan}", progress
        )
        tuned = dict(zip(plan.groups, made.weights, strict=True))
    verified = verify(dit, selection, taken, solved, tuned, recording, None, progress)
    return Budgeted(selection, verified, solved)
