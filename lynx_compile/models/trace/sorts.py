# SPDX-License-Identifier: Apache-2.0
"""Booleans are sorted as integers: ONNX's TopK takes none.

sort(mask)  ->  sort(mask.int()), its values as booleans again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule

_SORTS = (torch.sort, torch.Tensor.sort, torch.argsort, torch.Tensor.argsort)


class Sorts(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _SORTS:
            kwargs.pop("stable", None)
            if args[0].dtype == torch.bool:
                found = function(args[0].int(), *args[1:], **kwargs)
                is_pair = isinstance(found, tuple)
                return torch.return_types.sort((found[0].bool(), found[1])) if is_pair else found
        return function(*args, **kwargs)
