# SPDX-License-Identifier: Apache-2.0
"""Calls joined to one give what each gives alone."""

from __future__ import annotations

from typing import Any

import torch

from lynx_compile.solve.stacking import State, batches, joined, outputs_of, parted


def _tree(number: int, positions: torch.Tensor) -> tuple[Any, ...]:
    return (
        torch.full((2, 3), float(number)),
        {"ids": positions, "scale": 2.0, "time": torch.full((2,), number)},
    )


def test_what_is_joined_comes_apart_again() -> None:
    positions = torch.arange(5)
    trees = [_tree(number, positions) for number in range(3)]
    x, named = one = joined(trees, rows=2)
    assert x.shape == (6, 3) and named["time"].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(named["ids"], positions) and named["scale"] == 2.0
    for made, tree in zip(parted(one, 3, rows=2), trees, strict=True):
        assert torch.equal(made[0], tree[0]) and torch.equal(made[1]["time"], tree[1]["time"])
        assert torch.equal(made[1]["ids"], positions)


def test_a_module_may_write_into_what_is_joined() -> None:
    positions = torch.arange(5)
    for count in (1, 2):
        trees = [_tree(1, positions) for _ in range(count)]
        x, named = joined(trees, rows=2)
        x += 1
        named["ids"] += 1
        assert all(tree[0].eq(1).all() for tree in trees) and positions.tolist() == [0, 1, 2, 3, 4]


def test_batches_are_of_one_kind() -> None:
    states = [State((number,), {}, (), 1.0, kind) for number, kind in enumerate("abacab")]
    numbers = [[state.args[0] for state in batch] for batch in batches(states, 2)]
    assert numbers == [[0, 2], [4], [1, 5], [3]]
    alone = [State((number,), {}, (), 1.0, None) for number in range(3)]
    assert [len(batch) for batch in batches(alone, 2)] == [1, 1, 1]


def test_the_tensors_that_tell_an_error() -> None:
    x, y = torch.ones(1), torch.ones(2)
    assert outputs_of((x, {"also": y, "count": 3, "ids": torch.ones(2, dtype=torch.int64)})) == (x, y)
