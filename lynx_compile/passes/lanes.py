# SPDX-License-Identifier: Apache-2.0
"""The recorded calls that tuning takes through the model side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lynx_compile.errors import StageError
from lynx_compile.models.blocks import Walk, at, walks
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.passes.states import apart, drawn_calls, states_of
from lynx_compile.recipe import Recipe
from lynx_compile.solve.stacking import State, batches, joined, outputs_of, parted

COPIES = 4  # of what a block is given that a call needs memory for: dense, compensated and tuned, and what to return

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """Recorded calls as one: dense, tuned, and where they are held out compensated.

    ``states``: what the module is given in each of them.
    """

    states: tuple[State, ...]
    dense: Walk
    tuned: Walk
    compensated: Walk | None

    @property
    def is_held_out(self) -> bool:
        return self.compensated is not None  # a greenlet that has ended is false

    @property
    def walks(self) -> tuple[Walk, ...]:
        return (self.dense, self.tuned, *(() if self.compensated is None else (self.compensated,)))

    def at_block(self, result: Any) -> list[State]:
        """The calls where they are, at a block of which the dense one returns ``result``: views of what is joined."""
        given, calls, rows = at(self.tuned), len(self.states), self.states[0].rows
        parts = parted((given.args, given.kwargs, outputs_of(result)), calls, rows)
        return [
            replace(state, args=args, kwargs=kwargs, targets=targets)
            for state, (args, kwargs, targets) in zip(self.states, parts, strict=True)
        ]


@contextmanager
def lanes(dit: DiT, recording: Recording, recipe: Recipe, samples: int = 1) -> Iterator[list[Lane]]:
    """Lanes for all calls that there is memory for, of so many ``samples`` each, come to their first block."""
    calls = dit.calls.calls
    held_out = recording.held_out(calls)
    size, sizes = _at_first_block(dit, recording)
    chosen = drawn_calls(calls, held_out, recipe.calibration.seed)
    most = max(int(recipe.calibration.memory_gib * 2**30 / (COPIES * size)), 2)
    if most < len(calls):
        log.info(
            "tuning block by block on %d of %d calls, which fit calibration.memory_gib", most, len(calls)
        )
    chosen = chosen[:most]
    states = states_of(dit, recording, [calls[number] for number in chosen])
    parts = []
    for is_out, kind in zip((False, True), apart(chosen, states, held_out), strict=True):
        for batch in batches(kind, samples):
            parts += [(is_out, part) for part in _cut(batch, sizes)]
    runs = [partial(_run, dit, part) for is_out, part in parts for _ in range(3 if is_out else 2)]
    with walks(dit.module, runs) as made:
        left = iter(made)
        found = [
            Lane(tuple(part), next(left), next(left), next(left) if is_out else None)
            for is_out, part in parts
        ]
        for walk in made:
            walk.start()
        yield found


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


def _run(dit: DiT, states: Sequence[State]) -> Any:
    device = dit.device
    args, kwargs = joined([(state.args, state.kwargs) for state in states], states[0].rows, device)
    return dit.module(*args, **kwargs)


def _cut(batch: list[State], sizes: set[int]) -> Iterator[list[State]]:
    """The batch in parts that no tensor's own size can be taken for: what has as many rows belongs to its calls."""
    while batch:
        count = len(batch)
        while count > 1 and count * batch[0].rows in sizes:
            count -= 1
        yield batch[:count]
        batch = batch[count:]


def _at_first_block(dit: DiT, recording: Recording) -> tuple[int, set[int]]:
    """Of a call that has come to the first block: the bytes that it is given there, and all first sizes of tensors."""
    (states,) = states_of(dit, recording, dit.calls.calls[:1])
    run: Callable[[], Any] = partial(_run, dit, states[:1])
    with walks(dit.module, [run]) as (walk,):
        walk.start()
        given = tree_leaves((walk.at.args, walk.at.kwargs)) if walk.at else []
    tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    return max(size * len(states), 1), {tensor.shape[0] for tensor in tensors if tensor.ndim}
