# SPDX-License-Identifier: Apache-2.0
"""The recorded calls that tuning takes through the model side by side, and which of them are held out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lynx_compile.errors import StageError
from lynx_compile.models.blocks import Walk, walks
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Call, Recording
from lynx_compile.passes.calibrate import replay
from lynx_compile.recipe import Recipe

HELD_OUT = 8  # one sample of so many
COPIES = 4  # of what a block is given that a call needs memory for: dense, compensated and tuned, and what to return

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """A recorded call: dense, tuned, and where it is held out compensated. ``weight``: what its errors count."""

    weight: float
    dense: Walk
    tuned: Walk
    compensated: Walk | None

    @property
    def is_held_out(self) -> bool:
        return self.compensated is not None  # a greenlet that has ended is false

    @property
    def walks(self) -> tuple[Walk, ...]:
        return (self.dense, self.tuned, *(() if self.compensated is None else (self.compensated,)))


@contextmanager
def lanes(dit: DiT, recording: Recording, recipe: Recipe) -> Iterator[list[Lane]]:
    """A lane for every call that there is memory for, come to its first block."""
    calls = dit.calls.calls
    held_out = held_out_of(calls)
    chosen = _chosen(dit, recording, recipe, held_out)
    last = max(call.step for call in calls)
    runs: list[Callable[[], Any]] = []
    for number in chosen:
        runs += [partial(_run, dit, recording, calls[number])] * (3 if number in held_out else 2)
    with walks(dit.module, runs) as made:
        left = iter(made)
        found = []
        for number in chosen:
            dense, tuned = next(left), next(left)
            compensated = next(left) if number in held_out else None
            found.append(Lane(weight_of(calls[number], last), dense, tuned, compensated))
        for walk in made:
            walk.start()
        yield found


def weight_of(call: Call, last: int) -> float:
    """What a state's squared relative error counts: twice at the first step, falling to once at the ``last``."""
    return 2 - call.step / max(last, 1)


def where(found: Sequence[Lane]) -> str | None:
    """The block that all calls have come to; None where they have ended.

    Raises:
        StageError: it is not the same.
    """
    places = {walk.at.path if walk.at else None for lane in found for walk in lane.walks}
    if len(places) > 1:
        raise StageError(
            "tune",
            f"the model's calls do not run the same blocks ({', '.join(sorted(map(str, places)))}).",
            "Set compensation.tune to false.",
        )
    return places.pop()


def _run(dit: DiT, recording: Recording, call: Call) -> Any:
    return replay(dit, recording.arguments(call))


def held_out_of(calls: Sequence[Call]) -> set[int]:
    """Positions of the calls of every eighth sample, the last one at least; of every eighth call of one sample."""
    samples = sorted({call.sample for call in calls})
    units = [call.sample if len(samples) > 1 else number for number, call in enumerate(calls)]
    order = sorted(set(units))
    out = set(order[HELD_OUT - 1 :: HELD_OUT] or order[-1:])
    return {number for number, unit in enumerate(units) if unit in out}


def _chosen(dit: DiT, recording: Recording, recipe: Recipe, held_out: set[int]) -> list[int]:
    """Positions of the calls that ``calibration.memory_gib`` holds, drawn at random of both kinds."""
    calls = dit.calls.calls
    most = int(recipe.calibration.memory_gib * 2**30 / (COPIES * _bytes_at_a_block(dit, recording)))
    choice = torch.Generator().manual_seed(recipe.calibration.seed)
    order = torch.randperm(len(calls), generator=choice).tolist()
    kinds = [[n for n in order if n not in held_out], [n for n in order if n in held_out]]
    kept = [kind[: max(most * len(kind) // len(calls), 1)] for kind in kinds]
    if sum(map(len, kept)) < len(calls):
        log.info(
            "tuning on %d of %d calls, which fit calibration.memory_gib", sum(map(len, kept)), len(calls)
        )
    return sorted(kept[0] + kept[1])


def _bytes_at_a_block(dit: DiT, recording: Recording) -> int:
    """What a call holds that has come to the first block."""
    with walks(dit.module, [partial(_run, dit, recording, dit.calls.calls[0])]) as (walk,):
        walk.start()
        given = tree_leaves((walk.at.args, walk.at.kwargs)) if walk.at else []
    tensors = {leaf.data_ptr(): leaf.nbytes for leaf in given if isinstance(leaf, torch.Tensor)}
    return max(sum(tensors.values()), 1)
