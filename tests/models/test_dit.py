# SPDX-License-Identifier: Apache-2.0
"""The dtypes that an engine's inputs have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from lynx_compile.models.checkpoint import open_module
from lynx_compile.models.dit import in_engine_dtypes


class Mixed(torch.nn.Module):
    """``time`` goes into a linear as it is; positions are cast on their way, alone or both together.

    The buffer has the dtype of the weights, or the product behind it would be of two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(8))
        self.out = torch.nn.Linear(8, 8)
        self.time_in = torch.nn.Linear(8, 8)
        self.x_in = torch.nn.Conv1d(8, 8, 1)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        angles: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
    ) -> torch.Tensor:
        y = self.out(self.x_in(x.mT).mT + self.shift) + self.time_in(time) + angles.cos().to(x.dtype)
        both = first.dtype == second.dtype == torch.float32
        return y + (0 if both else first.to(x.dtype) + second.to(x.dtype)) * (y.float() if both else y)


def test_inputs_stay_in_float32_where_the_module_casts_them(tmp_path: Path) -> None:
    """On the meta device, a product of two dtypes is none that a machine with weights could do."""
    save_file(Mixed().state_dict(), tmp_path / "weights.safetensors")
    checkpoint = open_module(f"{__name__}:Mixed", {}, tmp_path / "weights.safetensors")
    row = torch.randn(1, 8)
    arguments = {"x": torch.randn(1, 4, 8), "time": row, "angles": row, "first": row, "second": row}
    found = in_engine_dtypes(checkpoint, arguments, torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "x": torch.bfloat16,
        "time": torch.bfloat16,
        "angles": torch.float32,
        "first": torch.float32,
        "second": torch.bfloat16,  # what each may be alone, both may not
    }
    assert checkpoint.load(torch.bfloat16)(**found).dtype == torch.bfloat16


def test_an_engine_has_no_float64(tmp_path: Path) -> None:
    save_file(Mixed().state_dict(), tmp_path / "weights.safetensors")
    checkpoint = open_module(f"{__name__}:Mixed", {}, tmp_path / "weights.safetensors")
    row = torch.randn(1, 8, dtype=torch.float64)
    half = torch.randn(1, 4, 8, dtype=torch.float16)
    arguments = {"x": half, "time": row.half(), "angles": row, "first": row, "second": row.half()}
    found = in_engine_dtypes(checkpoint, arguments, torch.bfloat16)
    assert [tensor.dtype for tensor in found.values()] == [
        torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16,
    ]  # fmt: skip
