# SPDX-License-Identifier: Apache-2.0
"""Calls that stop at blocks: what a module does between and after them, it does as ever."""

from __future__ import annotations

import pytest
import torch

from lynx_compile.models.blocks import block_paths, walks


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        self.inner = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))])

    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        return x + scale * self.down(self.up(x).relu())


class Net(torch.nn.Module):
    """With work between its blocks, and a skip from the first to behind the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block(), Block()])
        self.ended = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            first = self.blocks[0](x.tanh(), scale=0.5)
            middle = self.blocks[1](first * 2, scale=1.0)
            return first + self.blocks[2](middle.sin(), scale=2.0)
        finally:
            self.ended += 1


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_blocks_are_the_outer_ones(net: Net) -> None:
    assert block_paths(net) == ("blocks.0", "blocks.1", "blocks.2")


def test_calls_side_by_side_give_what_each_gives_alone(net: Net) -> None:
    inputs = [torch.randn(3, 4) for _ in range(4)]
    with torch.no_grad():
        wanted = [net(x) for x in inputs]
    with walks(net, [lambda x=x: net(x) for x in inputs]) as calls:
        for call in calls:
            call.start()
        for path in block_paths(net):
            assert [call.at.path for call in calls if call.at] == [path] * 4
            for call in calls:
                assert call.at is not None
                with torch.no_grad():
                    call.go_on(net.get_submodule(path)(*call.at.args, **call.at.kwargs))
        assert all(call.at is None for call in calls)
        for call, y in zip(calls, wanted, strict=True):
            assert torch.equal(call.result, y)


def test_a_call_goes_on_with_what_it_is_told(net: Net) -> None:
    with walks(net, [lambda: net(torch.ones(1, 4))]) as (call,):
        call.start()
        call.go_on(torch.full((1, 4), 3.0))
        assert call.at is not None and call.at.kwargs == {"scale": 1.0}
        assert torch.equal(call.at.args[0], torch.full((1, 4), 6.0))
        call.go_on(torch.zeros(1, 4))
        call.go_on(torch.ones(1, 4))
        assert torch.equal(call.result, torch.full((1, 4), 4.0))


def test_what_is_left_half_way_leaves_nothing_behind(net: Net) -> None:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return net(torch.ones(1, 4))

    with pytest.raises(KeyboardInterrupt), walks(net, [run] * 2) as calls:  # noqa: PT012
        for call in calls:
            call.start()
        raise KeyboardInterrupt
    assert net.ended == 2, "the frames were unwound"
    assert torch.is_grad_enabled()
    assert all("forward" not in block.__dict__ for block in net.blocks)
    assert net(torch.ones(1, 4)).requires_grad


def test_an_error_of_the_call_reaches_whoever_moves_it(net: Net) -> None:
    with walks(net, [lambda: net(torch.ones(1, 4))]) as (call,):
        call.start()
        with pytest.raises(TypeError, match="unsupported operand"):
            call.go_on(None)
