# SPDX-License-Identifier: Apache-2.0
"""The tiny model compiled with 2:4 weights, and with both operands, up to the rewritten file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from lynx_compile.models.dit import DiT
from lynx_compile.ops.functions import DOMAIN, NORM_OP, OP, WEIGHT_OP
from lynx_compile.ops.sparse_weight_linear import sparse_weight_linear, unpack_weight
from lynx_compile.passes.calibrate import calibrate
from lynx_compile.passes.compensate import compensate, load_weights
from lynx_compile.passes.export import DenseOnnx, export
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.passes.select import select
from lynx_compile.recipe import Sparsity, load_recipe
from tests.conftest import open_dit

MIXED = {
    "single_*.to_[qk]": "weight",
    "*.ff.net.0.proj": "weight",
    "*.ff.net.2": "none",
    "*": "activation",
}
Compile = Callable[..., LynxOnnx]


@pytest.fixture(scope="module")
def dit(tiny: Path) -> DiT:
    return open_dit(load_recipe(tiny / "tiny.yaml"))[0]


@pytest.fixture(scope="module")
def dense(dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> DenseOnnx:
    return export(dit, tmp_path_factory.mktemp("dense") / "dense.onnx", torch.float32)


@pytest.fixture(scope="module")
def compile_(dit: DiT, dense: DenseOnnx, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compensates and rewrites on moments that are measured once: they do not depend on the operand."""
    recipe = load_recipe(tiny / "tiny.yaml")
    _, recording = open_dit(recipe)
    everything = select(dit.groups, Sparsity(operand="activation"))
    statistics = calibrate(
        dit, everything, recording, recipe, tmp_path_factory.mktemp("statistics"), lambda *_: None
    )

    def run(sparsity: Sparsity, **options: object) -> LynxOnnx:
        folder = tmp_path_factory.mktemp("compiled")
        plan = select(dit.groups, sparsity)
        weights = compensate(dit, plan, statistics, sparsity, folder / "weights", lambda *_: None)
        assert {load_weights(path).operand for path in weights} == {group.operand for group in plan.groups}
        return rewrite(dense, plan, weights, folder / "tiny.onnx", **options)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def pruned(compile_: Compile) -> LynxOnnx:
    return compile_(Sparsity(operand="weight"))


def _feed(dit: DiT) -> dict[str, np.ndarray]:
    return {n: (v.float() if v.dtype == dit.dtype else v).numpy() for n, v in dit.inputs.items()}


def _run(
    model: Path | bytes, feed: dict[str, np.ndarray], outputs: list[str] | None = None
) -> list[np.ndarray]:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(outputs, feed)


def _distance(lynx: LynxOnnx, dense: DenseOnnx, dit: DiT) -> float:
    expected, got = (_run(path, _feed(dit))[0] for path in (dense.path, lynx.path))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _attributes(lynx: LynxOnnx) -> dict[str, dict[str, int]]:
    nodes = onnx.load(lynx.path, load_external_data=False).graph.node
    return {node.name: {a.name: a.i for a in node.attribute} for node in nodes if node.domain == DOMAIN}


def test_all_candidates_are_pruned_weights_near_the_dense_model(
    pruned: LynxOnnx, compile_: Compile, dense: DenseOnnx, dit: DiT
) -> None:
    assert {(node.op, node.rank, node.norm_scale) for node in pruned.sparse} == {(WEIGHT_OP, 0, False)}
    assert {node.producer for node in pruned.sparse} == {None}
    assert len(pruned.sparse) == 10 and pruned.plugins == {WEIGHT_OP: ("activation", "activation_from")}
    functions = onnx.load(pruned.path, load_external_data=False).functions
    assert [function.name for function in functions] == [WEIGHT_OP]
    onnx.checker.check_model(pruned.path, full_check=True)
    refitted = _distance(pruned, dense, dit)
    assert refitted < 0.15
    assert refitted < 0.8 * _distance(compile_(Sparsity(operand="weight", method="none")), dense, dit)


def test_each_node_equals_the_definition_on_the_same_input(pruned: LynxOnnx, dit: DiT) -> None:
    model = onnx.load(pruned.path)
    nodes = [node for node in model.graph.node if node.op_type == WEIGHT_OP]
    wanted = [name for node in nodes for name in (node.input[0], node.output[0])]
    model.graph.output.extend(oh.make_empty_tensor_value_info(name) for name in wanted)
    values = _run(model.SerializeToString(), _feed(dit), wanted)
    tensors = load_file(pruned.weights_path)
    attributes = _attributes(pruned)
    for node, x, y in zip(nodes, values[::2], values[1::2], strict=True):
        own = attributes[node.name]
        options = {name: own[name] for name in ("metadata_layout", "activation", "activation_from")}
        weights = [tensors[name] for name in node.input[1:]]
        expected = sparse_weight_linear(torch.from_numpy(x), *weights, **options).numpy()
        assert own["out_channels"] == y.shape[-1]
        assert np.abs(y - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1)


