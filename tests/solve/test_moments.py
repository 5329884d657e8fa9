# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lynx_compile.solve.moments import LayerStatistics, Moments, PrunedStatistics

CHANNELS = 8


def _gathered(batches: list[torch.Tensor], moments: Moments) -> Moments:
    for x in batches:
        s = x * (x.abs() > 0.5)
        error = x.round(decimals=1) - x
        moments.add(x, s, [error, error * (s != 0)])
    return moments


def _moments() -> Moments:
    return Moments(CHANNELS, torch.device("cpu"), pruned=True, rounded=True)


def test_what_several_processes_have_seen_adds_up_to_what_one_sees() -> None:
    """Shares of different sizes and means, and a process that saw nothing."""
    torch.manual_seed(0)
    batches = [
        torch.randn(tokens, CHANNELS) + offset for tokens, offset in ((5, 0), (40, 3), (7, -50), (1, 9))
    ]
    shares = [batches[:1], batches[1:], []]
    added: list[LayerStatistics] = _together(shares)
    whole = _gathered(batches, _moments()).finish()
    assert isinstance(whole, PrunedStatistics)
    for one in added:
        assert one.tokens == whole.tokens == 53
        for name in ("x_mean", "s_mean", "xx", "xs", "ss", "x_rounding", "s_rounding"):
            torch.testing.assert_close(getattr(one, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def _together(shares: list[list[torch.Tensor]]) -> list[LayerStatistics]:
    """A thread for each process; what they add up waits for all of them."""
    here, slots = threading.Barrier(len(shares)), [torch.empty(0)] * len(shares)

    def all_reduce(rank: int) -> Callable[[torch.Tensor], None]:
        def add(tensor: torch.Tensor) -> None:
            slots[rank] = tensor.clone()
            here.wait(10)
            total = torch.stack(slots).sum(0)
            here.wait(10)
            tensor.copy_(total)

        return add

    def work(rank: int) -> LayerStatistics:
        moments = _gathered(shares[rank], _moments())
        moments.add_up(all_reduce(rank))
        return moments.finish()

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(work, range(len(shares))))
