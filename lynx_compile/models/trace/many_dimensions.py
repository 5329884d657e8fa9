# SPDX-License-Identifier: Apache-2.0
"""``permute`` of more dimensions than TensorRT has, with those in one that stay together.

x [a, b, c, ..., i, j].permute(0, 2, 1, 3, ..., 9)  ->  x [a, b, c, (d ... j)].permute(0, 2, 1, 3), as before

The views around it become one with the module's own when the graph is simplified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule

MOST = 8


class ManyDimensions(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in (torch.permute, torch.Tensor.permute):
            return _permuted(*args, **kwargs)
        return function(*args, **kwargs)


def _permuted(input: torch.Tensor, *dims: Any, **named: Any) -> torch.Tensor:
    order = named.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    order = [dim % input.dim() for dim in order]
    if len(order) <= MOST:
        return input.permute(order)
    groups: list[list[int]] = []  # of the result, each of dimensions that follow one another
    for dim in order:
        if groups and dim == groups[-1][-1] + 1:
            groups[-1].append(dim)
        else:
            groups.append([dim])
    before = sorted(groups)
    merged = input.reshape([math.prod(input.shape[dim] for dim in group) for group in before])
    permuted = merged.permute([before.index(group) for group in groups])
    return permuted.reshape([input.shape[dim] for dim in order])
