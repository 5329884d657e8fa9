# SPDX-License-Identifier: Apache-2.0
"""``x.copy_(y)`` with y broadcast first: the exporter puts y in the place of x as it is, with its own shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class BroadcastCopy(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.copy_:
            target, source, *rest = args
            return target.copy_(source.to(target.dtype).expand(target.shape), *rest)
        return function(*args, **(kwargs or {}))
