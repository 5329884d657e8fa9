# SPDX-License-Identifier: Apache-2.0
"""``x.copy_(y)`` with y broadcast first: the exporter puts y in the place of x as it is, with its own shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule


class BroadcastCopy(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is torch.Tensor.copy_:
            target, source, *rest = args
            return target.copy_(source.to(target.dtype).expand(target.shape), *rest)
        return function(*args, **kwargs)
