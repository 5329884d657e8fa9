# SPDX-License-Identifier: Apache-2.0
"""export and rewrite: the ONNX files mean what torch and ``sparsity`` mean."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file

from lynx_compile.errors import StageError
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.models.structure import Linear, LinearGroup
from lynx_compile.ops.functions import DOMAIN, LINEAR_KEY, NORM_OP, OP, lynx_function
from lynx_compile.ops.sparse_linear import Norm, expand_low_rank, keep_mask, produce, sparse_linear
from lynx_compile.passes.calibrate import calibrate
from lynx_compile.passes.compensate import SparseLinearWeights, compensate, save_weights
from lynx_compile.passes.export import DenseOnnx, export
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.passes.select import SparsityPlan, select
from lynx_compile.recipe import Recipe, Sparsity, load_recipe
from tests.conftest import open_dit


@dataclass(frozen=True)
class Compiled:
    recipe: Recipe
    dit: DiT
    recording: Recording
    plan: SparsityPlan
    weights: tuple[Path, ...]
    dense: DenseOnnx
    lynx: LynxOnnx


@pytest.fixture(scope="module")
def compiled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The tiny model through all stages up to rewrite, in float32, with the norm scale on."""
    recipe = load_recipe(tiny / "tiny.yaml")
    recipe = recipe.model_copy(update={"sparsity": Sparsity(rank=16, norm_scale=True)})
    folder = tmp_path_factory.mktemp("compiled")
    dit, recording = open_dit(recipe)
    plan = select(dit.groups, recipe.sparsity)
    statistics = calibrate(dit, plan, recording, recipe, folder / "statistics", lambda *_: None)
    weights = compensate(dit, plan, statistics, recipe.sparsity, folder / "weights", lambda *_: None)
    dense = export(dit, folder / "dense.onnx", torch.float32)
    return Compiled(
        recipe, dit, recording, plan, weights, dense, rewrite(dense, plan, weights, folder / "tiny.onnx")
    )


def _feed(dit: DiT, dtype: torch.dtype) -> dict[str, np.ndarray]:
    return {n: (v.to(dtype) if v.dtype == dit.dtype else v).numpy() for n, v in dit.inputs.items()}


