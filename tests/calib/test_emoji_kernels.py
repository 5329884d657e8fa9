# SPDX-License-Identifier: Apache-2.0
"""calib.emoji_flux.kernels tells what kernels add, at the output and linear by linear."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from calib.emoji_flux import kernels
from lynx_compile.ops.fp8 import pack_dense, round_rows
from lynx_compile.torch_ops.modules import Fp8Linear

CHANNELS = 12


class Model(nn.Module):
    """A velocity of one linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear: nn.Module = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden_states: torch.Tensor, return_dict: bool, **_: Any) -> tuple[torch.Tensor]:
        return (self.linear(hidden_states),)


def compile_linear(model: Model, _: Path) -> None:
    rounded = round_rows(model.linear.weight.detach())
    model.linear = Fp8Linear(
        pack_dense(rounded.values),
        None,
        rounded.scale,
        model.linear.bias.detach(),
        in_features=CHANNELS,
        operand="dense",
    )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    prompt = {name: torch.zeros(2, 3) for name in ("encoder_hidden_states", "pooled_projections")}
    monkeypatch.setattr(kernels.sampler, "opened", lambda *_: (model, prompt))
    monkeypatch.setattr(kernels.Outputs, "find", lambda _: SimpleNamespace(manifest=None))
    monkeypatch.setattr(kernels.Manifest, "read", lambda _: SimpleNamespace(dtype="bf16"))
    monkeypatch.setattr(kernels, "apply", compile_linear)
    return model


@pytest.mark.usefixtures("model")
def test_kernels_that_are_their_definitions_add_nothing() -> None:
    outputs, linears = kernels.compared(Path("model"), Path("engine"), 2)
    assert outputs["kernels"] == outputs["definitions"]
    assert all(0.005 < error < 0.05 for error in outputs["kernels"]), "what FP8 itself loses"
    assert list(linears) == ["linear, K 12"]
    assert len(linears["linear, K 12"]) == len(kernels.STEPS)
    assert all(error < 1e-6 and abs(less) < 1e-6 for error, less in linears["linear, K 12"])


@pytest.mark.usefixtures("model")
def test_what_a_kernel_loses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Fp8Linear.rows
    monkeypatch.setattr(Fp8Linear, "rows", lambda linear, x: 0.75 * exact(linear, x))
    outputs, linears = kernels.compared(Path("model"), Path("engine"), 2)
    assert all(0.2 < error < 0.3 for error in outputs["kernels"])
    assert all(error < 0.05 for error in outputs["definitions"])
    for error, less in linears["linear, K 12"]:
        assert error == pytest.approx(0.25, abs=0.01) and less == pytest.approx(0.25, abs=0.01)
