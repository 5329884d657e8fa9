# SPDX-License-Identifier: Apache-2.0
"""Gated feed-forwards of whole classes with 2:4 weights: rewritten exactly, and their linears' results found again."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open

from lynx_compile.engine.arguments import flatten
from lynx_compile.models.structure import find_structure
from lynx_compile.ops.functions import WEIGHT_OP
from lynx_compile.ops.sparse_linear import SILU
from lynx_compile.ops.sparse_weight_linear import unpack_weight
from lynx_compile.passes.describe import _sparse
from lynx_compile.passes.export import export_module
from lynx_compile.passes.rewrite import rewrite
from lynx_compile.passes.select import select
from lynx_compile.recipe import Sparsity
from lynx_compile.tools.linear_graphs import linear_graphs
from lynx_compile.tools.support.configurations import TINY, classes, example, model
from lynx_compile.torch_ops import apply
from lynx_compile.torch_ops.epilogue import NO_EPILOGUE
from lynx_compile.torch_ops.modules import Fp8Linear, SparseWeightLinear
from lynx_compile.torch_ops.swap import undo
from tests.passes.exact import fp8_plan, fp8_weights, two_of_four, two_of_four_weights
from tests.passes.test_rewrite_calls import _error, _run

# Wide enough for 2:4 weights, whose K is a multiple of 64.
WIDER = {
    "Flux2": {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 8, 8, 8)},
    "ZImage": {"dim": 192, "axes_dims": [16, 24, 24]},
}


@pytest.fixture(scope="module", params=WIDER)
def gated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    name = request.param
    tiny, folder = example(name), tmp_path_factory.mktemp(name)
    module = model(classes()[TINY[name].class_name], TINY[name].config | WIDER[name])
    structure = find_structure(module, tiny.inputs)
    plan = select(structure.groups, Sparsity(operand="weight"))
    two_of_four(module, plan)
    dense = export_module(module, tiny.inputs, folder / "dense.onnx")
    lynx = rewrite(dense, plan, two_of_four_weights(module, plan, folder), folder / "lynx.onnx")
    feed = {name: value.numpy() for name, value in flatten(tiny.inputs).tensors.items()}
    return SimpleNamespace(
        name=name, module=module, groups=structure.groups, dense=dense, lynx=lynx, feed=feed, folder=folder
    )


def test_swiglu_costs_no_pass_of_its_own(gated: SimpleNamespace) -> None:
    """Of FLUX.2's single blocks, whose q, k, v and feed-forward are one linear, too."""
    nodes = {node.linears: node for node in gated.lynx.sparse}
    holding = {linears: node for linears, node in nodes.items() if node.gated}
    assert {node.activation for node in holding.values()} == {SILU}
    if gated.name == "Flux2":
        assert {linears[0] for linears in holding} == {
            "transformer_blocks.0.ff.linear_in",
            "transformer_blocks.0.ff_context.linear_in",
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        }
        fused = holding["single_transformer_blocks.0.attn.to_qkv_mlp_proj",]
        assert (fused.activation_from, fused.out_channels) == (3 * 64, 3 * 64 + 2 * 192)
    else:
        assert {tuple(linear.rsplit(".", 1)[1] for linear in linears) for linears in holding} == {
            ("w1", "w3")
        }
    assert gated.lynx.plugins == {WEIGHT_OP: ("activation", "activation_from", "gated")}
    graph = onnx.load(gated.lynx.path, load_external_data=False).graph
    dense = onnx.load(gated.dense.path, load_external_data=False).graph
    sigmoids = [sum(node.op_type == "Sigmoid" for node in each.node) for each in (dense, graph)]
    assert sigmoids[0] - sigmoids[1] == len(holding) > 2
    assert _error(gated.dense, gated.lynx, gated.feed) < 1e-5


