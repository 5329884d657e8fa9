# SPDX-License-Identifier: Apache-2.0
"""``x.squeeze(dim)`` of a dimension that is not 1 is x: torch says so, and ONNX's Squeeze refuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule


class CheckedSqueeze(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in (torch.squeeze, torch.Tensor.squeeze):
            return _squeeze(*args, **kwargs)
        return function(*args, **kwargs)


def _squeeze(input: torch.Tensor, *dims: int | Sequence[int], dim: Any = None) -> torch.Tensor:
    """Squeeze the dimensions named, or all, where they are 1."""
    named = dims[0] if dims else dim
    if named is None:
        named = range(input.dim())
    wanted = {(d % input.dim()) if input.dim() else d for d in ([named] if isinstance(named, int) else named)}
    ones = tuple(d for d in sorted(wanted) if input.dim() and input.shape[d] == 1)
    return torch.squeeze(input, ones) if ones else input