def _run(path: Path, feed: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(outputs, feed)


def test_dense_onnx_equals_torch(compiled: Compiled) -> None:
    with torch.no_grad():
        inputs = {n: v.float() for n, v in compiled.dit.inputs.items()}
        expected = compiled.dit.module(**inputs, return_dict=False)[0].numpy()
    got = _run(compiled.dense.path, _feed(compiled.dit, torch.float32))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_export_leaves_the_module_as_it_was(compiled: Compiled) -> None:
    assert "forward" not in vars(compiled.dit.module)
    assert next(compiled.dit.module.parameters()).dtype == torch.float32


def test_export_marks_every_linear_and_nothing_else(compiled: Compiled) -> None:
    model = onnx.load(compiled.dense.path, load_external_data=False)
    marked = [e.value for n in model.graph.node for e in n.metadata_props if e.key == LINEAR_KEY]
    used = {linear.path for linear in compiled.dit.linears}
    assert len(marked) == len(set(marked)) and set(marked) <= used
    assert {linear for node in compiled.lynx.sparse for linear in node.linears} <= set(marked)
    assert all(e.key == LINEAR_KEY for n in model.graph.node for e in n.metadata_props)
    assert b"site-packages" not in compiled.dense.path.read_bytes()  # no paths of the building machine


def test_every_linear_is_rewritten_or_has_a_reason(compiled: Compiled) -> None:
    sparse = {linear for node in compiled.lynx.sparse for linear in node.linears}
    dense = {linear.path: linear.reason for linear in compiled.lynx.dense}
    assert sparse | set(dense) == {linear.path for linear in compiled.dit.linears}
    assert not sparse & set(dense) and all(dense.values())
    assert "single_transformer_blocks.0.proj_out" in sparse and "proj_out" in dense


def test_linears_that_read_one_tensor_are_one_node(compiled: Compiled) -> None:
    merged = next(
        node for node in compiled.lynx.sparse if "single_transformer_blocks.0.proj_mlp" in node.linears
    )
    assert {path.split(".")[-1] for path in merged.linears} == {"proj_mlp", "to_q", "to_k", "to_v"}
    assert merged.out_channels == 256 + 3 * 64


def _gelus(lynx: LynxOnnx) -> dict[str, tuple[int, int]]:
    """{last linear: (activation, activation_from)} of every node, as the file has them."""
    model = onnx.load(lynx.path, load_external_data=False)
    attributes = {n.name: {a.name: a.i for a in n.attribute} for n in model.graph.node if n.domain == DOMAIN}
    return {
        node.linears[-1]: (attributes[node.name]["activation"], attributes[node.name]["activation_from"])
        for node in lynx.sparse
    }


def test_every_gelu_behind_a_sparse_linear_is_its_nodes_activation(compiled: Compiled) -> None:
    """In a merged node its linear comes last."""
    gelus = _gelus(compiled.lynx)
    assert {linear: found for linear, found in gelus.items() if found[0]} == {
        "transformer_blocks.0.ff.net.0.proj": (1, 0),
        "transformer_blocks.0.ff_context.net.0.proj": (1, 0),
        "single_transformer_blocks.0.proj_mlp": (1, 3 * 64),
    }
    model = onnx.load(compiled.lynx.path, load_external_data=False)
    assert not [node.name for node in model.graph.node if node.op_type == "Tanh"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelus_are_found_in_half_precision(compiled: Compiled, tmp_path: Path, dtype: torch.dtype) -> None:
    dense = export(compiled.dit, tmp_path / "dense.onnx", dtype)
    lynx = rewrite(dense, compiled.plan, compiled.weights, tmp_path / "half.onnx")
    assert _gelus(lynx) == _gelus(compiled.lynx)


def _spoil_constant(model: onnx.ModelProto, chain: dict[str, onnx.NodeProto]) -> None:
    """0.0447 in place of 0.044715: another function."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.0447), "other"))
    scaled = chain["cube"]
    index = 0 if scaled.input[1] == chain["pow"].output[0] else 1
    scaled.input[index] = "other"


def _spoil_power(model: onnx.ModelProto, chain: dict[str, onnx.NodeProto]) -> None:
    """3 to the power of y."""
    chain["pow"].input[:] = reversed(chain["pow"].input)


def _read_linear(model: onnx.ModelProto, chain: dict[str, onnx.NodeProto]) -> None:
    """The linear's own output is a result of the graph too."""
    model.graph.output.append(
        oh.make_tensor_value_info(chain["pow"].input[0], TensorProto.FLOAT, [2, 64, 256])
    )


def _read_linear_too(model: onnx.ModelProto, chain: dict[str, onnx.NodeProto]) -> None:
    """A second reader of the linear beside the chain."""
    model.graph.node.append(oh.make_node("Identity", [chain["pow"].input[0]], ["kept"], "reader"))
    model.graph.output.append(oh.make_tensor_value_info("kept", TensorProto.FLOAT, [2, 64, 256]))


def _read_middle(model: onnx.ModelProto, chain: dict[str, onnx.NodeProto]) -> None:
    """A second reader in the middle of the chain."""
    model.graph.node.append(oh.make_node("Identity", [chain["tanh"].output[0]], ["kept"], "reader"))
    model.graph.output.append(oh.make_tensor_value_info("kept", TensorProto.FLOAT, [2, 64, 256]))


@pytest.mark.parametrize(
    "spoil", [_spoil_constant, _spoil_power, _read_linear, _read_linear_too, _read_middle]
)
def test_what_only_resembles_a_gelu_stays_in_the_graph(compiled: Compiled, tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    model, path = _dense_copy(compiled, tmp_path)
    linear = "transformer_blocks.0.ff.net.0.proj"
    y = next(n for n in model.graph.node if _product(model, linear).output[0] in n.input).output[0]
    power = next(n for n in model.graph.node if n.op_type == "Pow" and n.input[0] == y)
    chain = {"pow": power}
    for name in ("cube", "sum", "inner", "tanh"):
        last = list(chain.values())[-1].output[0]
        chain[name] = next(n for n in model.graph.node if last in n.input)
    assert chain["tanh"].op_type == "Tanh"
    spoil(model, chain)
    onnx.save(model, path)
    lynx = rewrite(DenseOnnx(path), compiled.plan, compiled.weights, tmp_path / "x.onnx")
    gelus = _gelus(lynx)
    assert gelus[linear] == (0, 0) and sum(activation for activation, _ in gelus.values()) == 2
    if spoil not in (_spoil_constant, _spoil_power):  # the same function, with one more result
        feed = _feed(compiled.dit, torch.float32)
        np.testing.assert_allclose(
            _run(lynx.path, feed)[0], _run(compiled.lynx.path, feed)[0], rtol=1e-4, atol=1e-4
        )


def test_each_node_equals_the_definition_on_the_same_input(compiled: Compiled) -> None:
    """Node by node, since end to end one flipped choice of channels spreads."""
    model = onnx.load(compiled.lynx.path)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.name for node in nodes] != [] and {n.name for n in nodes} == set(compiled.lynx.nodes)
    tensors = load_file(compiled.lynx.weights_path)
    wanted = {name for node in nodes for name in (*node.input, *node.output) if name not in tensors}
    model.graph.output.extend(oh.make_empty_tensor_value_info(name) for name in wanted)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(list(wanted), _feed(compiled.dit, torch.float32))
    tensors |= {name: torch.from_numpy(value) for name, value in zip(wanted, values, strict=True)}
    for node in nodes:
        attributes = {a.name: oh.get_attribute_value(a) for a in node.attribute}
        x, weight, down, bias, *norm = (tensors[name] for name in node.input)
        assert bool(norm) == (node.op_type == NORM_OP)
        if norm:
            x = produce(x, Norm(*norm, rms=bool(attributes["rms"]), epsilon=attributes["epsilon"]))
        expected = sparse_linear(
            x, weight, down, bias, rank=attributes["rank"],
            norm_scale=bool(attributes["norm_scale"]),
            activation=attributes["activation"], activation_from=attributes["activation_from"],
        ).numpy()  # fmt: skip
        y = tensors[node.output[0]].numpy()
        assert np.abs(y - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1)


@pytest.mark.parametrize(
    ("rank", "gelu"),
    [
        (0, {}),
        (16, {"activation": 1, "activation_from": 0}),
        (48, {"activation": 1, "activation_from": 8}),
        (16, {"activation": 2, "activation_from": 8}),
    ],
)
@pytest.mark.parametrize("norm_scale", [0, 1])
def test_function_equals_the_definition(rank: int, gelu: dict[str, int], norm_scale: int) -> None:
    """A token of zeros, ties, a NaN token and GELU included."""
    torch.manual_seed(rank + norm_scale)
    channels, out_channels = 80, 24
    x = torch.randn(2, 9, channels).mul(3).round()  # ties
    x[0, 0] = 0
    x[0, 1, 5], x[0, 2, 7] = torch.inf, torch.nan
    weight = expand_low_rank(torch.randn(out_channels, channels), torch.randn(out_channels, rank))
    down, bias = torch.randn(max(rank, 1), channels), torch.randn(out_channels)
    feed = {"x": x, "weight": weight, "lora_down": down, "bias": bias}
    node = _single_node(feed, rank=rank, norm_scale=norm_scale, **gelu)
    y = ort.InferenceSession(node, providers=["CPUExecutionProvider"]).run(
        None, {name: value.numpy() for name, value in feed.items()}
    )[0]
    expected = sparse_linear(**feed, rank=rank, norm_scale=bool(norm_scale), **gelu).numpy()
    np.testing.assert_allclose(
        y, expected, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(expected[np.isfinite(expected)]))
    )


def _single_node(feed: dict[str, torch.Tensor], **attributes: int) -> bytes:
    kinds = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    node = oh.make_node(
        OP, list(feed), ["y"], domain=DOMAIN, plugin_namespace="lynx", plugin_version="1", **attributes
    )
    inputs = [oh.make_tensor_value_info(n, kinds[v.dtype], v.shape) for n, v in feed.items()]
    graph = oh.make_graph([node], "one", inputs, [oh.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid(DOMAIN, 1)]
    return oh.make_model(
        graph, functions=[lynx_function()], opset_imports=opsets, ir_version=10
    ).SerializeToString()


def test_sparse_output_is_nearer_to_dense_than_naive(compiled: Compiled, tmp_path: Path) -> None:
    feed = _feed(compiled.dit, torch.float32)
    dense, joint = _run(compiled.dense.path, feed)[0], _run(compiled.lynx.path, feed)[0]
    recipe, plan = compiled.recipe, compiled.plan
    statistics = calibrate(
        compiled.dit, plan, compiled.recording, recipe, tmp_path / "statistics", lambda *_: None
    )
    none = Sparsity(method="none", norm_scale=True)
    weights = compensate(compiled.dit, compiled.plan, statistics, none, tmp_path / "w", lambda *_: None)
    naive = rewrite(compiled.dense, compiled.plan, weights, tmp_path / "naive.onnx")
    assert np.linalg.norm(joint - dense) < 0.7 * np.linalg.norm(_run(naive.path, feed)[0] - dense)


def test_the_file_passes_the_checker_and_has_no_large_tensor_inside(compiled: Compiled) -> None:
    onnx.checker.check_model(compiled.lynx.path, full_check=True)
    assert compiled.lynx.path.stat().st_size < 500_000
    model = onnx.load(compiled.lynx.path, load_external_data=False)
    locations = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
    assert locations == {compiled.lynx.weights_path.name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_hold_the_rounded_weights(
    compiled: Compiled, tmp_path: Path, dtype: torch.dtype
) -> None:
    dense = export(compiled.dit, tmp_path / "dense.onnx", dtype)
    lynx = rewrite(dense, compiled.plan, compiled.weights, tmp_path / "half.onnx")
    full, half = load_file(compiled.lynx.weights_path), load_file(lynx.weights_path)
    for name in (f"{node}.weight" for node in lynx.nodes):
        assert torch.equal(half[name], full[name].to(dtype))
    learned = {name for name, _ in compiled.dit.module.named_parameters()}
    assert {half[name].dtype for name in half.keys() & learned} == {dtype}
    if dtype == torch.float16:  # ONNX Runtime has no bf16 kernels for this graph on a CPU
        y = _run(lynx.path, _feed(compiled.dit, dtype))[0].astype(np.float32)
        reference = _run(compiled.lynx.path, _feed(compiled.dit, torch.float32))[0]
        assert np.linalg.norm(y - reference) < 0.05 * np.linalg.norm(reference)


def test_external_weights_become_inputs_with_the_same_result(compiled: Compiled, tmp_path: Path) -> None:
    shown: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        shown.append((what, done, total))

    path = tmp_path / "tiny.onnx"
    lynx = rewrite(compiled.dense, compiled.plan, compiled.weights, path, external=True, progress=progress)
    tensors = load_file(lynx.weights_path)
    assert {what.removeprefix("wrote ") for what, *_ in shown} == tensors.keys()
    assert [done for _, done, _ in shown] == list(range(1, len(tensors) + 1))
    assert len(lynx.external_inputs) == 3 * len(lynx.nodes)
    feed = _feed(compiled.dit, torch.float32)
    bound = {name: tensors[name].numpy() for name in lynx.external_inputs}
    np.testing.assert_allclose(
        _run(lynx.path, feed | bound)[0], _run(compiled.lynx.path, feed)[0], rtol=1e-4, atol=1e-5
    )


def test_same_inputs_give_the_same_bytes(compiled: Compiled, tmp_path: Path) -> None:
    again = rewrite(compiled.dense, compiled.plan, compiled.weights, tmp_path / "tiny.onnx")
    assert again.path.read_bytes() == compiled.lynx.path.read_bytes()
    assert again.weights_path.read_bytes() == compiled.lynx.weights_path.read_bytes()


def _dense_copy(compiled: Compiled, folder: Path) -> tuple[onnx.ModelProto, Path]:
    for file in compiled.dense.path.parent.glob("dense.onnx*"):
        shutil.copy(file, folder)
    return onnx.load(folder / "dense.onnx", load_external_data=False), folder / "dense.onnx"


def _product(model: onnx.ModelProto, linear: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if any(e.value == linear for e in n.metadata_props))


def test_a_linear_whose_bias_is_hidden_stays_dense_with_its_reason(
    compiled: Compiled, tmp_path: Path
) -> None:
    linear = "transformer_blocks.0.attn.to_k"
    model, path = _dense_copy(compiled, tmp_path)
    product = _product(model, linear)
    index = list(model.graph.node).index(product)
    identity = oh.make_node("Identity", ["hidden"], [product.output[0]], "between")
    product.output[0] = "hidden"
    model.graph.node.insert(index + 1, identity)
    onnx.save(model, path)
    lynx = rewrite(DenseOnnx(path), compiled.plan, compiled.weights, tmp_path / "x.onnx")
    assert {d.path: d.reason for d in lynx.dense}[linear] == "its bias is not added right behind its MatMul"
    group = next(node for node in lynx.sparse if "transformer_blocks.0.attn.to_q" in node.linears)
    assert set(group.linears) == {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"}
    feed = _feed(compiled.dit, torch.float32)
    dense, all_sparse, got = (_run(p, feed)[0] for p in (compiled.dense.path, compiled.lynx.path, lynx.path))
    assert np.linalg.norm(got - dense) < 2 * np.linalg.norm(all_sparse - dense)


def test_readers_of_different_tensors_become_different_nodes(compiled: Compiled, tmp_path: Path) -> None:
    model, path = _dense_copy(compiled, tmp_path)
    product = _product(model, "transformer_blocks.0.attn.to_v")
    index = list(model.graph.node).index(product)
    copied = oh.make_node("Identity", [product.input[0]], ["copied"], "copy")
    product.input[0] = "copied"
    model.graph.node.insert(index, copied)
    onnx.save(model, path)
    lynx = rewrite(DenseOnnx(path), compiled.plan, compiled.weights, tmp_path / "x.onnx")
    assert len(lynx.nodes) == len(compiled.lynx.nodes) + 1
    feed = _feed(compiled.dit, torch.float32)
    np.testing.assert_allclose(
        _run(lynx.path, feed)[0], _run(compiled.lynx.path, feed)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "form", ["gemm", "gemm_transposed_input", "matmul_without_bias", "bias_without_linear_bias"]
)
def test_forms_of_a_linear(tmp_path: Path, form: str) -> None:
    """Gemm with its bias, and MatMul without one; an Add that is no bias is not swallowed."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(8, 16), torch.randn(8), torch.randn(5, 16)
    has_bias = form.startswith("gemm")
    if has_bias:
        transposed = form == "gemm_transposed_input"
        node = oh.make_node("Gemm", ["x", "w", "b"], ["y"], "product", transB=1, transA=int(transposed))
        nodes = [node]
        x = x.T.contiguous() if transposed else x
    else:
        node = oh.make_node("MatMul", ["x", "wt"], ["p"], "product")
        nodes = [oh.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]), node]
        nodes.append(oh.make_node("Add" if form.startswith("bias") else "Mul", ["p", "b"], ["y"]))
    node.metadata_props.add(key=LINEAR_KEY, value="fc")
    shapes = [oh.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    outputs = [oh.make_tensor_value_info("y", TensorProto.FLOAT, [5, 8])]
    constants = [onnx.numpy_helper.from_array(v.numpy(), n) for n, v in (("w", weight), ("b", bias))]
    graph = oh.make_graph(nodes, "g", shapes, outputs, constants)
    path = tmp_path / "dense.onnx"
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10), path)

    linear = Linear("fc", 16, 8, has_bias, None)
    group = LinearGroup("fc", (linear,), 5)
    plan = select((group,), Sparsity(operand="activation"))
    solved = SparseLinearWeights(
        ("fc",), (8,), expand_low_rank(weight, torch.zeros(8, 0)), torch.zeros(1, 16),
        bias if has_bias else torch.zeros(8), 0, False, (0.0,),
    )  # fmt: skip
    save_weights(tmp_path / "w.safetensors", solved)
    lynx = rewrite(DenseOnnx(path), plan, [tmp_path / "w.safetensors"], tmp_path / "lynx.onnx")
    y = _run(lynx.path, {"x": x.numpy()})[0]
    if form == "gemm_transposed_input":
        assert [d.reason for d in lynx.dense] == ["its Gemm scales or transposes an operand"]
        return
    assert lynx.nodes == (f"fc.{OP}",)
    expected = (x * keep_mask(x)) @ weight.T
    expected = expected * bias if form == "matmul_without_bias" else expected + bias
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_an_unreadable_dense_file_is_one_clear_error(compiled: Compiled, tmp_path: Path) -> None:
    (tmp_path / "dense.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(StageError, match="Run again with --fresh"):
        rewrite(DenseOnnx(tmp_path / "dense.onnx"), compiled.plan, compiled.weights, tmp_path / "x.onnx")
