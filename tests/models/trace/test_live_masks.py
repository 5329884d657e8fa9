# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import torch

from tests.models.trace.exported import error, exported

M = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
N = torch.tensor([[1, 0, 1], [0, 0, 0]])


class ValidFirst(torch.nn.Module):
    """Text of two encoders, valid tokens first: HunyuanImage's order, and HunyuanVideo 1.5's with zeros."""

    def __init__(self, zeros: bool, counted: bool = False) -> None:
        super().__init__()
        self.linear, self.zeros, self.counted = torch.nn.Linear(4, 4), zeros, counted

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, n: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows, masks = [], []
        for a_i, b_i, m_i, n_i in zip(self.linear(a), b, m.bool(), n.bool(), strict=True):
            invalid = b_i[~n_i]
            rows.append(
                torch.cat(
                    [a_i[m_i], b_i[n_i], a_i[~m_i], torch.zeros_like(invalid) if self.zeros else invalid]
                )
            )
            masks.append(torch.cat([m_i[m_i], n_i[n_i], m_i[~m_i], n_i[~n_i]], dim=0))
            if self.counted:
                rows[-1] = rows[-1] * a_i[m_i].shape[0]
        return torch.stack(rows), torch.stack(masks).float()


def _inputs(m: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(2, 5, 4), "b": torch.randn(2, 3, 4), "m": m, "n": n}


def test_an_order_by_masks_keeps_them_inputs(tmp_path: Path) -> None:
    for zeros in (False, True):
        module = ValidFirst(zeros)
        dense = exported(module, _inputs(M, N), tmp_path / str(zeros))
        assert error(dense, module, _inputs(1 - M, N.flip(1))) < 1e-6
        assert not dense.baked


def test_a_selection_that_is_used_otherwise_is_told(tmp_path: Path) -> None:
    module = ValidFirst(False, counted=True)
    dense = exported(module, _inputs(M, N), tmp_path)
    assert error(dense, module, _inputs(M, N.flip(1))) < 1e-6
    assert {b.arguments for b in dense.baked} == {("m",)}


def test_a_change_where_a_mask_is_true_keeps_it_an_input(tmp_path: Path) -> None:
    class Dropped(torch.nn.Module):
        def forward(self, x: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y[drop] *= 0.0
            y[drop] += 1
            return y

    drop = torch.tensor([[True, False, False], [True, True, False]])
    dense = exported(Dropped(), {"x": torch.randn(2, 3, 4), "drop": drop}, tmp_path)
    assert error(dense, Dropped(), {"x": torch.randn(2, 3, 4), "drop": ~drop}) < 1e-6
    assert not dense.baked
