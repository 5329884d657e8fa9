# SPDX-License-Identifier: Apache-2.0
"""HiDream's mixture of experts: each token's experts are chosen by values, which a graph cannot be shaped by.

Every expert sees every token, and its output is weighted by the token's share of it, mostly 0. That costs experts /
experts per token times the work.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU


def every_expert(module: torch.nn.Module) -> None:
    """Replace the routing of each mixture in ``module``."""
    for mixture in module.modules():
        if isinstance(mixture, MOEFeedForwardSwiGLU):
            mixture.__dict__["moe_infer"] = partial(_infer, mixture)


def _infer(mixture: Any, x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Outputs [tokens, K]. ``experts``, ``shares``: [tokens * chosen per token], and [..., 1]."""
    chosen = experts.view(x.shape[0], -1)
    shares = shares.view(x.shape[0], -1)
    outputs = []
    for number, expert in enumerate(mixture.experts):
        share = torch.where(chosen == number, shares, 0.0).sum(-1, keepdim=True)
        outputs.append(expert(x) * share.to(x.dtype))
    return torch.stack(outputs).sum(0)
