# SPDX-License-Identifier: Apache-2.0
"""A transposed convolution whose patches do not overlap as a matrix product: TensorRT has none in bfloat16.

conv_transpose1d(x [n, c, t], w [c, d, k], stride=k)  ->  x [n, t, c] @ w [c, d k], as [n, d, t k]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lynx_compile.models.trace.rule import Rule

_CONVOLUTIONS = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


class ConvTranspose(Rule):
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _CONVOLUTIONS and (patches := _of_patches(*args, **kwargs)) is not None:
            return patches
        return function(*args, **kwargs)


def _of_patches(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> torch.Tensor | None:
    """``input``: [n, channels, pixels ...]. None where patches overlap, or something lies between them."""
    kernel = tuple(weight.shape[2:])
    plain = _each(padding, kernel) == _each(output_padding, kernel) == {0} and groups == 1
    if not plain or _sizes(stride, kernel) != kernel or _each(dilation, kernel) != {1}:
        return None
    if input.dim() != weight.dim():
        return None
    count, pixels, channels = input.shape[0], input.shape[2:], weight.shape[1]
    rows = torch.matmul(input.movedim(1, -1), weight.flatten(1))  # [n, pixels ..., channels kernel ...]
    split = rows.reshape(count, *pixels, channels, *kernel)
    first = 1 + len(kernel)  # the channels' dimension
    order = [
        dim for i in range(len(kernel)) for dim in (1 + i, first + 1 + i)
    ]  # a pixel's, then that within it
    result = split.permute(0, first, *order).reshape(
        count, channels, *(p * k for p, k in zip(pixels, kernel, strict=True))
    )
    return result if bias is None else result + bias.reshape(-1, *[1] * len(kernel))


def _sizes(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """One number for every dimension, or a number each."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * len(kernel) if len(given) == 1 else given


def _each(value: Any, kernel: tuple[int, ...]) -> set[int]:
    return set(_sizes(value, kernel))
