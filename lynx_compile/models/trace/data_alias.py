# SPDX-License-Identifier: Apache-2.0
"""``x.data`` is x: a trace has no gradients to hide from, and loses what is written through ``data``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class DataAlias(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if function == _DATA else function(*args, **kwargs)
