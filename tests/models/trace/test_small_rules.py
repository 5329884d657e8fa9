# SPDX-License-Identifier: Apache-2.0
"""Rules of a few lines each."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests.models.trace.exported import error, exported


class Squeezes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1) + torch.squeeze(x[None], dim=(0, 2)) + x[:, None, None].squeeze().squeeze(-2)


class Fills(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        a = mask.masked_fill(mask.flip(0), True).masked_fill(mask.flip(1), False)
        b = mask.clone()
        b.masked_fill_(mask.roll(1, 1), True)
        return x * a + 2 * x * torch.where(a, b, ~mask)


class Sorts(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, indices = (x > 0).sort(dim=-1, descending=True, stable=True)
        return x.gather(-1, indices) * values + (x < 0.5).argsort(dim=-1, stable=True)


class WrittenData(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(1, 6, 4)
        table.data[:, 1:].copy_(x)
        return table * 2


class BroadcastCopy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(1, 3, 4)
        table[:, :].copy_(x)
        return table.transpose(0, 1)


class MaskedRows(torch.nn.Module):
    """Queries 2 and 3 may see nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask[None, None])


class NoKeys(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = x[:, :, 4:]
        return x + torch.nn.functional.scaled_dot_product_attention(x, few, value=few)


class FlexAttention(torch.nn.Module):
    """Causal, in frames of two tokens; the last two see nothing, and are seen by nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = torch.arange(8, device=x.device) // 2

        def allowed(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (frames[query] >= frames[key]) & ((query < 6) & (key < 6))

        mask = create_block_mask(allowed, None, None, 8, 8, device=x.device)
        return torch.nn.attention.flex_attention.flex_attention(x, x, x, block_mask=mask, scale=0.5)


class Branches(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (3.0 if torch.onnx.is_in_onnx_export() else 2.0)


class Epsilons(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / ((x * 0) + 1e-15) + (x - 1e-9) * 1e9


class Table(torch.nn.Module):
    """Made at the first call, and kept."""

    table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(4.0, device=x.device)
        return x * self.table


class Frequencies:
    """No module, as some classes of rotary tables are none."""

    def __init__(self) -> None:
        self.table: torch.Tensor | None = None
        self.by_length: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(4.0, device=x.device)
        if len(x) not in self.by_length:
            self.by_length[len(x)] = torch.arange(float(len(x)))[:, None]
        return self.table + self.by_length[len(x)]


@functools.lru_cache
def remembered(length: int) -> torch.Tensor:
    return torch.polar(torch.ones(length), torch.arange(float(length)))


class HeldTables(torch.nn.Module):
    """Tables made at the first call, in an object and in a function's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = [Frequencies()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frequencies[0](x) + (x * remembered(4)).real


class ManyDimensions(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x.reshape(1, 2, 3, 4, 5, 1, 1, 2, 2, 3).permute(0, 2, 4, 1, 3, 5, 6, -3, 8, 9)
        return patches.flatten(0, 3).flatten(2)


class Stacks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.vstack((x, x[0], x.new_zeros(0, 4)))
        return torch.hstack((rows, rows * 2)) * torch.hstack((x[0], x[1]))


class NarrowIntegers(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x > 0).to(torch.int16) * 3 + (x > 1).char()
        return x * (mask - torch.ones(4, dtype=torch.int8))


class Unpatches(torch.nn.Module):
    """Transposed convolutions without overlap, and one with it, which stays."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.ConvTranspose1d(3, 4, 2, stride=2)
        self.three = torch.nn.ConvTranspose3d(1, 2, (1, 2, 3), stride=(1, 2, 3), bias=False)
        self.overlapping = torch.nn.ConvTranspose1d(3, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.one(x), self.three(x[:, None, None]), self.overlapping(x)


class ScatterAdds(torch.nn.Module):
    """At places of an input, none twice; of another, one twice; at places that follow from weights, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, places: torch.Tensor, twice: torch.Tensor) -> torch.Tensor:
        y = x.scatter_add(0, places[:, None].expand(-1, 4), x[1:3])
        y = y.scatter_add(0, twice[:, None].expand(-1, 4), x[1:3])
        chosen = self.gate(x).argsort(-1)[:, :2].clamp(max=2).flatten()  # six of three rows
        y = torch.scatter_add(y, 0, chosen[:, None].expand(-1, 4), x.repeat(2, 1))
        counts = torch.zeros(3, dtype=x.dtype)
        counts.scatter_add_(0, chosen, x.flatten()[:6])
        return y * counts[:, None]


class Constants(torch.nn.Module):
    """A table of zeros that is too large to be folded, with a row of the input in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = x.new_zeros(700, 4)
        table[[3, 5]] = x[:2]
        return table


MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Squeezes(), (3, 4)),
        (Sorts(), (3, 4)),
        (WrittenData(), (1, 5, 4)),
        (BroadcastCopy(), (3, 4)),
        (MaskedRows(), (1, 2, 4, 4)),
        (NoKeys(), (1, 2, 4, 4)),
        (FlexAttention(), (1, 2, 8, 16)),
        (Branches(), (3, 4)),
        (Epsilons(), (3, 4)),
        (ManyDimensions(), (120, 12)),
        (Stacks(), (3, 4)),
        (NarrowIntegers(), (3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exported_equals_eager(module: torch.nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    dense = exported(module, {"x": torch.randn(shape)}, tmp_path)
    assert error(dense, module, {"x": torch.randn(shape)}) < 1e-6


def test_an_engine_can_hold_the_graph(tmp_path: Path) -> None:
    """No more than 8 dimensions, no sequences, no integers of 16 bits."""
    wide = exported(ManyDimensions(), {"x": torch.randn(120, 12)}, tmp_path / "wide")
    shapes = onnx.shape_inference.infer_shapes(onnx.load(wide.path)).graph.value_info
    assert max(len(info.type.tensor_type.shape.dim) for info in shapes) <= 8
    stacked = exported(Stacks(), {"x": torch.randn(3, 4)}, tmp_path / "stacked")
    assert not [n for n in onnx.load(stacked.path).graph.node if n.op_type.startswith("Sequence")]
    narrow = exported(NarrowIntegers(), {"x": torch.randn(3, 4)}, tmp_path / "narrow")
    types = {info.type.tensor_type.elem_type for info in onnx.load(narrow.path).graph.value_info}
    assert not types & {onnx.TensorProto.INT16, onnx.TensorProto.INT8}


def test_choices_between_booleans(tmp_path: Path) -> None:
    dense = exported(Fills(), {"x": torch.randn(3, 4), "mask": MASK}, tmp_path)
    assert error(dense, Fills(), {"x": torch.randn(3, 4), "mask": ~MASK}) < 1e-6


def test_a_traced_table_does_not_stay(tmp_path: Path) -> None:
    module = Table()
    dense = exported(module, {"x": torch.randn(3, 4)}, tmp_path)
    assert module.table is None
    assert error(dense, module, {"x": torch.randn(3, 4)}) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_patches_are_put_together_by_a_product(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Unpatches().to(dtype)
    dense = exported(module, {"x": torch.randn(2, 3, 5, dtype=dtype)}, tmp_path)
    nodes = [node.op_type for node in onnx.load(dense.path).graph.node]
    assert nodes.count("ConvTranspose") == 1
    if dtype == torch.float32:
        assert error(dense, module, {"x": torch.randn(2, 3, 5)}) < 1e-6


def test_a_scatter_reduces_nothing(tmp_path: Path) -> None:
    module = ScatterAdds()
    given = {"x": torch.randn(3, 4), "places": torch.tensor([2, 0]), "twice": torch.tensor([1, 1])}
    dense = exported(module, given, tmp_path)
    scatters = [node for node in onnx.load(dense.path).graph.node if node.op_type.startswith("Scatter")]
    assert all(not node.attribute or b"add" not in {a.s for a in node.attribute} for node in scatters)
    assert [(baked.arguments, baked.where) for baked in dense.baked] == [
        (("places",), f"test_small_rules.py:{ScatterAdds.forward.__code__.co_firstlineno + 1}")
    ]
    other = {"x": torch.randn(3, 4), "places": torch.tensor([1, 2]), "twice": torch.tensor([2, 0])}
    assert error(dense, module, other) < 1e-6


def test_tables_that_are_held_elsewhere_do_not_stay_either(tmp_path: Path) -> None:
    module = HeldTables()
    for length in (3, 3, 2):  # the second trace would meet what the first one left
        dense = exported(module, {"x": torch.randn(length, 4)}, tmp_path)
    assert module.frequencies[0].table is None and module.frequencies[0].by_length == {}
    assert error(dense, module, {"x": torch.randn(2, 4)}) < 1e-6


def test_constants_of_a_shape_in_bfloat16_pass_the_check(tmp_path: Path) -> None:
    dense = exported(Constants(), {"x": torch.randn(3, 4, dtype=torch.bfloat16)}, tmp_path)
    assert "ConstantOfShape" in {node.op_type for node in onnx.load(dense.path).graph.node}


def test_einsum_in_bfloat16_is_valid_onnx(tmp_path: Path) -> None:
    class Sums(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (
                torch.einsum("bnij -> jbni", a),
                torch.einsum("bnij,bhnkj->bhnki", a, b),
                torch.einsum("bnij,bhnkj->hbn", [a, b]),
                torch.einsum("i,j->ji", a[0, 0, :, 0], b[0, 0, 0, 0]),
                torch.einsum("...i, ...j -> ...ij", a[0, :, 0], b[0, 0, :, 0]),
                torch.einsum("...n,d->...nd", a[..., 0], torch.arange(3.0, dtype=torch.float64)).to(a.dtype),
            )

    def given(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"a": torch.randn(2, 3, 4, 5, dtype=dtype), "b": torch.randn(2, 2, 3, 6, 5, dtype=dtype)}

    half = exported(Sums(), given(torch.bfloat16), tmp_path / "bf16")
    onnx.checker.check_model(half.path, full_check=True)  # it knows which dtypes an op has
    dense = exported(Sums(), given(torch.float32), tmp_path / "fp32")
    assert error(dense, Sums(), given(torch.float32)) < 1e-6
