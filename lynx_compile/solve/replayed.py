# SPDX-License-Identifier: Apache-2.0
"""Loops of many small steps on a GPU: recorded once as a CUDA graph, and replayed.

A sweep over the columns of a weight launches some ten kernels a column, each of microseconds: Python takes longer to
launch them than the GPU to run them. A graph launches all of a block of columns at once. Results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

Tensors = tuple[torch.Tensor, ...]
# Of tensors alone, whose shapes decide what it launches, and which it leaves as they are.
Loop = Callable[..., Tensors]
KEPT = 16  # graphs, with their tensors


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
