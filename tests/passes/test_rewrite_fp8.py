# SPDX-License-Identifier: Apache-2.0
"""FP8 nodes of a rewritten graph: each form, what it makes of x itself, and what its weights are packed to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from lynx_compile.models.structure import LinearGroup, find_structure
from lynx_compile.ops.fp8 import E4M3, Rounded, fp8_linear, round_rows, unpack
from lynx_compile.ops.fp8_functions import FP8_GATED_OP, FP8_OP, FP8_WEIGHT_OP
from lynx_compile.ops.functions import DOMAIN
from lynx_compile.ops.sparse_linear import APART, GATE_FIRST, X_FIRST, keep_mask
from lynx_compile.passes import rewrite as rewrite_module
from lynx_compile.passes.export import DenseOnnx, export_module
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.recipe import NodeOperand
from lynx_compile.tools.linear_graphs import linear_graphs

from .exact import SIZE, Layers, fp8_plan, fp8_weights

BATCH, TOKENS, CHANNELS, HIDDEN = 2, 6, 80, 144
OPERANDS: tuple[NodeOperand, ...] = ("none", "weight", "activation")


class Block(torch.nn.Module):
    """A modulated norm in front of q, k, v; a GELU as an epilogue and one as a producer; SiLU with its gate."""

    def __init__(self) -> None:
        super().__init__()
        names = {"q": 64, "k": 64, "v": 72, "up": HIDDEN, "wide": CHANNELS, "silu": HIDDEN, "gate": HIDDEN}
        inner = {name: torch.nn.Linear(CHANNELS, n) for name, n in names.items()}
        inner |= {name: torch.nn.Linear(HIDDEN, CHANNELS) for name in ("down", "gated_down")}
        inner["gelu_down"] = torch.nn.Linear(CHANNELS, CHANNELS)
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(inner)])
        self.norm = torch.nn.LayerNorm(CHANNELS, elementwise_affine=False, eps=1e-6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (block,) = self.blocks
        normed = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        attended = torch.cat([block[name](normed) for name in ("q", "k", "v")], -1)
        down = block["down"](functional.gelu(block["up"](x), approximate="tanh"))
        middle = block["wide"](normed) + x
        gelu_down = block["gelu_down"](functional.gelu(middle, approximate="tanh"))
        silu, gate = block["silu"](gelu_down), block["gate"](gelu_down)
        gated = block["gated_down"](functional.silu(silu) * gate)
        return attended, down, gated, middle


def block_inputs() -> dict[str, torch.Tensor]:
    """Tokens of all sizes."""
    x = torch.randn(BATCH, TOKENS, CHANNELS) * torch.logspace(-1, 1, TOKENS)[:, None]
    return {"x": x, "scale": 0.3 * torch.randn(BATCH, CHANNELS), "shift": 0.3 * torch.randn(BATCH, CHANNELS)}


@dataclass(frozen=True)
class Case:
    module: torch.nn.Module
    groups: tuple[LinearGroup, ...]
    dense: DenseOnnx
    feed: Mapping[str, np.ndarray]
    folder: Path

    def rewrite(self, operand_of: Callable[[str], NodeOperand], **options: bool) -> LynxOnnx:
        plan = fp8_plan(self.groups, operand_of)
        weights = fp8_weights(self.module, plan, self.folder)
        return rewrite(self.dense, plan, weights, self.folder / "lynx.onnx", **options)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    module = Block().eval().requires_grad_(False)
    inputs = block_inputs()
    folder = tmp_path_factory.mktemp("block")
    dense = export_module(module, inputs, folder / "dense.onnx")
    feed = {name: value.numpy() for name, value in inputs.items()}
    return Case(module, find_structure(module, inputs).groups, dense, feed, folder)


def _run(
    model: Path | bytes, feed: Mapping[str, np.ndarray], outputs: list[str] | None = None
) -> list[np.ndarray]:
    return list(ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(outputs, dict(feed)))


def _errors(case: Case, lynx: LynxOnnx) -> list[float]:
    pairs = zip(_run(case.dense.path, case.feed), _run(lynx.path, case.feed), strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs]


def _nodes(lynx: LynxOnnx) -> dict[str, onnx.NodeProto]:
    """By the last part of the first of its linears' paths."""
    nodes = {
        n.name: n for n in onnx.load(lynx.path, load_external_data=False).graph.node if n.domain == DOMAIN
    }
    return {node.linears[0].split(".")[-1]: nodes[node.name] for node in lynx.sparse}


