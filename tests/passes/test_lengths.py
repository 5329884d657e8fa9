# SPDX-License-Identifier: Apache-2.0
"""Lengths that no mask lets pad stay open from the recorded calls to the engine and the drop-in."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.nn import functional

import lynx_compile
from lynx_compile import recipe
from lynx_compile.engine.manifest import Length, Manifest
from lynx_compile.errors import InputError, StageError
from lynx_compile.models.calls import call_of
from lynx_compile.models.recording import Axis, Signature, _axes
from lynx_compile.models.structure import find_structure
from lynx_compile.passes.build import build
from lynx_compile.passes.export import DenseOnnx, export_lengths, export_module
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from tests.engine.conftest import set_stage
from tests.engine.fakes import FakeCuda
from tests.models.trace.exported import error
from tests.passes.exact import SIZE, exact_plan, exact_weights

AXES = (
    Axis("text", 0, 3, 9, "s0", None),
    Axis("counts", 3, 11, 17, "s0", None, offset=8),
)
LENGTHS = tuple(Length(tensor=a.tensor, axis=a.axis, smallest=a.smallest, largest=a.largest) for a in AXES)


class Joint(torch.nn.Module):
    """Text behind an image, with positions by their number, in one attention; what counts is told for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotary = torch.randn(64, SIZE)
        names = ("qkv", "out", "up", "down")
        sizes = ((SIZE, 3 * SIZE), (SIZE, SIZE), (SIZE, 2 * SIZE), (2 * SIZE, SIZE))
        linears = {name: torch.nn.Linear(*size) for name, size in zip(names, sizes, strict=True)}
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(linears)])

    def forward(self, image: torch.Tensor, text: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        block = self.blocks[0]
        positions = torch.arange(len(text), device=text.device)
        text = text + self.rotary.to(text.dtype)[positions] * (positions < 30).unsqueeze(-1)
        x = torch.cat([image, text.unsqueeze(0)], dim=1)
        parts = block["qkv"](functional.layer_norm(x, (SIZE,))).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        attention = functional.scaled_dot_product_attention(q, k, v, attn_mask=counts)
        x = x + block["out"](attention.transpose(1, 2).flatten(2))
        x = x + block["down"](functional.gelu(block["up"](x), approximate="tanh"))
        return x[:, : image.shape[1]]


class Choosing(torch.nn.Module):
    """Takes another way for long texts, or by what the text is."""

    def __init__(self, by_value: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(SIZE, SIZE)
        self.by_value = by_value

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        if self.by_value:
            return self.linear(text) if text.sum() > 0 else text
        return self.linear(text) if text.shape[0] > 5 else text


def call(length: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(length)
    counts = torch.zeros(1, 1, 1, 8 + length, dtype=dtype)
    counts[..., -1] = -2.0
    return {
        "image": torch.randn(1, 8, SIZE, dtype=dtype),
        "text": torch.randn(length, SIZE, dtype=dtype),
        "counts": counts,
    }


@pytest.fixture(scope="module")
def module() -> Joint:
    return Joint().eval()


@pytest.fixture(scope="module")
def dense(module: Joint, tmp_path_factory: pytest.TempPathFactory) -> DenseOnnx:
    return export_lengths(module, call(9), AXES, tmp_path_factory.mktemp("dense") / "dense.onnx")


def test_a_graph_for_every_length(module: Joint, dense: DenseOnnx) -> None:
    assert dense.lengths == LENGTHS
    for length in (3, 4, 9):
        assert error(dense, module, call(length)) < 1e-5
    shapes = {i.name: i.type.tensor_type.shape.dim for i in onnx.load(dense.path).graph.input}
    assert shapes["text"][0].dim_param
    assert shapes["counts"][3].dim_param
    assert shapes["image"][1].dim_value == 8


def test_its_linears_are_rewritten(module: Joint, dense: DenseOnnx, tmp_path: Path) -> None:
    plan = exact_plan(find_structure(module, call(9)).groups)
    lynx = rewrite(dense, plan, exact_weights(module, plan, tmp_path), tmp_path / "lynx.onnx")
    assert (len(lynx.sparse), lynx.dense, lynx.lengths) == (4, (), LENGTHS)
    assert lynx.sparse[0].producer == "layer norm", "its weights serve any number of tokens"
    assert error(DenseOnnx(lynx.path), module, call(4)) < 1e-4


@pytest.mark.slow
def test_an_engine_of_open_lengths(tmp_path: Path) -> None:
    module = Joint().to(torch.bfloat16)
    dense = export_lengths(module, call(9, torch.bfloat16), AXES, tmp_path / "dense.onnx")
    plan = exact_plan(find_structure(module, call(9, torch.bfloat16)).groups)
    lynx = rewrite(dense, plan, exact_weights(module, plan, tmp_path), tmp_path / "lynx.onnx")
    built = build(lynx, recipe.Engine(backend="tensorrt_rtx", gpus=("sm80",)), tmp_path / "small.engine")
    shapes = {tensor.name: tensor.shape for tensor in (*built.inputs, *built.outputs)}
    assert shapes.pop("output") == (1, 8, SIZE)
    assert shapes == {"image": (1, 8, SIZE), "text": (-1, SIZE), "counts": (1, 1, 1, -1)}
    assert built.plugin_layers == 4


def test_the_drop_in_takes_every_length(
    module: Joint, dense: DenseOnnx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / dense.path.name
    copy.write_bytes(dense.path.read_bytes())
    assert dense.data is not None
    (tmp_path / dense.data.name).write_bytes(dense.data.read_bytes())
    stage = set_stage(monkeypatch, LynxOnnx(copy, copy, (), (), (), dense.lengths), FakeCuda())
    assert dense.output is not None
    described = call_of("tests.passes:Joint", Joint.forward, call(9), dense.output)
    stage.change(call=described.model_dump())
    engine = lynx_compile.load(stage.path)
    for length in (9, 3, 4):
        torch.testing.assert_close(engine(**call(length)), module(**call(length)))
    with pytest.raises(InputError, match="'text' has 10 entries along axis 0, and the engine is for 3 to 9"):
        engine(**call(10))


def test_a_manifest_of_lengths(dense: DenseOnnx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / dense.path.name
    copy.write_bytes(dense.path.read_bytes())
    assert dense.data is not None
    (tmp_path / dense.data.name).write_bytes(dense.data.read_bytes())
    stage = set_stage(monkeypatch, LynxOnnx(copy, copy, (), (), (), dense.lengths), FakeCuda())
    assert Manifest.read(stage.manifest).lengths == LENGTHS
    stage.change(lengths=[{"tensor": "image", "axis": 1, "smallest": 3, "largest": 9}])
    with pytest.raises(InputError, match="'image' has no open axis 1"):
        Manifest.read(stage.manifest)


@pytest.mark.parametrize("by_value", [False, True])
def test_one_length_where_the_model_decides_on_it(
    by_value: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, text = Choosing(by_value).eval(), {"text": torch.rand(9, SIZE)}
    with pytest.raises(StageError):
        export_module(module, text, tmp_path / "dense.onnx", axes=AXES[:1])
    with caplog.at_level(logging.WARNING):
        dense = export_lengths(module, text, AXES[:1], tmp_path / "dense.onnx")
    assert "'text' has 9 entries along axis 0, and between 3 and 9 in the recorded calls" in caplog.text
    assert dense.lengths == ()
    assert error(dense, module, text) < 1e-5


def test_axes_that_differ_by_the_same_share_a_symbol() -> None:
    def signature(text: int, mask: int, other: int) -> Signature:
        shapes = {"text": (1, text, 4), "mask": (1, mask), "both": (1, other)}
        return Signature("transformer", {}, dict.fromkeys(shapes, "float32"), shapes)

    alone = _axes([signature(3, 3, 5), signature(9, 9, 5)])
    assert [(a.tensor, a.symbol, a.offset, a.mask) for a in alone] == [
        ("text", "s0", 0, "mask"),
        ("mask", "s0", 0, "mask"),
    ]
    behind = _axes([signature(9, 9, 17), signature(3, 3, 11)])
    assert [(a.tensor, a.symbol, a.offset, a.mask) for a in behind] == [
        ("text", "s0", 0, None),
        ("mask", "s0", 0, None),
        ("both", "s0", 8, None),
    ], "'both' cannot be padded, so that 'text' must not be"
    returned = [replace(signature(n, n, 5), results=((1, n, 4),)) for n in (9, 3)]
    assert [a.mask for a in _axes(returned)] == [None, None], "what it returns would come back padded"
    apart = _axes([signature(9, 9, 17), signature(3, 3, 12)])
    assert [(a.symbol, a.offset, a.mask) for a in apart[1:]] == [("s0", 0, "mask"), ("s1", 0, None)]
