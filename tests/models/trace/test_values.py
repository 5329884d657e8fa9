# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lynx_compile.errors import StageError
from tests.models.trace.exported import error, exported

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)


class Branch(Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x if mask.bool().all() else self.linear(x)


class Lengths(Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(dim=1).tolist()
        y = torch.zeros(2, max(lengths), 4)
        for i, length in enumerate(lengths):
            y[i, :length] = self.linear(x)[i, :length]
        return y[:, : lengths[0]] * mask[:, :3, None]


class Places(Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        rows, columns = torch.nonzero(mask, as_tuple=True)
        return (
            y[mask.bool()] + y[rows, columns] + torch.masked_select(y, mask.bool()[..., None]).reshape(-1, 4)
        )


class Repeats(Module):
    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.repeat_interleave(x, counts, dim=1)) + torch.arange(counts.sum())[:, None]


class Bounds(Module):
    def forward(self, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        height, width = size[0]
        return self.linear(x)[:, : height * width].view(2, height, width, 4)


@pytest.mark.parametrize(
    ("module", "given", "places"),
    [
        (Branch(), {"mask": MASK}, False),
        (Lengths(), {"mask": MASK}, False),
        (Places(), {"mask": MASK}, True),
        (Repeats(), {"counts": torch.tensor([2, 0, 1, 3, 1])}, True),
        (Bounds(), {"size": torch.tensor([[2, 2]])}, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_decisions_go_by_the_example_and_are_told(
    module: torch.nn.Module, given: Mapping[str, Any], places: bool, tmp_path: Path
) -> None:
    dense = exported(module, {"x": torch.randn(2, 5, 4), **given}, tmp_path)
    assert error(dense, module, {"x": torch.randn(2, 5, 4), **given}) < 1e-6
    first = inspect.getsourcelines(type(module).forward)[1]
    assert {b.arguments for b in dense.baked} == {tuple(given)}
    assert dense.baked[0].places is places
    file, line = dense.baked[0].where.split(":")
    assert file == Path(__file__).name and int(line) in range(first, first + 8)
    assert str(dense.baked[0]).startswith(f"'{next(iter(given))}': the ")


def test_what_is_not_decided_on_stays_an_input(tmp_path: Path) -> None:
    class Both(Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            table = torch.zeros(2, 5)
            table[mask.bool()] = 1.0  # one number goes by the mask, wherever it is
            return self.linear(x) * table[..., None] * (n if n.sum() else 1)

    module, n = Both(), torch.ones(1)
    dense = exported(module, {"x": torch.randn(2, 5, 4), "mask": MASK, "n": n}, tmp_path)
    assert error(dense, module, {"x": torch.randn(2, 5, 4), "mask": 1 - MASK, "n": 3 * n}) < 1e-6
    assert [b.arguments for b in dense.baked] == [("n",)]


def test_a_value_written_in_place_is_followed(tmp_path: Path) -> None:
    class Written(Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            lengths = torch.zeros(3, dtype=torch.int64)
            lengths[1:] += mask.sum(1)
            row = lengths[1:2]
            row.add_(1)
            return self.linear(x)[:, : int(lengths[1])]

    module = Written()
    dense = exported(module, {"x": torch.randn(2, 5, 4), "mask": MASK}, tmp_path)
    assert error(dense, module, {"x": torch.randn(2, 5, 4), "mask": MASK}) < 1e-6
    assert [b.arguments for b in dense.baked] == [("mask",)]


def test_weights_are_never_decided_on(tmp_path: Path) -> None:
    class Activations(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.linear(x).sum() > 0 else -x

    with pytest.raises(StageError, match="could not trace"):
        exported(Activations(), {"x": torch.randn(2, 5, 4)}, tmp_path)


def test_functions_of_weights_alone_are_folded(tmp_path: Path) -> None:
    class Orthogonal(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.linalg.qr(self.linear.weight + 1e-8)[0]

    module = Orthogonal()
    dense = exported(module, {"x": torch.randn(2, 5, 4)}, tmp_path)
    assert error(dense, module, {"x": torch.randn(2, 5, 4)}) < 1e-6
    assert not dense.baked


def test_frequencies_are_those_of_torch(tmp_path: Path) -> None:
    """A unit in the last place of one is an angle of 0.06 at a time of a million."""

    class Times(torch.nn.Module):
        def forward(self, times: torch.Tensor) -> torch.Tensor:
            frequencies = torch.exp(-9.21 * torch.arange(64, dtype=torch.float32) / 64)
            powers = 1.0 / 10000.0 ** (torch.arange(64) / 64)
            angles = times[:, None] * torch.stack((frequencies, powers))[:, None]
            return torch.cat((angles.sin(), angles.cos()), -1)

    dense = exported(Times(), {"times": torch.tensor([3.0, 1e6])}, tmp_path)
    assert error(dense, Times(), {"times": torch.tensor([9.9e5, 1e6])}) < 1e-6
