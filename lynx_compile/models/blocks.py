# SPDX-License-Identifier: Apache-2.0
"""Calls of a module that stop at every repeated block, so that many calls can go through one block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from greenlet import getcurrent, greenlet

from lynx_compile.models.structure import block_lists


@dataclass(frozen=True)
class BlockCall:
    """A block that a call has come to: its module path, and what it is given."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Walk(greenlet):
    """A call of a module, suspended wherever it comes to a block, until it is told what the block returns.

    The call's own frames hold what it needs further on, whatever the module does between its blocks, and nothing
    else: many calls at the same block are as many sets of activations, and no block is run twice. A greenlet and no
    thread, since libraries keep memory and threads of their own for every thread.

    ``at``: the block that it has come to; None before ``start`` and after the end. ``result``: the call's own, at
    the end.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(call)
        self.at: BlockCall | None = None
        self.result: Any = None

    def start(self) -> None:
        """On to the first block."""
        self._switch()

    def go_on(self, output: Any) -> None:
        """On to the next block, with what this one returns."""
        self._switch(output)

    def _switch(self, *output: Any) -> None:
        self.at = None
        with torch.no_grad():
            value = self.switch(*output)
        if self.dead:
            self.result = value
        else:
            self.at = value

    def give_up(self) -> None:
        """End the call where it is; its frames are left as by an exception."""
        with torch.no_grad():  # which also puts gradients back to what they were, whatever the frames leave
            if not self.dead:
                self.throw()


def at(walk: Walk) -> BlockCall:
    """Where a walk is that has not ended."""
    assert walk.at is not None, "all calls are at one block"
    return walk.at


@contextmanager
def walks(module: torch.nn.Module, calls: Sequence[Callable[[], Any]]) -> Iterator[list[Walk]]:
    """A ``Walk`` for each of ``calls``, which run ``module``; those that have not ended are given up at the end."""
    made = [Walk(call) for call in calls]
    with stopping(module):
        try:
            yield made
        finally:
            for walk in made:
                walk.give_up()


@contextmanager
def stopping(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile a ``Walk`` stops at the module's blocks; any other caller's blocks run as ever."""
    with ExitStack() as stack:
        for path in block_paths(module):
            block = module.get_submodule(path)
            stack.enter_context(patch.object(block, "forward", _stop(path, block.forward)))
        yield


def block_paths(module: torch.nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks; of blocks within blocks the outer ones."""
    lists = block_lists(module)
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return tuple(
        f"{path}.{name}" for path in outer for name, _ in module.get_submodule(path).named_children()
    )


def _stop(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*args: Any, **kwargs: Any) -> Any:
        walk = getcurrent()
        if not isinstance(walk, Walk):
            return forward(*args, **kwargs)
        assert walk.parent is not None, "the one that switched to it"
        return walk.parent.switch(BlockCall(path, args, kwargs))

    return stop
