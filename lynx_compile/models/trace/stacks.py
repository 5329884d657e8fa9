# SPDX-License-Identifier: Apache-2.0
"""``vstack`` and ``hstack`` as ``cat``: the exporter writes them with sequences, which TensorRT lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule


class Stacks(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in (torch.vstack, torch.row_stack):
            return torch.cat([x if x.dim() > 1 else x.reshape(1, -1) for x in args[0]])
        if function is torch.hstack:
            parts = [x if x.dim() else x.reshape(1) for x in args[0]]
            return torch.cat(parts, min(1, parts[0].dim() - 1))
        return function(*args, **kwargs)
