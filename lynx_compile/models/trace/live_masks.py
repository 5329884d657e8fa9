# SPDX-License-Identifier: Apache-2.0
"""Rows put in order by a mask, with the mask as an input: ``cat([a[m], b[n], a[~m], b[~n]])`` has one size for all.

before:  nonzero(m), nonzero(n), ... -> four gathers of unknown size -> concat
after:   key = rows of [a, b, a, b] in order, those not chosen last -> topk -> gather
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lynx_compile.models.trace.rule import Rule
from lynx_compile.models.trace.values import Baked, Values

_NOT = frozenset(["__invert__", "bitwise_not", "logical_not"])
_SCALED = {
    "mul": torch.mul,
    "__mul__": torch.mul,
    "__imul__": torch.mul,
    "mul_": torch.mul,
    "add": torch.add,
    "__add__": torch.add,
    "__iadd__": torch.add,
    "add_": torch.add,
}
_GETTERS = frozenset((torch.Tensor.dtype.__get__, torch.Tensor.device.__get__))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Selection:
    """``rows[mask]``. ``baked``: what follows for the graph if its size is used."""

    rows: torch.Tensor
    mask: torch.Tensor
    baked: tuple[Baked, ...]


class LiveMasks(Rule):
    """Lets ``values`` decide on a mask only where the selected rows are used for anything else than an order."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values
        self._selections = WeakTensorKeyDictionary()
        self._opposites = WeakTensorKeyDictionary()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", "")
        if name == "__getitem__" and _is_mask(args[1]) and args[1].shape == args[0].shape[: args[1].dim()]:
            return self._select(function, *args)
        if (
            name == "__setitem__"
            and self._is_selection(args[2])
            and self._selections[args[2]].mask is args[1]
        ):
            return self._write(*args)
        selected = [leaf for leaf in tree_leaves((args, kwargs)) if self._is_selection(leaf)]
        if selected and name in ("cat", "concat", "concatenate") and self._is_an_order(*args, **kwargs):
            return self._ordered(args[0])
        if selected and function not in _GETTERS:
            if name == "zeros_like" and len(args) == 1:
                return self._zeros(function, args[0], kwargs)
            if name in _SCALED and isinstance(args[1], int | float):
                return self._scaled(function, _SCALED[name], *args)
            for leaf in selected:
                self._values.baked.extend(
                    b for b in self._selections[leaf].baked if b not in self._values.baked
                )
        result = function(*args, **kwargs)
        if name in _NOT and isinstance(result, torch.Tensor):
            self._opposites[result] = args[0]
        return result

    def _select(self, function: Any, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with self._values.held_back() as baked:
            result: torch.Tensor = function(rows, mask)
        self._selections[result] = _Selection(rows, mask, tuple(baked))
        return result

    def _zeros(self, function: Any, selected: torch.Tensor, kwargs: Any) -> torch.Tensor:
        selection = self._selections[selected]
        result: torch.Tensor = function(selected, **kwargs)
        zeros = function(selection.rows, **kwargs)
        self._selections[result] = replace(selection, rows=zeros)
        return result

    def _scaled(self, function: Any, scaled: Any, selected: torch.Tensor, number: float) -> torch.Tensor:
        selection = self._selections[selected]
        result: torch.Tensor = function(selected, number)
        self._selections[result] = replace(selection, rows=scaled(selection.rows, number))
        return result

    def _write(self, target: torch.Tensor, mask: torch.Tensor, selected: torch.Tensor) -> None:
        rows = self._selections[selected].rows
        wide = mask.reshape(*mask.shape, *([1] * (target.dim() - mask.dim())))
        target.copy_(torch.where(wide, rows, target))

    def _is_selection(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf in self._selections

    def _is_an_order(self, parts: Sequence[torch.Tensor], dim: int = 0, **_: Any) -> bool:
        """Each selection is there with its opposite, so that there are as many rows as there were."""
        if dim != 0 or not all(self._is_selection(part) for part in parts):
            return False
        masks = [self._selections[part].mask for part in parts]
        if any(mask.dim() != 1 for mask in masks):
            return False
        while masks:
            mask = masks.pop()
            opposite = next((i for i, other in enumerate(masks) if self._are_opposite(mask, other)), None)
            if opposite is None:
                return False
            masks.pop(opposite)
        return True

    def _are_opposite(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return self._opposites.get(a) is b or self._opposites.get(b) is a

    def _ordered(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        selections = [self._selections[part] for part in parts]
        rows = torch.cat([s.rows for s in selections])
        chosen = torch.cat([s.mask for s in selections])
        place = torch.arange(chosen.shape[0], dtype=torch.float32, device=chosen.device)
        # Chosen rows have the keys 0, -1, -2, ...; every other comes behind them.
        key = torch.where(chosen, -place, -place - chosen.shape[0])
        return rows[torch.topk(key, chosen.shape[0] // 2).indices]


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.dim() > 0
