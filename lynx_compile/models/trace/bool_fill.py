# SPDX-License-Identifier: Apache-2.0
"""Choices between booleans as logic: ``masked_fill`` and ``where`` become Where, which ONNX Runtime lacks for bool.

x.masked_fill(mask, True)   ->  x | mask
x.masked_fill(mask, False)  ->  x & ~mask
where(mask, a, b)           ->  (mask & a) | (~mask & b)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule


class BoolFill(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in (torch.masked_fill, torch.Tensor.masked_fill) and _is_bool(args[0]):
            return _filled(*args, **kwargs)
        if function is torch.Tensor.masked_fill_ and _is_bool(args[0]):
            return args[0].copy_(_filled(*args, **kwargs))
        if function in (torch.where, torch.Tensor.where) and len(args) == 3 and _is_bool(args[1]):
            mask, a, b = args if function is torch.where else (args[1], args[0], args[2])
            if _is_bool(a) and _is_bool(b):
                return (mask & a) | (~mask & b)
        return function(*args, **kwargs)


def _is_bool(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _filled(input: torch.Tensor, mask: torch.Tensor, value: bool | float | torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return (mask & value.bool()) | (~mask & input)
    return input | mask if value else input & ~mask
