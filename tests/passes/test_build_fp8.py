# SPDX-License-Identifier: Apache-2.0
"""Engines of FP8 nodes: TensorRT takes the int32 words, all plugins of the family and every input that they bind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lynx_compile import recipe
from lynx_compile.models.structure import find_structure
from lynx_compile.passes.build import build
from lynx_compile.passes.export import export_module
from lynx_compile.passes.rewrite import LynxOnnx
from lynx_compile.recipe import NodeOperand

from .test_rewrite_fp8 import OPERANDS, Block, Case, block_inputs

pytestmark = pytest.mark.slow
RTX = recipe.Engine(backend="tensorrt_rtx")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """In bf16, as the library of the tests has it; ONNX Runtime would not run this one."""
    torch.manual_seed(0)
    module = Block().bfloat16().eval().requires_grad_(False)
    inputs = {name: value.bfloat16() for name, value in block_inputs().items()}
    folder = tmp_path_factory.mktemp("bf16")
    dense = export_module(module, inputs, folder / "dense.onnx")
    return Case(module, find_structure(module, inputs).groups, dense, {}, folder)


@pytest.mark.parametrize("operand", OPERANDS)
def test_an_engine_holds_every_fp8_node(case: Case, operand: NodeOperand, tmp_path: Path) -> None:
    lynx = case.rewrite(lambda _: operand)
    tensors = load_file(lynx.weights_path)
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in tensors.items()}
    assert kinds["weight_scale"] == torch.float32 and kinds["bias"] == torch.bfloat16
    built = build(lynx, RTX, tmp_path / "block.engine")
    assert built.plugin_layers == len(lynx.sparse) == 6
    engine = (tmp_path / "block.engine").read_bytes()
    assert all(op.encode() in engine for op in lynx.plugins) and len(lynx.plugins) == 4


def test_fp8_weights_may_be_engine_inputs(case: Case, tmp_path: Path) -> None:
    lynx: LynxOnnx = case.rewrite(lambda _: "weight", external=True)
    built = build(lynx, RTX, tmp_path / "block.engine")
    inputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in built.inputs}
    name = next(node.name for node in lynx.sparse if node.producer == "gelu")
    assert inputs[f"{name}.values"] == ("int32", (128, 16))
    assert inputs[f"{name}.metadata"] == ("int32", (1, 128, 4))
    assert inputs[f"{name}.weight_scale"] == ("fp32", (80,)) and inputs[f"{name}.bias"] == ("bf16", (80,))
    assert set(lynx.external_inputs) < inputs.keys()
