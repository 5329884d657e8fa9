# SPDX-License-Identifier: Apache-2.0
"""Integers of 8 and 16 bits as those of 32, which hold all their values: engines compute with no others.

mask.to(torch.int16)  ->  mask.to(torch.int32)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule

_CASTS = (torch.Tensor.short, torch.Tensor.char)


class NarrowIntegers(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {name: _wide(value) for name, value in kwargs.items()}
        if function in _CASTS:
            return args[0].int()
        return function(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, torch.dtype) and value in (torch.int8, torch.int16)
    return torch.int32 if is_narrow else value