@pytest.mark.parametrize("operand", OPERANDS)
def test_every_form_is_rewritten_with_its_producers(block: Case, operand: NodeOperand) -> None:
    lynx = block.rewrite(lambda _: operand)
    base = FP8_WEIGHT_OP if operand == "weight" else FP8_OP
    ops = {name: node.op_type for name, node in _nodes(lynx).items()}
    prefixes = {"q": "Norm", "up": "", "down": "", "gelu_down": "Gelu", "silu": "", "gated_down": "Gated"}
    assert ops == {name: base.replace("Lynx", f"Lynx{prefix}") for name, prefix in prefixes.items()}
    assert {node.operand for node in lynx.sparse} == {operand} and all(node.fp8 for node in lynx.sparse)
    assert lynx.dense == ()
    fields = {
        "": (),
        "Norm": (),
        "Gelu": ("producer_activation",),
        "Gated": ("producer_activation", "halves"),
    }
    assert lynx.plugins == {base.replace("Lynx", f"Lynx{prefix}"): fields[prefix] for prefix in fields}
    onnx.checker.check_model(lynx.path, full_check=True)
    bound = 0.1 if operand == "none" else 1
    assert all(0.005 < error < bound for error in _errors(block, lynx)[:3])


def test_a_norm_that_cannot_be_taken_in_is_left(block: Case) -> None:
    """Readers of one tensor in two forms are two nodes, which both round it, and neither can make it."""
    lynx = block.rewrite(lambda path: "none" if path.endswith((".q", ".k")) else "weight")
    nodes = _nodes(lynx)
    assert (nodes["q"].op_type, nodes["v"].op_type) == (FP8_OP, FP8_WEIGHT_OP)
    assert nodes["q"].input[0] == nodes["v"].input[0]
    names = {node.linears for node in lynx.sparse if node.linears[0].split(".")[-1] in ("q", "v")}
    assert {tuple(path.split(".")[-1] for path in linears) for linears in names} == {
        ("q", "k"),
        ("v", "wide"),
    }
    assert all(error < 1 for error in _errors(block, lynx)[:3])


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    own = {a.name: a.i for a in node.attribute}
    return {name: own[name] for name in ("activation", "activation_from", "gated")} | {
        "prune": own.get("prune", 0)
    }


def _weight(
    node: onnx.NodeProto, tensors: Mapping[str, torch.Tensor], channels: int, out_channels: int
) -> Rounded:
    """Out of the words that the node reads."""
    packed = [tensors[name] for name in node.input[1:]]
    assert packed[0].dtype == torch.int32
    values = packed[0].view(torch.uint8).view(E4M3)
    weight, scale = (unpack(values, packed[1]), packed[2]) if len(packed) > 3 else (values, packed[1])
    return Rounded(weight.view(torch.uint8)[:out_channels, :channels].view(E4M3), scale)


@pytest.mark.parametrize("operand", OPERANDS)
def test_each_node_equals_the_definition_on_the_same_input(
    block: Case, operand: NodeOperand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite_module, "find_producer", lambda x, dense: None)
    lynx = block.rewrite(lambda _: operand)
    model = onnx.load(lynx.path)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    wanted = [name for node in nodes for name in (node.input[0], node.output[0])]
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(oh.make_empty_tensor_value_info(name) for name in wanted if name not in known)
    values = _run(model.SerializeToString(), block.feed, wanted)
    tensors = load_file(lynx.weights_path)
    for node, x, y in zip(nodes, values[::2], values[1::2], strict=True):
        options, bias = _attributes(node), tensors[node.input[-1]]
        weight = _weight(node, tensors, x.shape[-1], len(bias))
        assert len(bias) == (2 if options["gated"] else 1) * y.shape[-1]
        assert weight.scale.shape == (len(bias),) and weight.scale.dtype == torch.float32
        assert options.pop("prune") == (operand == "activation")
        gated = bool(options.pop("gated"))
        expected = fp8_linear(
            torch.from_numpy(x), weight, bias, prune=operand == "activation", gated=gated, **options
        ).numpy()
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("operand", ["none", "weight"])
def test_weights_are_the_linears_own_in_their_nodes_order(block: Case, operand: NodeOperand) -> None:
    lynx = block.rewrite(lambda _: operand)
    nodes, tensors = _nodes(lynx), load_file(lynx.weights_path)
    for node in lynx.sparse:
        learned = torch.cat([block.module.get_submodule(path).weight for path in node.linears])
        wanted = round_rows(learned, keep_mask(learned) if operand == "weight" else None)
        name = node.linears[0].split(".")[-1]
        behind = {"layer norm": 2, "gated": 1}.get(node.producer or "", 0)  # gain and shift, or a gate
        del nodes[name].input[len(nodes[name].input) - behind :]
        found = _weight(nodes[name], tensors, node.in_channels, node.out_channels)
        assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
        assert torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("operand", OPERANDS)
def test_nodes_that_make_x_equal_those_that_are_given_it(
    block: Case, operand: NodeOperand, monkeypatch: pytest.MonkeyPatch
) -> None:
    lynx = block.rewrite(lambda _: operand)
    assert {node.producer for node in lynx.sparse} == {None, "layer norm", "gelu", "gated"}
    made = _run(lynx.path, block.feed)
    monkeypatch.setattr(rewrite_module, "find_producer", lambda x, dense: None)
    given = _run(block.rewrite(lambda _: operand).path, block.feed)
    for a, b in zip(made, given, strict=True):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)  # but for a value between two e4m3


