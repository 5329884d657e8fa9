# SPDX-License-Identifier: Apache-2.0
"""How the example inputs of a tiny model are drawn: the vocabulary of the tables of configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["first", "second", "masked"]  # other values than the first; the first's with another mask


@dataclass(frozen=True)
class Tiny:
    """A small configuration of a class of diffusers, and what its ``forward`` takes.

    ``inputs``: by parameter; nested, of draws, tensors (the same in every example) and constants.
    """

    class_name: str
    config: dict[str, Any]
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Normal:
    """A float32 tensor of normal numbers."""

    shape: tuple[int, ...]

    def draw(self, kind: Kind, random: torch.Generator) -> torch.Tensor:
        return torch.randn(self.shape, generator=random)


@dataclass(frozen=True)
class Times:
    """Timesteps within ``most``, one for all (as a denoising step has it)."""

    shape: tuple[int, ...] = (1,)
    most: float = 1.0
    dtype: torch.dtype = torch.float32

    def draw(self, kind: Kind, random: torch.Generator) -> torch.Tensor:
        return (torch.rand((), generator=random) * self.most).to(self.dtype).expand(self.shape).clone()


@dataclass(frozen=True)
class Integers:
    """int64 numbers below ``high``."""

    shape: tuple[int, ...]
    high: int

    def draw(self, kind: Kind, random: torch.Generator) -> torch.Tensor:
        return torch.randint(self.high, self.shape, generator=random)


@dataclass(frozen=True)
class Mask:
    """Ones for the tokens that count, which come first: three quarters, or half of them when ``masked``."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bool

    def draw(self, kind: Kind, random: torch.Generator) -> torch.Tensor:
        length = self.shape[-1]
        count = length // 2 if kind == "masked" else length - length // 4
        return (torch.arange(length) < count).expand(self.shape).to(self.dtype)


@dataclass(frozen=True)
class Same:
    """A tensor that is part of the shape of the problem: positions, sizes. Integers unless said otherwise."""

    values: Any
    dtype: torch.dtype | None = None

    def draw(self, kind: Kind, random: torch.Generator) -> torch.Tensor:
        return torch.as_tensor(self.values, dtype=self.dtype).clone()


@dataclass(frozen=True)
class Fresh:
    """An object that a call changes, such as a cache: made anew for every example."""

    make: Callable[[], Any]

    def draw(self, kind: Kind, random: torch.Generator) -> Any:
        return self.make()


Draw = Normal | Times | Integers | Mask | Same | Fresh


def drawn(inputs: Any, kind: Kind, seed: int = 0) -> Any:
    """The nested inputs with every draw replaced by its tensor. ``masked`` differs from ``first`` in masks alone."""
    random = torch.Generator().manual_seed(seed + (kind == "second"))
    return _drawn(inputs, kind, random)


def has_mask(inputs: Any) -> bool:
    """Whether a draw is a mask."""
    if isinstance(inputs, Mapping):
        return any(has_mask(value) for value in inputs.values())
    if isinstance(inputs, list | tuple):
        return any(has_mask(value) for value in inputs)
    return isinstance(inputs, Mask)


def grid(*sizes: int) -> torch.Tensor:
    """Positions [tokens, axes] of a grid, row by row, as int64."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes))


def _drawn(inputs: Any, kind: Kind, random: torch.Generator) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _drawn(value, kind, random) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(_drawn(value, kind, random) for value in inputs)
    return inputs.draw(kind, random) if isinstance(inputs, Draw) else inputs
