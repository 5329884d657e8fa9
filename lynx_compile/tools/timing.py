# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU that can be compared: works as CUDA graphs, in turns, in orders that favour none.

Where there is no GPU the same works run one by one on the CPU, which is good for trying out what measures.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

STEADY_SECONDS = 0.25


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """``work`` as a CUDA graph to replay, so that Python's launches take no part; without a GPU, ``work`` itself."""
    if not torch.cuda.is_available():

        def run() -> None:
            work()

        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()  # what is done once only: cuBLAS's workspace, say
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> None:
        _ = work  # lives on with its tensors, of which the graph knows the addresses alone
        graph.replay()

    return replay


def take_turns(works: Mapping[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of one of the ``calls`` in each work, in each round.

    A round runs all works, in an order of its own: what a work leaves behind (a warm cache, a clock that has dropped)
    must not fall upon the same neighbour every time.
    """
    for work in works.values():
        work()
    synchronize()
    times: dict[str, list[float]] = {name: [] for name in works}
    for names in itertools.islice(orders(list(works)), rounds):
        events = {name: [_event() for _ in range(2)] for name in works}
        works[names[-1]]()  # untimed: the GPU must not wait for the launch of the first
        for name in names:
            events[name][0].record()
            works[name]()
            events[name][1].record()
        synchronize()
        for name, (start, stop) in events.items():
            times[name].append(1000 * start.elapsed_time(stop) / calls)
    return times


def orders(names: Sequence[str]) -> Iterator[list[str]]:
    """``names`` in an order for each round, without end, so that all follow one another equally often.

    E. J. Williams's balanced square: 0, n-1, 1, n-2, ... and its rotations hold each pair of neighbours once if n is
    even; with the same backwards, each twice for any n.
    """
    count = len(names)
    zigzag = [i // 2 if i % 2 == 0 else count - 1 - i // 2 for i in range(count)]
    for turn in itertools.count():
        order = [names[(at + turn) % count] for at in zigzag]
        yield order if turn // count % 2 == 0 else order[::-1]


def take_long_turns(works: Mapping[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """Microseconds of a call when its work runs for STEADY_SECONDS without a break; the median of three turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for names in itertools.islice(orders(list(works)), 3):
        for name in names:
            work = works[name]
            first, middle, last = (_event() for _ in range(3))
            once = take_turns({name: work}, 1, calls)[name][0]
            count = max(1, round(STEADY_SECONDS * 1e6 / once / calls / 2))
            for event in (first, middle):
                event.record()
                for _ in range(count):
                    work()
            last.record()
            synchronize()
            times[name].append(1000 * middle.elapsed_time(last) / count / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else _CpuEvent()


class _CpuEvent:
    """What is needed of a ``torch.cuda.Event``, for what has run when it returns."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: _CpuEvent) -> float:
        """Milliseconds."""
        return 1000 * (later.at - self.at)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def file_name(device: str) -> str:
    """A GPU's name as a file's: nvidia-h100-80gb-hbm3."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
