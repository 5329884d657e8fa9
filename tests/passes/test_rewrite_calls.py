# SPDX-License-Identifier: Apache-2.0
"""Linears that are called several times, convolutions of kernel 1, and whole classes: what is rewritten is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from lynx_compile.engine.arguments import flatten
from lynx_compile.models.structure import find_structure
from lynx_compile.ops.functions import DOMAIN
from lynx_compile.passes.export import DenseOnnx, export_module
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.tools.linear_graphs import linear_graphs
from lynx_compile.tools.support.configurations import example
from tests.passes.exact import SIZE, Layers, exact_plan, exact_weights


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.manual_seed(0)
    module = Layers().eval().requires_grad_(False)
    inputs = {"step": torch.ones(1, dtype=torch.int64)}  # the first is not of the activations' dtype
    inputs |= {"image": torch.randn(2, 8, SIZE), "text": torch.randn(2, 3, SIZE)}
    return _rewritten(module, inputs, tmp_path_factory.mktemp("layers"))


def _rewritten(module: torch.nn.Module, inputs: Mapping[str, Any], folder: Path) -> SimpleNamespace:
    dense = export_module(module, inputs, folder / "dense.onnx")
    structure = find_structure(module, inputs)
    plan = exact_plan(structure.groups)
    weights = exact_weights(module, plan, folder)
    lynx = rewrite(dense, plan, weights, folder / "lynx.onnx")
    feed = {name: value.numpy() for name, value in flatten(inputs).tensors.items()}
    return SimpleNamespace(
        dense=dense, structure=structure, plan=plan, weights=weights, lynx=lynx, feed=feed, folder=folder
    )


def _run(path: Path, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}
    return list(session.run(None, {name: value for name, value in feed.items() if name in names}))


def _error(dense: DenseOnnx, lynx: LynxOnnx, feed: Mapping[str, np.ndarray]) -> float:
    pairs = zip(_run(dense.path, feed), _run(lynx.path, feed), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)


def test_a_linear_called_twice_is_two_nodes_on_one_weight(layers: SimpleNamespace) -> None:
    nodes = {node.name: node for node in layers.lynx.sparse}
    name = "blocks.0.up.LynxSparseLinear"
    assert (nodes[name].tokens, nodes[f"{name}.2"].tokens) == (16, 6)
    assert nodes[name].activation == nodes[f"{name}.2"].activation == 1
    model = onnx.load(layers.lynx.path, load_external_data=False)
    first, second = (next(n for n in model.graph.node if n.name == one) for one in (name, f"{name}.2"))
    assert list(first.input)[1:] == list(second.input)[1:] and first.input[0] != second.input[0]
    assert sum(tensor.name.startswith("blocks.0.up") for tensor in model.graph.initializer) == 3
    assert _error(layers.dense, layers.lynx, layers.feed) < 1e-6


def test_convolutions_of_kernel_1_are_nodes_between_transposes(layers: SimpleNamespace) -> None:
    assert {linear for node in layers.lynx.sparse for linear in node.linears} == {
        "blocks.0.up", "blocks.0.down", "blocks.1.wide", "blocks.1.narrow",
    }  # fmt: skip
    model = onnx.load(layers.lynx.path, load_external_data=False)
    assert [node.op_type for node in model.graph.node].count("Conv") == 1  # the depthwise one
    wide = next(node for node in layers.lynx.sparse if node.linears == ("blocks.1.wide",))
    assert (wide.in_channels, wide.out_channels, wide.tokens) == (SIZE, 2 * SIZE, 16)


def test_compare_finds_the_results_of_calls_and_convolutions(layers: SimpleNamespace) -> None:
    """The graphs of ``compare``: every call of every linear, on the dense model's own inputs."""
    sparse = [SimpleNamespace(layer=node.name, **vars(node)) for node in layers.lynx.sparse]
    manifest: Any = SimpleNamespace(sparse=sparse)
    (part,) = linear_graphs(layers.dense.path, layers.lynx.path, manifest, 8.0, layers.folder)
    assert sorted(part.linears.values()) == [
        "blocks.0.down", "blocks.0.down", "blocks.0.up", "blocks.0.up", "blocks.1.narrow", "blocks.1.wide",
    ]  # fmt: skip
    sizes = []
    for y_dense, y in zip(_run(part.dense, layers.feed), _run(part.lynx, layers.feed), strict=True):
        np.testing.assert_allclose(y, y_dense, rtol=1e-4, atol=1e-5)
        sizes.append(y.shape)
    assert sorted(sizes)[0] == (2, 2, 4, SIZE) and (2, 3, 2 * SIZE) in sizes


def test_a_linear_that_one_call_does_not_fit_stays_dense(layers: SimpleNamespace, tmp_path: Path) -> None:
    """Its weight would be there twice otherwise."""
    model = onnx.load(layers.dense.path)
    calls = [n for n in model.graph.node for e in n.metadata_props if e.value == "blocks.0.up"]
    assert len(calls) == 2
    bias = next(node for node in model.graph.node if calls[1].output[0] in node.input)
    bias.op_type = "Sub"
    onnx.save(model, tmp_path / "dense.onnx")
    dense = DenseOnnx(tmp_path / "dense.onnx")
    lynx = rewrite(dense, layers.plan, layers.weights, tmp_path / "lynx.onnx")
    assert {x.path: x.reason for x in lynx.dense} == {
        "blocks.0.up": "its bias is not added right behind its MatMul"
    }


def test_a_linear_of_another_dtype_stays_dense(layers: SimpleNamespace, tmp_path: Path) -> None:
    model = onnx.load(layers.dense.path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "blocks.1.narrow.weight")
    weight.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float64), weight.name)
    )
    narrow = next(node for node in model.graph.node if weight.name in node.input)
    wide = onnx.helper.make_node("Cast", [narrow.input[0]], ["wide"], to=onnx.TensorProto.DOUBLE)
    back = onnx.helper.make_node("Cast", ["narrow"], [narrow.output[0]], to=onnx.TensorProto.FLOAT)
    narrow.input[0], narrow.output[0] = "wide", "narrow"
    index = list(model.graph.node).index(narrow)
    model.graph.node.insert(index + 1, back)
    model.graph.node.insert(index, wide)
    onnx.save(model, tmp_path / "dense.onnx")
    lynx = rewrite(DenseOnnx(tmp_path / "dense.onnx"), layers.plan, layers.weights, tmp_path / "lynx.onnx")
    reason = "its weight is not float32 as those of other linears"
    assert {x.path: x.reason for x in lynx.dense} == {"blocks.1.narrow": reason}


# {configuration: (linears rewritten, nodes)}; what no result depends on is not in the graph.
CLASSES = {"CogView4": (12, 10), "Flux2": (14, 10), "Sana": (20, 13)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_candidate_of_a_class_is_rewritten_and_exact(name: str, tmp_path: Path) -> None:
    tiny = example(name)
    made = _rewritten(tiny.module, tiny.inputs, tmp_path)
    sparse = {linear for node in made.lynx.sparse for linear in node.linears}
    assert (len(sparse), len(made.lynx.nodes)) == CLASSES[name]
    assert sparse == {linear.path for linear in made.structure.candidates}
    model = onnx.load(made.lynx.path, load_external_data=False)
    assert sum(node.domain == DOMAIN for node in model.graph.node) == len(made.lynx.nodes)
    assert _error(made.dense, made.lynx, made.feed) < 1e-5
