# SPDX-License-Identifier: Apache-2.0
"""Calls of one module as one call: what each was given, joined along the batch, and taken apart again.

A small model's call keeps a GPU busy for less time than it takes to launch it, so calls go through side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """What a module is given in one call, what it should return (``outputs_of`` that), and how much that counts.

    ``rows``: its batch. ``kind``: states of one kind have as many rows and may be joined: their tensors of ``rows`` in
    front belong to the call, all others are the same in both, or at least equal. None: it runs alone.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[torch.Tensor, ...]
    weight: float
    kind: Hashable = None
    rows: int = 1


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of what a module returns that tell its error."""
    return tuple(
        leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )


def batches(states: Sequence[State], samples: int) -> list[list[State]]:
    """The states by calls that they can be joined to, in their order within a kind: of so many ``samples`` each (the
    rows of their batches) or fewer, but of one state at least."""
    order = {state.kind: number for number, state in reversed(list(enumerate(states)))}
    ordered = sorted(states, key=lambda state: order[state.kind])
    found = []
    for kind, members in groupby(ordered, key=lambda state: state.kind):
        together = list(members)
        size = 1 if kind is None else max(samples // together[0].rows, 1)
        found += [together[start : start + size] for start in range(0, len(together), size)]
    return found


def joined(trees: Sequence[T], rows: int, device: torch.device | None = None) -> T:
    """One tree of tensors for many of the same ``rows``. All tensors are copies: a module may write into them."""
    columns, structure = [], None
    for tree in trees:
        leaves, structure = tree_flatten(tree)
        columns.append(leaves)
    assert structure is not None, "there is a tree"
    leaves = [_joined(column, rows, device) for column in zip(*columns, strict=True)]
    made: T = tree_unflatten(leaves, structure)
    return made


def parted(tree: T, calls: int, rows: int) -> list[T]:
    """What ``joined`` joined, or what a module made of it: views for each of the calls."""
    return [
        tree_map(
            lambda leaf, start=start: leaf[start : start + rows] if _has_rows(leaf, calls * rows) else leaf,
            tree,
        )
        for start in range(0, calls * rows, rows)
    ]


def _joined(column: Sequence[Any], rows: int, device: torch.device | None) -> Any:
    first = column[0]
    if not isinstance(first, torch.Tensor):
        return first
    if len(column) > 1 and _has_rows(first, rows):
        return torch.cat(list(column)).to(device)
    moved = first.to(device)
    return moved.clone() if moved is first else moved


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows
