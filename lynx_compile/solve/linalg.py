# SPDX-License-Identifier: Apache-2.0
"""What the solves of both operands share."""

from __future__ import annotations

import torch

from lynx_compile.errors import StageError


def cholesky(matrix: torch.Tensor, ridge: float, name: str) -> torch.Tensor:
    """Lower factor of ``matrix`` with ``ridge`` times its mean diagonal added; more where rounding needs it.

    Raises:
        StageError: no ridge makes it positive definite; ``name`` says whose moments they are.
    """
    diagonal = matrix.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(matrix), device=matrix.device)
    symmetric = (matrix + matrix.T) / 2
    for attempt in range(4):
        factor, info = torch.linalg.cholesky_ex(symmetric + identity * (diagonal * ridge * 10**attempt))
        if info == 0:
            return factor
    raise StageError(
        "compensate",
        f"the moments of '{name}' cannot be factorised.",
        "Calibrate on more tokens, or raise sparsity.ridge.",
    )
