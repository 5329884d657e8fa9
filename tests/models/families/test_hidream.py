# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from safetensors.torch import save_file

from lynx_compile.models.checkpoint import open_module
from lynx_compile.models.dit import in_engine_dtypes
from tests.models.trace.exported import error, exported


def test_experts_are_chosen_by_the_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixture = MOEFeedForwardSwiGLU(16, 32, num_routed_experts=4, num_activated_experts=2).eval()
    torch.nn.init.normal_(mixture.gate.weight)
    dense = exported(mixture, {"x": torch.randn(1, 9, 16)}, tmp_path)
    assert error(dense, mixture, {"x": torch.randn(1, 9, 16)}) < 1e-6
    assert "moe_infer" not in vars(mixture) and not dense.baked


def test_the_inputs_dtypes_are_told_without_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixture = MOEFeedForwardSwiGLU(16, 32, num_routed_experts=4, num_activated_experts=2)
    save_file(mixture.state_dict(), tmp_path / "weights.safetensors")
    config = {"dim": 16, "hidden_dim": 32, "num_routed_experts": 4, "num_activated_experts": 2}
    name = f"{MOEFeedForwardSwiGLU.__module__}:MOEFeedForwardSwiGLU"
    checkpoint = open_module(name, config, tmp_path / "weights.safetensors")
    found = in_engine_dtypes(checkpoint, {"x": torch.randn(1, 9, 16)}, torch.bfloat16)
    assert found["x"].dtype == torch.bfloat16 and not caplog.records
