# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lynx_compile.errors import StageError
from tests.models.trace.exported import error, exported


class Rotary(torch.nn.Module):
    """Tables as an attribute and as a buffer, looked up and put together in the ways that diffusers has."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(6.0), torch.arange(1.0, 3.0))
        self.linear = torch.nn.Linear(8, 8)
        self.table = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("buffer", self.table.conj().resolve_conj())

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(self.linear(x).reshape(*x.shape[:-1], -1, 2))
        assert isinstance(z, torch.Tensor) and z.is_complex() and z.dtype == torch.complex64
        assert z.shape == (2, 5, 4) and len(z) == 2
        rows = torch.stack([self.table[i] for i in ids.unbind()])
        table = torch.cat([rows, self.buffer.to(x.device)[ids]], dim=-1).unsqueeze(0)
        return torch.view_as_real(z * table).flatten(-2).type_as(x)


class Arithmetic(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z, w = torch.complex(x, y), torch.polar(y, x)
        padded = torch.zeros_like(z)
        padded[:, 1:] = (z / w)[:, 1:]
        chosen = torch.where(x > 0, z * (1 + 2j), w.conj() * x)
        moved = z.to(torch.complex128).abs() * torch.exp(1j * x).angle()
        return padded.real, padded.imag, (chosen + x - 0.5 * w).sum(0).imag, moved


def test_rotary_embedding(tmp_path: Path) -> None:
    module, ids = Rotary(), torch.tensor([0, 3, 1, 2, 4])
    dense = exported(module, {"x": torch.randn(2, 5, 8), "ids": ids}, tmp_path)
    assert error(dense, module, {"x": torch.randn(2, 5, 8), "ids": ids.flip(0)}) < 1e-6
    assert dict(module.named_buffers())["buffer"].is_complex() and "buffer" not in vars(module)


def test_arithmetic(tmp_path: Path) -> None:
    module = Arithmetic()
    dense = exported(module, {"x": torch.randn(3, 4), "y": torch.rand(3, 4) + 1}, tmp_path)
    assert error(dense, module, {"x": torch.randn(3, 4), "y": torch.rand(3, 4) + 1}) < 1e-6


def test_what_no_rule_covers_is_named(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.complex(x, x).matmul(torch.complex(x, x)).real

    with pytest.raises(StageError, match="complex numbers in 'torch.Tensor.matmul'"):
        exported(Odd(), {"x": torch.ones(2, 2)}, tmp_path)
