# SPDX-License-Identifier: Apache-2.0
"""Integers of 8 and 16 bits as those of 32, which hold all their values: engines compute with no others.

mask.to(torch.int16)  ->  mask.to(torch.int32)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CASTS = (torch.Tensor.short, torch.Tensor.char)


class NarrowIntegers(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        if function in _CASTS:
            return args[0].int()
        return function(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, torch.dtype) and value in (torch.int8, torch.int16)
    return torch.int32 if is_narrow else value
