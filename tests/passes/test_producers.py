# SPDX-License-Identifier: Apache-2.0
"""Norms of every kind in front of a linear become part of its node, exactly; what only resembles one does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional

from lynx_compile.models.structure import find_structure
from lynx_compile.ops.functions import NORM_OP
from lynx_compile.passes.export import DenseOnnx, export_module
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from tests.passes.exact import exact_plan, exact_weights

SIZE, BATCH = 64, 2
# {what the linear reads: (producer, rows of its gain)}
KINDS = {
    "layer": ("layer norm", 1), "affine": ("layer norm", 1), "modulated": ("layer norm", BATCH),
    "affine modulated": (None, 0), "rms": ("rms norm", 1), "rms weighted": ("rms norm", 1),
    "rms scaled": ("rms norm", BATCH), "rms modulated": ("rms norm", BATCH), "gated": ("gated", 0),
    "first axis": (None, 0), "shared": (None, 0), "of other rows": (None, 0), "for each token": ("rms norm", 8 * BATCH),
    "rms weighted in float32": ("rms norm", 1), "affine in float32": ("layer norm", 1),
    "modulated in float32": ("layer norm", BATCH),
}  # fmt: skip


def _rms(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + 1e-6)).to(x.dtype)


class Norms(torch.nn.Module):
    """One linear behind each kind of producer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(SIZE, SIZE) for _ in KINDS])])
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(SIZE)) for _ in range(2))

    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain = functional.layer_norm(x, (SIZE,), eps=1e-5)
        affine = functional.layer_norm(x + 1, (SIZE,), self.weight, self.bias, 1e-6)
        gain, shift = 1 + scale[:, None], shift[:, None]
        shared = _rms(x + 2)
        values = {
            "layer": plain,
            "affine": affine,
            "modulated": functional.layer_norm(x + 3, (SIZE,)) * gain + shift,
            "affine modulated": functional.layer_norm(x + 4, (SIZE,), self.weight, self.bias) * gain + shift,
            "rms": _rms(x + 5),
            "rms weighted": _rms(x + 6) * self.weight,
            "rms scaled": self.weight * _rms(x + 7) * gain,
            "rms modulated": _rms(x + 8) * self.weight * gain + shift,
            "gated": functional.silu(x) * (x + 9),
            "first axis": _rms(x + 10, dim=1),
            "shared": shared,
            "of other rows": _rms(x + 11) * self.weight + shift,
            "for each token": _rms(x + 12) * x,
            "rms weighted in float32": (_rms((x + 13).float()) * self.weight.float()).to(x.dtype),
            "affine in float32": functional.layer_norm(
                (x + 14).float(), (SIZE,), self.weight.float(), self.bias.float(), 1e-6
            ).to(x.dtype),
            "modulated in float32": (
                functional.layer_norm((x + 15).float(), (SIZE,), eps=1e-6) * (1 + scale[:, None].float())
                + shift.float()
            ).to(x.dtype),
        }
        (linears,) = self.blocks
        return (*(linear(values[kind]) for kind, linear in zip(KINDS, linears, strict=True)), shared)


def _rewritten(folder: Path, dtype: torch.dtype) -> SimpleNamespace:
    torch.manual_seed(0)
    module = Norms().eval().requires_grad_(False)
    inputs = {
        "x": torch.randn(BATCH, 8, SIZE),
        "scale": torch.randn(BATCH, SIZE),
        "shift": torch.randn(BATCH, SIZE),
    }
    plan = exact_plan(find_structure(module, inputs).groups)
    weights = exact_weights(module, plan, folder)
    halves: dict[str, Any] = {name: value.to(dtype) for name, value in inputs.items()}
    dense = export_module(module.to(dtype), halves, folder / "dense.onnx", dtype)
    lynx = rewrite(dense, plan, weights, folder / "lynx.onnx")
    return SimpleNamespace(
        dense=dense, lynx=lynx, feed={name: v.float().numpy() for name, v in inputs.items()}
    )


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return _rewritten(tmp_path_factory.mktemp("norms"), torch.float32)


def _producers(lynx: LynxOnnx) -> dict[str, str | None]:
    found = {node.linears[0]: node.producer for node in lynx.sparse}
    return {kind: found[f"blocks.0.{index}"] for index, kind in enumerate(KINDS)}


def _run(model: DenseOnnx | LynxOnnx, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def test_every_kind_is_fused_or_left(norms: SimpleNamespace) -> None:
    assert _producers(norms.lynx) == {kind: producer for kind, (producer, _) in KINDS.items()}


def test_the_rewritten_graph_is_exact(norms: SimpleNamespace) -> None:
    for kind, y, expected in zip(
        KINDS, _run(norms.lynx, norms.feed), _run(norms.dense, norms.feed), strict=False
    ):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-5, err_msg=kind)


def test_gain_and_shift_have_as_many_rows(norms: SimpleNamespace) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(norms.lynx.path))
    values = (*model.graph.value_info, *model.graph.input)
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node if node.op_type == NORM_OP}
    assert len(nodes) == sum(rows > 0 for _, rows in KINDS.values())
    for index, (kind, (_, rows)) in enumerate(KINDS.items()):
        if rows:
            node = nodes[f"blocks.0.{index}.LynxSparseLinear"]
            assert [int(np.prod(shapes[name])) // SIZE for name in node.input[-2:]] == [rows, rows], kind
            epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
            assert epsilon == pytest.approx(1e-5 if kind in ("layer", "modulated") else 1e-6)


def test_casts_to_float32_and_back_belong_to_a_norm(tmp_path: Path) -> None:
    """As half-precision models have them; what is multiplied in float32 comes in the op's own dtype."""
    lynx = _rewritten(tmp_path, torch.bfloat16).lynx
    assert _producers(lynx) == {kind: producer for kind, (producer, _) in KINDS.items()}
    model = onnx.shape_inference.infer_shapes(onnx.load(lynx.path))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.input)
    }
    read = {
        types[name]
        for node in model.graph.node
        if node.op_type == NORM_OP
        for name in node.input
        if name in types
    }
    assert read == {onnx.TensorProto.BFLOAT16}
