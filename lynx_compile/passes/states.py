# SPDX-License-Identifier: Apache-2.0
"""The recorded calls as states to tune and measure on: which are held out, which may run as one, what each counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch

from lynx_compile.engine.arguments import unflatten
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Call, Recording
from lynx_compile.passes.calibrate import given
from lynx_compile.solve.stacking import State, joined, outputs_of, parted

SAME = 0.02  # relative difference, in 16 bits, of what was computed as one from what was computed alone

log = logging.getLogger(__name__)


def drawn_calls(calls: Sequence[Call], held_out: set[int], seed: int) -> list[int]:
    """Positions of the calls in a random order, of which any part has about as many held out as all of them."""
    choice = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(calls), generator=choice).tolist()
    kinds = [[n for n in order if n in held_out], [n for n in order if n not in held_out]]
    places = [(place / len(kind), n) for kind in kinds for place, n in enumerate(kind)]
    return [n for _, n in sorted(places, key=lambda pair: pair[0])]


def spread_calls(calls: Sequence[Call], seed: int, most: int) -> list[Call]:
    """So many of the calls, in turn of every step and branch, each time of a sample drawn at random."""
    turns: dict[tuple[int, str], int] = {}
    ranked: list[tuple[int, int, int]] = []
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed)).tolist()
    for position in order:
        kind = calls[position].step, calls[position].branch
        turns[kind] = turns.get(kind, 0) + 1
        ranked.append((turns[kind], len(ranked), position))
    return [calls[position] for *_, position in sorted(ranked)[:most]]


def calls_within(recording: Recording, calls: Sequence[Call], gib: float) -> int:
    """How many of the calls, from the first on, memory holds with what they return; two at least."""
    left, known = gib * 2**30, set[str]()
    for number, call in enumerate(calls):
        signature = recording.signature(call)
        for name, blob in call.blobs.items():
            if blob not in known:
                known.add(blob)
                left -= math.prod(signature.shapes[name]) * getattr(torch, signature.dtypes[name]).itemsize
        left -= 4 * sum(math.prod(shape) for shape in signature.results)
        if left < 0:
            return max(number, 2)
    return len(calls)


def weight_of(call: Call, last: int) -> float:
    """What a state's squared relative error counts: twice at the first step, falling to once at the ``last``."""
    return 2 - call.step / max(last, 1)


def samples_of(recording: Recording, call: Call) -> int:
    """The batch of a call: the rows of what it returns."""
    results = recording.signature(call).results
    return results[0][0] if results and results[0] else 1


def states_of(dit: DiT, recording: Recording, calls: Sequence[Call]) -> list[tuple[State, ...]]:
    """Each call as the module is given it, on the CPU, with no targets yet.

    A call of a batch is cut into several states (``rows_of_a_part``): of many of them a step draws from all steps of
    the pipeline, where a few whole calls would each be of one. States are of one kind where they agree in shapes, and
    in every tensor that is not the batch's, such as positions; of none, and whole calls, if the module does not treat
    a batch's rows alike.
    """
    cpu, last = torch.device("cpu"), max(call.step for call in dit.calls.calls)
    stored: dict[str, torch.Tensor] = {}  # what calls share is held once
    whole = []
    parts = []
    for call in calls:
        signature = recording.signature(call)
        tensors = {
            name: stored.setdefault(call.blobs[name], tensor)
            for name, tensor in recording.tensors(call).items()
        }
        args, kwargs = given(dit, dict(unflatten(signature.structure, tensors)), cpu)
        state = State(args, kwargs, (), weight_of(call, last))
        if signature.results and signature.results[0]:
            rows = samples_of(recording, call)
            own = {name for name, shape in signature.shapes.items() if shape and shape[0] == rows}
            shared = tuple((name, blob) for name, blob in call.blobs.items() if name not in own)
            shapes = tuple((name, shape[name in own :]) for name, shape in signature.shapes.items())
            state = replace(state, kind=(rows_of_a_part(rows), shapes, shared), rows=rows)
        whole.append(state)
        parts.append(tuple(_cut(state)))
    if not rows_are_alike(dit.module, [part for call in parts for part in call], dit.device):
        log.info("the model's calls cannot be joined to one: they run one after the other")
        return [(replace(state, kind=None),) for state in whole]
    return parts


def apart(
    chosen: Sequence[int], states: Sequence[Sequence[State]], held_out: set[int]
) -> tuple[list[State], list[State]]:
    """The ``states`` of the ``chosen`` calls: to fit to, and held out."""
    kinds: tuple[list[State], list[State]] = [], []
    for number, parts in zip(chosen, states, strict=True):
        kinds[number in held_out].extend(parts)
    return kinds


def rows_of_a_part(rows: int) -> int:
    """Of the states that a call of so many rows is cut into: the fewest that divide it, but two.

    A single row would have the shape of what a batch shares, such as positions [1, tokens, axes].
    """
    return next((part for part in range(2, rows) if rows % part == 0), rows)


def _cut(state: State) -> Iterator[State]:
    rows = rows_of_a_part(state.rows)
    for args, kwargs in parted((state.args, state.kwargs), state.rows // rows, rows):
        yield replace(state, args=args, kwargs=kwargs, rows=rows)


@torch.no_grad()
def rows_are_alike(
    module: Callable[..., object], states: Sequence[State], device: torch.device | None = None
) -> bool:
    """Whether two calls of a kind make the same as one call as each alone; true where there are no two.

    The first of a kind and the last: parts of one call follow each other, and have its step in common.
    """
    first: dict[Hashable, State] = {}
    last: dict[Hashable, State] = {}
    for state in states:
        first.setdefault(state.kind, state)
        last[state.kind] = state
    pair = next(
        ((one, last[kind]) for kind, one in first.items() if kind is not None and last[kind] is not one), None
    )
    if pair is None:
        return True
    rows = pair[0].rows

    def run(some: Sequence[State]) -> tuple[torch.Tensor, ...]:
        args, kwargs = joined([(state.args, state.kwargs) for state in some], rows, device)
        return outputs_of(module(*args, **kwargs))

    try:
        together, alone = parted(run(pair), 2, rows), [run([state]) for state in pair]
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
    ) as error:  # whatever a module says of a shape
        log.debug("calls as one: %s", error)
        return False
    for one, made in zip(alone, together, strict=True):
        if [t.shape for t in one] != [t.shape for t in made]:
            return False
        if any(
            (a.float() - b.float()).norm() > SAME * a.float().norm() for a, b in zip(one, made, strict=True)
        ):
            return False
    return True
