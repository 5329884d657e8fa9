# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import uses_external_data
from safetensors.torch import save_file

from lynx_compile.engine.arguments import unflatten
from lynx_compile.errors import InputError, StageError
from lynx_compile.files.float32 import float32_copy
from lynx_compile.files.tensors import read_external
from lynx_compile.models.checkpoint import open_module
from lynx_compile.ops.functions import LINEAR_KEY
from lynx_compile.passes.export import export_module
from tests.models.trace.exported import error


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, 8)
        self.down = torch.nn.Conv1d(8, 4, 1)
        self.wide = torch.nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.down(self.up(x).mT)).mT


class Nested(torch.nn.Module):
    """Arguments and results as diffusers nests them; the text goes through the same linear as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x: Any, rotary: Any = None, scale: float = 1.0, return_dict: bool = True) -> Any:
        image = self.blocks[0](x[0]) * rotary[0]["cos"] * scale
        text = self.blocks[1].up(x[1]) + self.blocks[1].up(x[0] + image)
        return {"sample": [image, None], "text": text} if return_dict else (image, text)


def _arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    x = [torch.randn(2, 5, 4, dtype=dtype), torch.randn(2, 1, 4, dtype=dtype)]
    return {"x": x, "rotary": ({"cos": torch.rand(5, 1)},), "scale": 0.5, "return_dict": True}


def test_any_arguments_and_results(tmp_path: Path) -> None:
    module = Nested()
    dense = export_module(module, _arguments(), tmp_path / "a" / "dense.onnx")
    assert error(dense, module, _arguments()) < 1e-6
    graph = onnx.load(dense.path).graph
    assert [i.name for i in graph.input] == ["x.0", "x.1", "rotary.0.cos"]
    assert [o.name for o in graph.output] == ["output.sample.0", "output.text"]
    assert unflatten(dense.output, {"output.sample.0": 1, "output.text": 2}) == {
        "sample": [1, None],
        "text": 2,
    }


def test_each_use_of_a_linear_is_marked(tmp_path: Path) -> None:
    dense = export_module(Nested(), _arguments(), tmp_path / "dense.onnx")
    marks = [
        (node.op_type, p.value)
        for node in onnx.load(dense.path).graph.node
        for p in node.metadata_props
        if p.key == LINEAR_KEY
    ]
    assert sorted(marks) == [
        ("Conv", "blocks.0.down"),
        ("MatMul", "blocks.0.up"),
        ("MatMul", "blocks.1.up"),
        ("MatMul", "blocks.1.up"),
    ]


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    module = Nested()
    dense = export_module(module, _arguments(torch.bfloat16), tmp_path / "dense.onnx", torch.float32)
    types = {i.type.tensor_type.elem_type for i in onnx.load(dense.path).graph.input}
    assert types == {onnx.TensorProto.FLOAT}
    assert error(dense, module, _arguments()) < 1e-6


def test_float64_becomes_float32(tmp_path: Path) -> None:
    module = Nested()
    dense = export_module(module, _arguments(torch.float64), tmp_path / "dense.onnx")
    types = {i.type.tensor_type.elem_type for i in onnx.load(dense.path).graph.input}
    assert types == {onnx.TensorProto.FLOAT}
    assert error(dense, module, _arguments()) < 1e-6


def test_a_failure_is_told_and_never_retried_strictly(tmp_path: Path) -> None:
    class Graphless(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(x)[0]

    with pytest.raises(StageError, match="ONNX has no form of the model"):
        export_module(Graphless(), {"x": torch.randn(3, 3)}, tmp_path / "dense.onnx")
    with pytest.raises(InputError, match="'cache' is a .*Cache"):
        export_module(Nested(), {"cache": type("SomeCache", (), {})()}, tmp_path / "dense.onnx")


class Looked(torch.nn.Module):
    """A table too large to be folded, read by int32 as Z-Image reads its rotary tables."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(2048, 8))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x + self.table[ids]


def test_int32_reads_a_table(tmp_path: Path) -> None:
    given = {"x": torch.randn(3, 8), "ids": torch.tensor([5, 2047, 0], dtype=torch.int32)}
    module = Looked()
    dense = export_module(module, given, tmp_path / "dense.onnx")
    session = onnxruntime.InferenceSession(dense.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    torch.testing.assert_close(torch.from_numpy(found), module(**given))


class Wide(torch.nn.Module):
    """Weights that are large enough to be external data; ``table`` is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 64)
        self.register_buffer("table", torch.arange(64.0).repeat(16, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x + self.table)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_are_referred_to_where_they_lie(tmp_path: Path, stored: torch.dtype) -> None:
    """In the dtype in which they are stored; in another they are copied."""
    save_file({k: v.to(stored) for k, v in Wide().state_dict().items()}, tmp_path / "wide.safetensors")
    checkpoint = open_module(f"{__name__}:Wide", {}, tmp_path / "wide.safetensors")
    module = checkpoint.load(torch.bfloat16)
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    path = tmp_path / "dense" / "dense.onnx"
    path.parent.mkdir()
    dense = export_module(module, {"x": x}, path, stored=checkpoint.tensors)
    graph = onnx.load(path, load_external_data=False).graph
    external = {t.name: t for t in graph.initializer if uses_external_data(t)}
    assert torch.equal(read_external(external["up.weight"], path.parent), module.up.weight)
    place = {entry.key: entry.value for entry in external["up.weight"].external_data}["location"]
    assert (path.parent / place == checkpoint.files[0]) == (stored == torch.bfloat16)
    copied = 0 if stored == torch.bfloat16 else 2 * 64 * 64
    assert dense.data is not None and dense.data.stat().st_size == copied + 2 * 16 * 64  # and the table
    session = onnxruntime.InferenceSession(float32_copy(path, tmp_path / "float32.onnx"))
    (found,) = session.run(None, {"x": x.float().numpy()})
    np.testing.assert_allclose(found, module.float()(x.float()).detach(), atol=1e-3)
