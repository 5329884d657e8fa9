# SPDX-License-Identifier: Apache-2.0
"""What the solves of both operands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lynx_compile.errors import StageError

T = TypeVar("T")


def moved(holder: T, device: str | torch.device) -> T:
    """A dataclass with its tensors on another device."""
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(holder).items() if isinstance(value, torch.Tensor)
    }
    return replace(holder, **tensors)  # type: ignore[type-var]


def cholesky(matrix: torch.Tensor, ridge: float, name: str) -> torch.Tensor:
    """Lower factor of ``matrix`` with ``ridge`` times its mean diagonal added; more where rounding needs it.

    Raises:
        StageError: no ridge makes it positive definite; ``name`` says whose moments they are.
    """
    mean = matrix.diagonal().mean().clamp_min(1e-12)
    symmetric = (matrix + matrix.T).div_(2)
    diagonal = symmetric.diagonal().clone()
    for attempt in range(4):
        symmetric.diagonal().copy_(diagonal + mean * ridge * 10**attempt)  # no second matrix of gigabytes
        factor, info = torch.linalg.cholesky_ex(symmetric)
        if info == 0:
            return factor
    raise not_factorised(name)


def not_factorised(name: str) -> StageError:
    return StageError(
        "compensate",
        f"the moments of '{name}' cannot be factorised.",
        "Calibrate on more tokens, or raise sparsity.ridge.",
    )


@contextmanager
def tensor_cores() -> Iterator[None]:
    """float32 products by a GPU's tensor cores (TF32) meanwhile: 11 bits of each factor count, sums stay float32."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