def test_external_weights_become_inputs_with_the_same_result(block: Case) -> None:
    embedded = _run(block.rewrite(lambda _: "weight").path, block.feed)
    lynx = block.rewrite(lambda _: "weight", external=True)
    tensors = load_file(lynx.weights_path)
    assert len(lynx.external_inputs) == 4 * len(lynx.sparse)
    feed = dict(block.feed) | {name: tensors[name].numpy() for name in lynx.external_inputs}
    for a, b in zip(embedded, _run(lynx.path, feed), strict=True):
        np.testing.assert_array_equal(a, b)


class Halves(torch.nn.Module):
    """SiLU and gate as halves of one linear's result, in either order, or thirds."""

    def __init__(self, order: str) -> None:
        super().__init__()
        parts = 3 if order == "thirds" else 2
        inner = {"up": torch.nn.Linear(CHANNELS, parts * HIDDEN), "down": torch.nn.Linear(HIDDEN, CHANNELS)}
        self.blocks, self.order = torch.nn.ModuleList([torch.nn.ModuleDict(inner)]), order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (block,) = self.blocks
        first, second, *_ = block["up"](x).split(HIDDEN, -1)
        if self.order == "gate first":
            first, second = second, first
        return block["down"](functional.silu(first) * second)


@pytest.mark.parametrize(
    ("order", "halves"), [("gate last", X_FIRST), ("gate first", GATE_FIRST), ("thirds", APART)]
)
def test_silu_and_gate_are_taken_in(order: str, halves: int, tmp_path: Path) -> None:
    """By the node behind; its halves are one input where they lie in one tensor."""
    torch.manual_seed(0)
    module = Halves(order).eval().requires_grad_(False)
    inputs = {"x": torch.randn(BATCH, TOKENS, CHANNELS)}
    dense = export_module(module, inputs, tmp_path / "dense.onnx")
    feed = {"x": inputs["x"].numpy()}
    case = Case(module, find_structure(module, inputs).groups, dense, feed, tmp_path)
    lynx = case.rewrite(lambda _: "none")
    assert [node.producer for node in lynx.sparse] == [None, "gated"]
    node = _nodes(lynx)["down"]
    assert node.op_type == FP8_GATED_OP and next(a.i for a in node.attribute if a.name == "halves") == halves
    left = {node.op_type for node in onnx.load(lynx.path, load_external_data=False).graph.node}
    assert ("Split" in left) == (halves == APART)
    assert all(error < 0.06 for error in _errors(case, lynx))


def test_compare_finds_the_results_of_halves_that_one_node_reads(block: Case) -> None:
    """The graphs of ``compare``: every linear, on the dense model's own inputs."""
    lynx = block.rewrite(lambda _: "none")
    manifest: Any = SimpleNamespace(
        sparse=[SimpleNamespace(layer=node.name, **vars(node)) for node in lynx.sparse]
    )
    (part,) = linear_graphs(block.dense.path, lynx.path, manifest, 8.0, block.folder)
    assert sorted(part.linears.values()) == sorted(path for node in lynx.sparse for path in node.linears)
    names = list(part.linears)
    for y_dense, y in zip(
        _run(part.dense, block.feed, names), _run(part.lynx, block.feed, names), strict=True
    ):
        assert y.shape == y_dense.shape and np.linalg.norm(y - y_dense) < 0.06 * np.linalg.norm(y_dense)


@pytest.mark.parametrize("operand", OPERANDS)
def test_repeated_calls_and_convolutions(operand: NodeOperand, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Layers().eval().requires_grad_(False)
    inputs = {"step": torch.ones(1, dtype=torch.int64)}
    inputs |= {"image": torch.randn(2, 8, SIZE), "text": torch.randn(2, 3, SIZE)}
    dense = export_module(module, inputs, tmp_path / "dense.onnx")
    feed = {name: value.numpy() for name, value in inputs.items()}
    case = Case(module, find_structure(module, inputs).groups, dense, feed, tmp_path)
    lynx = case.rewrite(lambda _: operand)
    names = {node.name: node for node in lynx.sparse}
    op = FP8_WEIGHT_OP if operand == "weight" else FP8_OP
    assert {f"blocks.0.up.{op}", f"blocks.0.up.{op}.2", f"blocks.1.wide.{op}"} < names.keys()
    model = onnx.load(lynx.path, load_external_data=False)
    twice = [
        node for node in model.graph.node if node.name.startswith("blocks.0.up.") and node.domain == DOMAIN
    ]
    assert len(twice) == 2 and list(twice[0].input)[1:] == list(twice[1].input)[1:]
    assert all(0 < error < (0.1 if operand == "none" else 1) for error in _errors(case, lynx))
