# SPDX-License-Identifier: Apache-2.0
"""``scatter_add`` without a reduction in the scatter, which TensorRT does not have.

places known, none twice:     x.scatter(d, i, x.gather(d, i) + y)
rows, wherever they come to:  x + one_hot(i) @ y
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule
from lynx_compile.models.trace.values import Values

_ADDS = (torch.scatter_add, torch.Tensor.scatter_add)
_ADDS_IN_PLACE = (torch.Tensor.scatter_add_,)


class ScatterAdd(Rule):
    """Asks ``values`` for the places."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _ADDS and (added := self._added(*args, **kwargs)) is not None:
            return added
        if function in _ADDS_IN_PLACE and (added := self._added(*args, **kwargs)) is not None:
            return args[0].copy_(added)
        return function(*args, **kwargs)

    def _added(
        self, input: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor
    ) -> torch.Tensor | None:
        """None where neither form serves."""
        dim %= input.dim()
        source = src[tuple(slice(size) for size in index.shape)]
        with self._values.held_back() as baked:
            places = self._values.decide(index)
        if places is not None and not (places.sort(dim).values.diff(dim=dim) == 0).any():
            self._values.baked.extend(b for b in baked if b not in self._values.baked)
            return input.scatter(dim, index, input.gather(dim, index) + source)
        if not _is_of_rows(index, dim) or _others(index, dim) != _others(input, dim):
            return None
        rows = index.movedim(dim, 0).flatten(1)[:, 0] if index.dim() > 1 else index
        chosen = (
            torch.arange(input.shape[dim], device=rows.device)[:, None] == rows
        )  # [rows of input, of source]
        added = source.movedim(dim, 0).reshape(rows.shape[0], -1)
        product = torch.matmul(chosen.to(source.dtype), added)
        return input + product.reshape(input.shape[dim], *_others(input, dim)).movedim(0, dim)


def _is_of_rows(index: torch.Tensor, dim: int) -> bool:
    """Whether an index is the same in every column, as ``expand`` makes it: the strides say so."""
    return all(
        n == 1 or d == dim or s == 0 for d, (n, s) in enumerate(zip(index.shape, index.stride(), strict=True))
    )


def _others(tensor: torch.Tensor, dim: int) -> list[int]:
    return [size for d, size in enumerate(tensor.shape) if d != dim]
