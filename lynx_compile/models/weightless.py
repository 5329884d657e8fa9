# SPDX-License-Identifier: Apache-2.0
"""Run a module whose weights are on the meta device on real inputs: values that depend on no weight stay real.

So a module may look at its masks, lengths and positions (``if mask.all()``, ``lengths.tolist()``, ``x[mask]``), while
whatever has met a weight has a shape and no values, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lynx_compile.models.trace.flex_attention import dense_flex_attention

META = torch.device("meta")
INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)
# The meta device multiplies what no other does.
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.convolution.default,
}


class Weightless(TorchDispatchMode):
    """While this is open, tensors on the meta device and real ones may meet; the result is on the meta device.

    It also follows which tensors depend on the tokens of ``arguments``: all of their tensors that are more than a
    number or a row a sample (latents, text, but not timesteps, guidance and pooled text).
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self._storages: list[Any] = []  # kept, so that no address comes twice
        self._of_tokens: set[int] = set()
        self._unknown: set[int] = set()  # real memory that a value without weights has been written into
        for tensor in _tokens(arguments):
            self._mark(self._of_tokens, tensor)

    def __enter__(self) -> Self:
        self._patches = ExitStack()
        self._patches.enter_context(patch.object(torch, "autocast", _Autocast))
        self._patches.enter_context(patch.object(torch.amp, "autocast", _Autocast))
        self._patches.enter_context(dense_flex_attention())  # its own refuses the meta device
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def is_of_tokens(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._of_tokens

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        unknown = any(tensor.is_meta or _address(tensor) in self._unknown for tensor in tensors)
        given = args
        if unknown:
            if func in INDEXING:
                args = (args[0], self._positions(args[1]), *args[2:])
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(META), (args, kwargs))
        if func in PRODUCTS and len(dtypes := {tensor.dtype for tensor in tensors}) > 1:
            raise RuntimeError(
                f"{func} of tensors of different dtypes: {', '.join(sorted(map(str, dtypes)))}"
            )
        if unknown and kwargs.get("device") is not None:
            kwargs["device"] = META
        elif (
            kwargs.get("device") == META
        ):  # the device of something that has no values, for something that can
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        if any(self.is_of_tokens(tensor) for tensor in tensors):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self._mark(self._of_tokens, tensor)
            for tensor in _written(func, given):
                self._mark(self._of_tokens, tensor)
        if unknown:
            for tensor in _written(func, given):
                self._mark(self._unknown, tensor)
        return result

    def _positions(self, indices: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Masks whose values are there as the positions they select, whose number a tensor without values lacks."""
        found: list[torch.Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool and not index.is_meta
            if index is not None and is_mask and _address(index) not in self._unknown:
                found += index.nonzero().unbind(1)
            else:
                found.append(index)
        return found

    def _mark(self, addresses: set[int], tensor: torch.Tensor) -> None:
        self._storages.append(tensor.untyped_storage())
        addresses.add(_address(tensor))


class _Autocast(torch.autocast):
    """``torch.autocast``, which knows no meta device."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


def _tokens(arguments: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Tensors of more than one row a sample; two dimensions are [batch, channels], but in a list [tokens, channels]."""
    for value in arguments.values():
        rows = 3 if isinstance(value, torch.Tensor) and value.is_floating_point() else 2
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= rows:
                yield tensor


def _written(func: Any, args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """The arguments that an operator changes."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if (
            argument.alias_info is not None
            and argument.alias_info.is_write
            and isinstance(value, torch.Tensor)
        ):
            yield value


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
