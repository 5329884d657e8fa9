# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

from tests.models.trace.exported import error, exported


def test_experts_are_chosen_by_the_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixture = MOEFeedForwardSwiGLU(16, 32, num_routed_experts=4, num_activated_experts=2).eval()
    torch.nn.init.normal_(mixture.gate.weight)
    dense = exported(mixture, {"x": torch.randn(1, 9, 16)}, tmp_path)
    assert error(dense, mixture, {"x": torch.randn(1, 9, 16)}) < 1e-6
    assert "moe_infer" not in vars(mixture) and not dense.baked
