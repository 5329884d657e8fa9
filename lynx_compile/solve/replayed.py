# SPDX-License-Identifier: Apache-2.0
"""Loops of many small steps on a GPU: recorded once as a CUDA graph, and replayed.

A sweep over the columns of a weight launches some ten kernels a column, each of microseconds: Python takes longer to
launch them than the GPU to run them. A graph launches all of a block of columns at once. Results are the same. So it is
with the gradients of a model of some hundred million weights, of which a step launches thousands of kernels.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Tensors = tuple[torch.Tensor, ...]
# Of tensors alone, whose shapes decide what it launches, and which it leaves as they are.
Loop = Callable[..., Tensors]
KEPT = 16  # graphs, with their tensors
LAUNCHED = 3  # times that gradients are, until they are recorded: what is set up once is then
KINDS = 4  # of them that are recorded
ALIKE = 1e-3  # of a loss, replayed and launched: flash attention adds in any order

log = logging.getLogger(__name__)


def replayed(loop: Loop, *given: torch.Tensor) -> Tensors:
    """``loop(*given)``; on a GPU what is returned lives until the next call."""
    if not given[0].is_cuda:
        return loop(*given)
    graph = _graph(loop, given[0].device, tuple((tensor.shape, tensor.dtype) for tensor in given))
    return graph(given)


class _Graph:
    """A loop's launches on tensors of its own."""

    def __init__(
        self, loop: Loop, device: torch.device, kinds: tuple[tuple[torch.Size, torch.dtype], ...]
    ) -> None:
        self._given = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in kinds]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            loop(*self._given)  # whatever is set up at a first call
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._found = loop(*self._given)

    def __call__(self, given: Tensors) -> Tensors:
        for own, tensor in zip(self._given, given, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._found


@lru_cache(KEPT)
def _graph(loop: Loop, device: torch.device, kinds: tuple[tuple[torch.Size, torch.dtype], ...]) -> _Graph:
    return _Graph(loop, device, kinds)


def forget() -> None:
    """Free the graphs and their memory."""
    _graph.cache_clear()


class Gradients:
    """The gradients of a step in ``parameters``; on a GPU what they launch is recorded, and replayed.

    ``loss``: of one part of a step, a tree with tensors on the parameters' device, to a scalar. What it launches may
    depend on the part's kind, on shapes and on what is no tensor, and on nothing else.
    """

    def __init__(self, loss: Callable[[Any], torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> None:
        self._loss, self._parameters = loss, parameters
        self._records = parameters[0].is_cuda
        self._launched: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._records else None

    def take(self, parts: Iterable[tuple[Hashable, Any]]) -> None:
        """Of the sum of the parts' losses, each with its kind: None for what has nothing in common with others."""
        if not self._records:
            for parameter in self._parameters:
                parameter.grad = None
            for _, part in parts:
                self._loss(part).backward()
            return
        self._zero()
        for number, (kind, part) in enumerate(parts):
            self._add(None if kind is None else (kind, _recorded_of(part)), part, is_first=not number)

    def _add(self, kind: Hashable, part: Any, is_first: bool) -> None:
        if kind in self._recorded:
            self._recorded[kind](part)
            return
        self._launched[kind] += 1
        may_be = self._records and kind is not None and is_first and len(self._recorded) < KINDS
        if not (may_be and self._launched[kind] > LAUNCHED and self._record(kind, part)):
            self._loss(part).backward()

    def _record(self, kind: Hashable, part: Any) -> bool:
        """Whether it could be, and the gradients are there."""
        generator = torch.cuda.default_generators[self._parameters[0].device.index]
        state = generator.clone_state()
        try:
            with _refused_to_wait():
                loss = self._loss(_copied(part))  # it may write into what it is given
                loss.backward()
            # Its graph holds the parameters' nodes to the stream that it ran on, which is not the one that records.
            loss = loss.detach()
            self._zero()
            torch.cuda.empty_cache()  # a graph has memory of its own, which nothing else can take
            before, _ = torch.cuda.mem_get_info()
            found = _Recorded(self._loss, part, self._pool)
            left, _ = torch.cuda.mem_get_info()
            found(part)
            if left < before - left:
                reason = "it leaves less memory than it takes"
            elif math.isclose(float(found.loss), float(loss), rel_tol=ALIKE):
                self._recorded[kind] = found
                return True
            else:
                reason = f"a loss of {float(found.loss):g} and not {float(loss):g}"
        except RuntimeError as error:  # what waits for the GPU, or takes more memory
            reason = str(error).splitlines()[0]
            generator.graphsafe_set_state(state)  # of a graph that ended early it would stay the graph's
        log.info("steps are launched one by one, since a CUDA graph of them fails: %s", reason)
        self._records = False
        self._recorded.clear()
        self._zero()
        return False

    def _zero(self) -> None:
        """In place, for a graph adds to what was there when it was recorded."""
        if gradients := [p.grad for p in self._parameters if p.grad is not None]:
            torch._foreach_zero_(gradients)


@contextmanager
def _refused_to_wait() -> Iterator[None]:
    """What waits for the GPU raises RuntimeError meanwhile: a graph that is being recorded would end in disorder."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # which is a prototype, it says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _recorded_of(part: Any) -> Hashable:
    """What a graph has of a part for good."""
    leaves, _ = tree_flatten(part)
    return tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)


def _copied(part: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, part)


class _Recorded:
    """What a part's gradients launch, on tensors of its own. ``loss``: of the last part."""

    def __init__(self, loss: Callable[[Any], torch.Tensor], part: Any, pool: Any) -> None:
        self._own, structure = tree_flatten(_copied(part))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            found = loss(tree_unflatten(self._own, structure))
            found.backward()
            self.loss = found.detach()

    def __call__(self, part: Any) -> None:
        leaves, _ = tree_flatten(part)
        for own, leaf in zip(self._own, leaves, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(leaf)
        self._graph.replay()