def test_a_torch_module_gets_its_rows_in_order(gated: SimpleNamespace) -> None:
    nodes = [_sparse(node) for node in gated.lynx.sparse]
    assert sum(node.gated is not None for node in nodes) > 2
    assert all(node.activation_from is None for node in nodes)  # which means GELU
    with safe_open(gated.lynx.weights_path, "pt") as file:
        for node in nodes:
            read = apply._Reader(file, gated.lynx.weights_path, node)
            linear = apply._sparse_weight(node, read, torch.float32, NO_EPILOGUE)
            unpacked = unpack_weight(linear.values, linear.metadata, 80)[: node.out_channels]
            own = [gated.module.get_submodule(path) for path in node.linears]
            assert torch.equal(unpacked, torch.cat([each.weight for each in own]))
            if own[0].bias is not None:
                assert torch.equal(linear.bias, torch.cat([each.bias for each in own]))


def test_a_torch_module_makes_its_gates_in_the_epilogue(gated: SimpleNamespace) -> None:
    nodes = [_sparse(node) for node in gated.lynx.sparse]
    module, given = copy.deepcopy(gated.module), example(gated.name).inputs
    applied = apply.Applied(Path(), [], [], restorable=True)
    with torch.no_grad(), safe_open(gated.lynx.weights_path, "pt") as file:
        before = flatten(module(**given)).tensors
        for node in nodes:
            read = apply._Reader(file, gated.lynx.weights_path, node)
            apply._put(module, node, read, torch.float32, applied)
        ops = {each for each in module.modules() if isinstance(each, SparseWeightLinear)}
        epilogues = [op.epilogue for op in ops if op.epilogue.gated]
        assert len(epilogues) == sum(node.gated is not None for node in nodes)
        assert {epilogue.activation for epilogue in epilogues} == {SILU}
        _assert_near(flatten(module(**given)).tensors, before)
        undo(module, applied.changes)
        assert all(torch.equal(y, before[name]) for name, y in flatten(module(**given)).tensors.items())
    assert [type(each) for each in module.modules()] == [type(each) for each in gated.module.modules()]


def test_a_torch_module_in_fp8_gives_what_the_graph_does(gated: SimpleNamespace) -> None:
    """No epilogue makes its gates: in the graph that rounds the product does, if an FP8 node reads it."""
    folder, module = gated.folder, copy.deepcopy(gated.module)
    plan = fp8_plan(gated.groups, lambda path: "none" if "w2" in path else "weight")
    lynx = rewrite(gated.dense, plan, fp8_weights(module, plan, folder), folder / "fp8.onnx")
    nodes = [_sparse(node) for node in lynx.sparse]
    assert all(node.gated is None for node in nodes)
    assert {node.producer for node in lynx.sparse} >= {"gated"}
    applied = apply.Applied(Path(), [], [], restorable=True)
    with torch.no_grad(), safe_open(lynx.weights_path, "pt") as file:
        for node in nodes:
            apply._put(module, node, apply._Reader(file, lynx.weights_path, node), torch.float32, applied)
        found = flatten(module(**example(gated.name).inputs)).tensors.values()
    ops = {each for each in module.modules() if isinstance(each, Fp8Linear)}
    assert ops and not any(op.epilogue.gated for op in ops)
    for y, wanted in zip(found, _run(lynx.path, gated.feed), strict=True):
        assert np.linalg.norm(y.numpy() - wanted) < 1e-2 * np.linalg.norm(wanted)


def _assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, y in wanted.items():
        assert (found[name] - y).norm() < 1e-5 * y.norm(), name


def test_compare_puts_the_rows_in_order_again(gated: SimpleNamespace) -> None:
    sparse = [SimpleNamespace(layer=node.name, **vars(node)) for node in gated.lynx.sparse]
    manifest: Any = SimpleNamespace(sparse=sparse)
    (part,) = linear_graphs(gated.dense.path, gated.lynx.path, manifest, 8.0, gated.folder)
    assert sorted(part.linears.values()) == sorted(linear for node in sparse for linear in node.linears)
    for y_dense, y in zip(_run(part.dense, gated.feed), _run(part.lynx, gated.feed), strict=True):
        np.testing.assert_allclose(y, y_dense, rtol=1e-4, atol=1e-4 * np.abs(y_dense).max())
