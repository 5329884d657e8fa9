# SPDX-License-Identifier: Apache-2.0
"""Tune all compensated weights at once, by the error of the model's own output.

What a block cannot mend in its own result, those behind it can. It takes all weights, their gradients and Adam's
moments at once, so it is for what fits in memory; blocks are recomputed in the backward pass where the model can.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lynx_compile.files.progress import Progress
from lynx_compile.files.tensors import load_keyed, save_keyed
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.passes.block_weights import Files, all_linears, substituted
from lynx_compile.passes.select import SparsityPlan
from lynx_compile.passes.states import apart, calls_within, drawn_calls, samples_of, states_of
from lynx_compile.recipe import Recipe
from lynx_compile.solve.stacking import State, batches, joined, outputs_of, parted
from lynx_compile.solve.tune import BYTES_A_WEIGHT, Effort, Outcome, Rows, Shelf, fit

END_RATE = 0.003  # of a tensor's rms in a step, at first (solve.tune.Effort)
KEPT = 6  # values kept for the backward pass, to each that a compressed linear reads or returns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Whole:
    """What came of it. ``outcome``: held-out errors as the steps' weights have them.

    Errors: |y - y_dense| / |y_dense| of the model's output over the calls held out, of what was solved, of what
    tuning was given, and of what it made.
    """

    outcome: Outcome
    compensated_error: float
    given_error: float
    tuned_error: float


def fits(dit: DiT, plan: SparsityPlan) -> bool:
    """Whether the GPU's free memory holds what it takes."""
    dit.module.requires_grad_(False)  # loads it, where no stage before has: what it takes is not free
    return leaves_room(sum(group.weights for group in plan.groups), _free_bytes(dit))


def leaves_room(weights: int, free: float) -> bool:
    """Whether so many weights leave a third of the ``free`` bytes to activations."""
    return BYTES_A_WEIGHT * weights < 2 / 3 * free


def end_to_end(
    dit: DiT,
    files: Files,
    solved: Mapping[str, Rows],
    rows: Mapping[str, Rows],
    recording: Recording,
    recipe: Recipe,
    effort: Effort,
    shelf: Path,
    key: str,
    progress: Progress,
) -> tuple[dict[str, Rows], Whole]:
    """Tune from ``rows`` on, those of all compensated linears by path; ``solved``: as they were before any tuning.

    A run that was stopped goes on with what it left in the file ``shelf`` for the same ``key``.
    """
    train, held_out = drawn_states(dit, recording, recipe, effort.samples)
    device = dit.device
    dit.module.requires_grad_(False)
    with substituted(dit.module, all_linears(files, solved, device)):
        compensated = output_error(dit.module, held_out, effort.samples)
    paper = recipe.sparsity.method == "paper"  # which trains its low rank alone
    linears = all_linears(files, rows, device, low_rank_alone=paper)
    with substituted(dit.module, linears), _checkpointing(dit, files, effort.samples, recording):
        given = output_error(dit.module, held_out, effort.samples)
        outcome = fit(dit.module, linears.values(), train, held_out, effort, progress, _on_disk(shelf, key))
        tuned = output_error(dit.module, held_out, effort.samples)
    found = {path: linear.rows() for path, linear in linears.items()}
    return found, Whole(outcome, compensated, given, tuned)


def drawn_states(
    dit: DiT, recording: Recording, recipe: Recipe, samples: int
) -> tuple[list[State], list[State]]:
    """Calls that ``calibration.memory_gib`` holds, with the dense model's results: to tune on, and held out.

    ``samples``: that may run as one.
    """
    calls = dit.calls.calls
    out = recording.held_out(calls)
    chosen = drawn_calls(calls, out, recipe.calibration.seed)
    chosen = chosen[: calls_within(recording, [calls[n] for n in chosen], recipe.calibration.memory_gib)]
    train, held_out = apart(chosen, states_of(dit, recording, [calls[n] for n in chosen]), out)
    return with_targets(dit, train, samples), with_targets(dit, held_out, samples)


@torch.no_grad()
def output_error(module: torch.nn.Module, states: Sequence[State], samples: int) -> float:
    """|y - y_dense| / |y_dense| over all states; so many ``samples`` may run as one."""
    lost = whole = 0.0
    device = next(module.parameters()).device
    for batch in batches(states, samples):
        given, rows = [(state.args, state.kwargs, state.targets) for state in batch], batch[0].rows
        args, kwargs, targets = joined(given, rows, device)
        for result, target in zip(outputs_of(module(*args, **kwargs)), targets, strict=True):
            lost += float((result.double() - target.double()).square().sum())
            whole += float(target.double().square().sum())
    return float((lost / max(whole, 1e-30)) ** 0.5)


@torch.no_grad()
def with_targets(dit: DiT, states: Sequence[State], samples: int) -> list[State]:
    """The states with what the dense model returns."""
    device = dit.device
    made: dict[int, State] = {}
    for batch in batches(states, samples):
        args, kwargs = joined([(state.args, state.kwargs) for state in batch], batch[0].rows, device)
        targets = parted(
            tree_map(torch.Tensor.cpu, outputs_of(dit.module(*args, **kwargs))), len(batch), batch[0].rows
        )
        made |= {id(state): replace(state, targets=of) for state, of in zip(batch, targets, strict=True)}
    return [made[id(state)] for state in states]


@contextmanager
def _checkpointing(dit: DiT, files: Files, samples: int, recording: Recording) -> Iterator[None]:
    """Blocks keep what they are given alone meanwhile, where memory does not hold more and the model can."""
    read = sum(
        group.tokens * (group.in_channels + sum(linear.out_channels for linear in group.linears))
        for group in files
    )
    calls = samples / samples_of(recording, dit.calls.calls[0])
    left = _free_bytes(dit) - BYTES_A_WEIGHT * sum(group.weights for group in files)
    if KEPT * calls * read * dit.dtype.itemsize < 2 / 3 * left or not can_recompute(dit.module):
        yield
        return
    log.info("end to end with gradient checkpointing")
    module: Any = dit.module
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()


def can_recompute(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "_supports_gradient_checkpointing", False))


def _free_bytes(dit: DiT) -> float:
    """Of the GPU; no limit on a CPU, where only small models are tuned."""
    device = dit.device
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _on_disk(path: Path, key: str) -> Shelf:
    """A safetensors file; what another run left there is not taken."""

    def load() -> dict[str, torch.Tensor] | None:
        done = load_keyed(path, key)
        return None if done is None else done[0]

    return Shelf(load, partial(save_keyed, path, key))
