# SPDX-License-Identifier: Apache-2.0
"""How well the budget predicts, on digits-flux: probes against one linear at a time, plans against calls held out.

``python -m calib.digits_flux.budget [--calls 16] [--images 40] [--minutes 3]`` from the repository's root, ten minutes
of a core; ``--recipe engines/emoji-flux.yaml`` for another model. All linears are open, to the forms that the H100's
table and the roofline leave.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer

from calib.digits_flux import digits
from calib.recorded import recorded
from lynx_compile.files.progress import no_progress
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.passes.block_weights import node_linears
from lynx_compile.passes.budget import Selection, choose
from lynx_compile.passes.verify import HeldOut, Weights, linears_of
from lynx_compile.recipe import Budget, Sparsity, load_recipe
from lynx_compile.tools.budgeted import budgeted
from lynx_compile.tools.drawn import Drawn

ROOT = digits.HERE.parents[1]
RECIPE = ROOT / "engines" / "digits-flux.yaml"
COSTS = ROOT / "engines" / "bench" / "nvidia-h100-80gb-hbm3-fp8.json"


def main(
    recipe: Path = RECIPE,
    limit: float = 0.01,
    minutes: float = 3.0,
    calls: int = 16,
    images: int = 40,
    folder: Annotated[Path, typer.Option(help="What is made on the way is kept there.")] = Path(
        "build/budget"
    ),
) -> None:
    """Decide under ``max_output_error: limit``, tune for so many minutes, and print what came of it, and two tables."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = load_recipe(recipe)
    changes = {
        "sparsity": Sparsity(costs=str(COSTS)),
        "budget": Budget(max_output_error=limit),
        "compensation": given.compensation.model_copy(update={"minutes": minutes}),
        "compare": given.compare.model_copy(update={"samples": images}),
    }
    changed = given.model_copy(update=changes)
    recording, dit = recorded(changed, folder)
    key = f"{recording.header.key} {changed.model_dump_json()}"
    made = budgeted(dit, recording, changed, ("sm90",), folder, key, no_progress)
    print("steps | predicted | solved | tuned")
    for at in (made.verified.whole, *made.verified.steps):
        print(
            f"{at.first} to {at.last} | {at.predicted:.4f} | {at.solved or 0:.4f} | {at.tuned or 0:.4f}",
            flush=True,
        )
    found = made.selection.candidates
    chosen = choose(
        found, made.selection.sensitivities, Budget(max_output_error=0.5)
    )  # every step of the knapsack
    print_plans(dit, recording, chosen, made.solved, Drawn(changed, folder / "converted", dit.component))
    print_linears(dit, recording, chosen, made.solved, calls)


def print_linears(dit: DiT, recording: Recording, chosen: Selection, solved: Weights, calls: int) -> None:
    """Error at the output of one linear's form alone: by probes, and with that one changed in the model."""
    held_out = HeldOut(dit, recording, no_progress, calls)
    rows, nodes = chosen.sensitivities.load(), chosen.candidates.nodes
    probed, exact = [], []
    print("linear | form | by probes | one at a time")
    for number, (node, path) in enumerate(chosen.sensitivities.columns):
        linear = node_linears(solved[nodes[node]], held_out.device, held_out.dtype)[path]
        probed.append(rows.error(rows.adds[:, number]))
        exact.append(held_out.error(held_out.squares({path: linear})))
        print(f"{path} | {nodes[node].form.words} | {probed[-1]:.5f} | {exact[-1]:.5f}", flush=True)
    a, b = torch.tensor(probed, dtype=torch.float64), torch.tensor(exact, dtype=torch.float64)
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    ratio = (a / b).sort().values
    print(
        f"{len(a)} linears and forms: rank correlation {float(torch.corrcoef(ranks)[0, 1]):.3f}, probes over exact: "
        f"a tenth below {float(ratio[len(ratio) // 10]):.2f}, a tenth above {float(ratio[-1 - len(ratio) // 10]):.2f}, "
        f"median {float(ratio.median()):.2f}"
    )


def print_plans(dit: DiT, recording: Recording, chosen: Selection, solved: Weights, drawn: Drawn) -> None:
    """Plans along the knapsack's order: error at the output predicted and measured, and what images keep of it."""
    held_out = HeldOut(dit, recording, no_progress)
    print("steps | speed | predicted | measured, solved | PSNR, dB")
    count = len(chosen.steps)
    for taken in sorted({max(count * part // 8, 1) for part in range(1, 9)}):
        linears = linears_of(chosen, taken, solved, held_out.device, held_out.dtype)
        error = held_out.error(held_out.squares(linears))
        print(
            f"{taken} | {chosen.speed(taken):.2f}x | {chosen.error(taken):.4f} | {error:.4f} | {drawn(linears):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