def test_merged_weights_are_the_linears_own_with_gelu_last(pruned: LynxOnnx, dit: DiT) -> None:
    node = next(n for n in pruned.sparse if "single_transformer_blocks.0.proj_mlp" in n.linears)
    assert [path.split(".")[-1] for path in node.linears] == ["to_q", "to_k", "to_v", "proj_mlp"]
    assert (node.out_channels, node.activation, node.activation_from) == (448, 1, 192)
    tensors = load_file(pruned.weights_path)
    sparse = unpack_weight(tensors[f"{node.name}.values"], tensors[f"{node.name}.metadata"], 80)
    learned = torch.cat([dit.module.get_submodule(path).weight for path in node.linears])
    likeness = torch.nn.functional.normalize(sparse[:448]) @ torch.nn.functional.normalize(learned).T
    assert torch.equal(likeness.argmax(1), torch.arange(448))  # each row is nearest to its own


def test_a_mixed_recipe_splits_the_group_into_two_nodes(
    compile_: Compile, pruned: LynxOnnx, dense: DenseOnnx, dit: DiT
) -> None:
    mixed = compile_(Sparsity(operand=MIXED))
    ops = {linear: node.op for node in mixed.sparse for linear in node.linears}
    assert {linear for linear, op in ops.items() if op == WEIGHT_OP} == {
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.ff.net.0.proj",
    }
    block = [n for n in mixed.sparse if n.linears[0].startswith("single_") and len(n.linears) == 2]
    assert {(n.operand, n.linears[-1].split(".")[-1]) for n in block} == {
        ("weight", "to_k"),
        ("activation", "proj_mlp"),
    }
    reasons = {linear.path: linear.reason for linear in mixed.dense}
    assert reasons["transformer_blocks.0.ff.net.2"] == "operand none by the recipe ('*.ff.net.2')"
    assert set(mixed.plugins) == {OP, NORM_OP, WEIGHT_OP}
    assert {n.producer for n in block} == {None}  # two nodes read the normed tensor
    assert _distance(mixed, dense, dit) < 0.2


def test_the_layout_is_in_the_file_and_changes_only_the_metadata(
    compile_: Compile, pruned: LynxOnnx, dit: DiT
) -> None:
    hopper = compile_(Sparsity(operand="weight"), metadata_layout=90)
    for lynx, layout in ((pruned, 80), (hopper, 90)):
        assert {own["metadata_layout"] for own in _attributes(lynx).values()} == {layout}
    one, other = load_file(pruned.weights_path), load_file(hopper.weights_path)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {f"{node.name}.metadata" for node in pruned.sparse}
    np.testing.assert_allclose(
        _run(hopper.path, _feed(dit))[0], _run(pruned.path, _feed(dit))[0], rtol=1e-4, atol=1e-4
    )


def test_a_wrong_layout_spoils_the_result(
    pruned: LynxOnnx, dense: DenseOnnx, dit: DiT, tmp_path: Path
) -> None:
    model = onnx.load(pruned.path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "metadata_layout":
                attribute.i = 90
    expected, right = (_run(path, _feed(dit))[0] for path in (dense.path, pruned.path))
    wrong = _run(model.SerializeToString(), _feed(dit))[0]
    assert np.linalg.norm(wrong - expected) > 3 * np.linalg.norm(right - expected)


def test_external_weights_become_inputs_with_the_same_result(
    compile_: Compile, pruned: LynxOnnx, dit: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of dense linears too, from a size on."""
    monkeypatch.setattr("lynx_compile.passes.rewrite.LARGE", 128 * 64)
    lynx = compile_(Sparsity(operand="weight"), external=True)
    tensors = load_file(lynx.weights_path)
    dense = set(lynx.external_inputs) - {
        f"{node}.{part}" for node in lynx.nodes for part in ("values", "metadata", "bias")
    }
    assert "transformer_blocks.0.norm1.linear.weight" in dense and "proj_out.weight" not in dense
    assert len(lynx.external_inputs) == 3 * len(lynx.nodes) + len(dense)
    assert {tensors[f"{name}.metadata"].dtype for name in lynx.nodes} == {torch.int32}
    feed = _feed(dit)
    bound = {name: tensors[name].numpy() for name in lynx.external_inputs}
    np.testing.assert_allclose(
        _run(lynx.path, feed | bound)[0], _run(pruned.path, feed)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_hold_the_rounded_values(
    dit: DiT, pruned: LynxOnnx, tiny: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    recipe, sparsity = load_recipe(tiny / "tiny.yaml"), Sparsity(operand="weight")
    _, recording = open_dit(recipe)
    plan = select(dit.groups, sparsity)
    statistics = calibrate(dit, plan, recording, recipe, tmp_path / "statistics", lambda *_: None)
    weights = compensate(dit, plan, statistics, sparsity, tmp_path / "weights", lambda *_: None)
    half_dense = export(dit, tmp_path / "dense.onnx", dtype)
    half = rewrite(half_dense, plan, weights, tmp_path / "half.onnx")
    full_tensors, half_tensors = load_file(pruned.weights_path), load_file(half.weights_path)
    for node in half.nodes:
        assert torch.equal(half_tensors[f"{node}.values"], full_tensors[f"{node}.values"].to(dtype))
        assert torch.equal(half_tensors[f"{node}.metadata"], full_tensors[f"{node}.metadata"])
    if dtype == torch.float16:  # ONNX Runtime has no bf16 kernels for this graph on a CPU
        feed = {n: v.numpy() for n, v in dit.inputs.items()}
        y = _run(half.path, feed)[0].astype(np.float32)
        reference = _run(pruned.path, _feed(dit))[0]
        assert np.linalg.norm(y - reference) < 0.05 * np.linalg.norm(reference)
