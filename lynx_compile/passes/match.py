# SPDX-License-Identifier: Apache-2.0
"""Find linears in a dense ONNX graph, with the bias and the GELU behind them, or say why they do not fit.

And find what makes a tensor, where an op can do that itself (``find_producer``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from lynx_compile.models.structure import Linear
from lynx_compile.passes.export import LINEAR_KEY

Producer = Literal["layer norm", "gelu", "gated"]


@dataclass(frozen=True)
class DenseGraph:
    """A graph that ``export`` wrote, and what graphsurgeon does not carry of it or would change.

    ``linear_of``: {node name: module path}. ``scalars``: values of scalar constants; a bf16 constant whose value
    graphsurgeon is asked for becomes float32. ``ones``: names of the LayerNorms' scales that are 1 in every channel,
    which is how the exporter writes a LayerNorm without weights. ``dtype``: of the activations.
    """

    graph: gs.Graph
    linear_of: dict[str, str]
    scalars: dict[str, float]
    ones: frozenset[str]
    dtype: torch.dtype


@dataclass(frozen=True)
class Match:
    """A call of a linear in the graph: what it reads, its nodes (product, bias), and those of a GELU behind it.

    ``convolution``: its channels are in front of the pixels: [batch, channels, pixels ...].
    """

    x: gs.Variable
    nodes: tuple[gs.Node, ...]
    gelu: tuple[gs.Node, ...] = ()
    convolution: bool = False

    @property
    def y(self) -> gs.Variable:
        """What it makes."""
        return (self.gelu or self.nodes)[-1].outputs[0]


@dataclass(frozen=True)
class Produced:
    """A tensor that an op can make itself, from ``x`` and ``others`` (gain and shift of a norm, the gate of a SiLU)."""

    producer: Producer
    x: gs.Variable
    others: tuple[gs.Variable, ...] = ()
    epsilon: float = 0.0


def import_graph(model: onnx.ModelProto, dtype: torch.dtype, folder: Path) -> DenseGraph:
    """Import ``model``, whose activations have ``dtype``, with its external data in ``folder``."""
    linear_of = {
        node.name: entry.value
        for node in model.graph.node
        for entry in node.metadata_props
        if entry.key == LINEAR_KEY
    }
    scalars = {
        initializer.name: float(onnx.numpy_helper.to_array(initializer))
        for initializer in model.graph.initializer
        if not initializer.dims and not onnx.external_data_helper.uses_external_data(initializer)
    }
    norm_scales = {node.input[1] for node in model.graph.node if node.op_type == "LayerNormalization"}
    ones = frozenset(
        initializer.name
        for initializer in model.graph.initializer
        if initializer.name in norm_scales
        and (onnx.numpy_helper.to_array(initializer, str(folder)).astype(np.float32) == 1).all()
    )
    return DenseGraph(gs.import_onnx(model), linear_of, scalars, ones, dtype)


def match(
    dense: DenseGraph, linears: Sequence[Linear]
) -> tuple[dict[str, tuple[Match, ...]], dict[str, str]]:
    """Find every call of each linear; a linear of which one is not found, or does not fit, comes with a reason."""
    products: dict[str, list[gs.Node]] = defaultdict(list)
    for node in dense.graph.nodes:
        if node.name in dense.linear_of:
            products[dense.linear_of[node.name]].append(node)
    matches: dict[str, tuple[Match, ...]] = {}
    reasons: dict[str, str] = {}
    for linear in linears:
        found = [_match_one(product, linear, dense.graph) for product in products[linear.path]]
        if not found:
            reasons[linear.path] = "the graph does not hold it: nothing that the model returns depends on it"
        elif refusals := [reason for reason in found if isinstance(reason, str)]:
            reasons[linear.path] = refusals[0]
        else:
            matches[linear.path] = tuple(_with_gelu(one, dense) for one in found if isinstance(one, Match))
    return matches, reasons


def find_producer(x: gs.Variable, dense: DenseGraph) -> Produced | None:
    """How ``x`` is made, where an op can do it and nothing else reads ``x`` or what lies in between.

    Recognised are LayerNorm without weights ── * gain ── + shift (adaLN), GELU in its tanh form, and SiLU * gate.
    """
    if len(x.outputs) != 1 or len(x.inputs) != 1 or x in dense.graph.outputs:
        return None
    last = x.inputs[0]
    return _find_norm(last, dense) or _find_gated(last, dense) or _find_gelu(last, dense)


def _match_one(product: gs.Node, linear: Linear, graph: gs.Graph) -> Match | str:
    """The pattern at one MatMul, Gemm or Conv, or the reason why it does not fit."""
    x, weight, *bias = product.inputs
    y = product.outputs[0]
    if not _is_weight(weight):
        return "its weight is no constant of the graph"
    if product.op == "Gemm":
        attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0} | product.attrs
        if (attributes["alpha"], attributes["beta"], attributes["transA"]) != (1.0, 1.0, 0):
            return "its Gemm scales or transposes an operand"
        return Match(x, (product,)) if bool(bias) == linear.bias else "its bias is not in its Gemm"
    if product.op == "Conv":
        return _match_convolution(product)
    if not linear.bias:
        return Match(x, (product,))
    if len(y.outputs) != 1 or y in graph.outputs or y.outputs[0].op != "Add":
        return "its bias is not added right behind its MatMul"
    add = y.outputs[0]
    other = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
    if not isinstance(other, gs.Constant) or tuple(other.shape) != (linear.out_channels,):
        return "what is added behind its MatMul is not its bias"
    return Match(x, (product, add))


def _match_convolution(product: gs.Node) -> Match | str:
    x, weight = product.inputs[:2]
    pixels = len(weight.shape) - 2
    attributes = {"strides": [1] * pixels, "pads": [0] * 2 * pixels, "group": 1} | product.attrs
    if set(weight.shape[2:]) | set(attributes["strides"]) | {attributes["group"]} != {1}:
        return "its Conv is not of kernel 1 over all channels"
    if any(attributes["pads"]) or attributes.get("auto_pad", "NOTSET") != "NOTSET":
        return "its Conv pads its input"
    if x.shape is None or len(x.shape) != 2 + pixels:
        return "the shape of what its Conv reads is not known"
    return Match(x, (product,), convolution=True)


def _is_weight(tensor: gs.Tensor) -> bool:
    """A constant, or the Transpose of one."""
    if isinstance(tensor, gs.Constant):
        return True
    return (
        len(tensor.inputs) == 1
        and tensor.inputs[0].op == "Transpose"
        and isinstance(tensor.inputs[0].inputs[0], gs.Constant)
    )


# How the exporter writes GELU's tanh form, 0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))), step by step behind y:
# each op's second operand is a constant or y itself.
GELU = (
    ("Pow", 3.0), ("Mul", 0.044715), ("Add", "y"), ("Mul", (2 / np.pi) ** 0.5), ("Tanh", None), ("Add", 1.0),
    ("Mul", 0.5), ("Mul", "y"),
)  # fmt: skip


def _with_gelu(match: Match, dense: DenseGraph) -> Match:
    """The match with the GELU behind it, if there is one and it is all that reads the linear."""
    chain = _gelu_of(match.y, dense)
    others = {id(reader) for reader in match.y.outputs} - {id(step) for step in chain}
    return match if others or match.y in dense.graph.outputs else replace(match, gelu=tuple(chain))


def _gelu_of(y: gs.Variable, dense: DenseGraph) -> list[gs.Node]:
    """The nodes that make GELU of ``y``; none where there is no GELU, or where its inner values have other readers."""
    value = y
    chain: list[gs.Node] = []
    for op, operand in GELU:
        step = next((node for node in value.outputs if _is_step(node, op, value, operand, y, dense)), None)
        if step is None or (chain and (len(value.outputs) != 1 or value in dense.graph.outputs)):
            return []
        chain.append(step)
        value = step.outputs[0]
    return chain


def _is_step(
    node: gs.Node, op: str, value: gs.Variable, operand: float | str | None, y: gs.Variable, dense: DenseGraph
) -> bool:
    """Whether ``node`` is ``op`` of ``value`` and ``operand``; constants compare as rounded to the graph's dtype."""
    if node.op != op or len(node.inputs) != 1 + (operand is not None):
        return False
    if operand is None:
        return True
    left, right = node.inputs
    if right is value and op != "Pow":
        left, right = right, left
    if operand == "y":
        return left is value and right is y
    return left is value and dense.scalars.get(right.name) == torch.tensor(operand, dtype=dense.dtype).item()


def _find_norm(add: gs.Node, dense: DenseGraph) -> Produced | None:
    """LayerNormalization ── Mul(gain) ── Add(shift)."""
    for scaled, shift in _either_way(add, "Add"):
        for normed, gain in _either_way(_maker(scaled, dense), "Mul"):
            norm = _maker(normed, dense)
            if norm is None or norm.op != "LayerNormalization" or not _is_plain(norm, dense):
                continue
            x = norm.inputs[0]
            rows = _rows(gain, x)
            if rows is not None and rows == _rows(shift, x):
                return Produced("layer norm", x, (gain, shift), float(norm.attrs.get("epsilon", 1e-5)))
    return None


def _find_gated(product: gs.Node, dense: DenseGraph) -> Produced | None:
    """x, Sigmoid(x) ── Mul ── Mul(gate)."""
    for silu, gate in _either_way(product, "Mul"):
        for x, sigmoid in _either_way(_maker(silu, dense), "Mul"):
            maker = _maker(sigmoid, dense)
            if maker is None or maker.op != "Sigmoid" or maker.inputs[0] is not x:
                continue
            if isinstance(gate, gs.Variable) and (gate.shape, gate.dtype) == (x.shape, x.dtype):
                return Produced("gated", x, (gate,))
    return None


def _find_gelu(last: gs.Node, dense: DenseGraph) -> Produced | None:
    for y, _ in _either_way(last, "Mul"):
        if isinstance(y, gs.Variable) and (chain := _gelu_of(y, dense)) and chain[-1] is last:
            return Produced("gelu", y)
    return None


def _maker(tensor: gs.Tensor, dense: DenseGraph) -> gs.Node | None:
    """The node that makes ``tensor``, if one node alone reads it and it is no result of the graph."""
    if len(tensor.outputs) != 1 or len(tensor.inputs) != 1 or tensor in dense.graph.outputs:
        return None
    return tensor.inputs[0]


def _either_way(node: gs.Node | None, op: str) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    """The two inputs of a commutative ``op`` in both orders; nothing where ``node`` is another one."""
    if node is not None and node.op == op:
        left, right = node.inputs
        yield left, right
        yield right, left


def _is_plain(norm: gs.Node, dense: DenseGraph) -> bool:
    """Whether a LayerNormalization is over the last axis, in float32, without weights, and makes nothing else."""
    x, scale, *bias = norm.inputs
    attributes = {"axis": -1, "stash_type": 1} | norm.attrs
    return (
        x.shape is not None
        and attributes["axis"] in (-1, len(x.shape) - 1)
        and attributes["stash_type"] == 1
        and scale.name in dense.ones
        and not bias
        and len(norm.outputs) == 1
    )


def _rows(tensor: gs.Tensor, x: gs.Variable) -> int | None:
    """How many rows ``tensor`` [..., K] has, if each serves as many consecutive tokens of ``x`` [..., K]; else None.

    So it is where it broadcasts over the inner dimensions of the tokens: [B, 1, K] over [B, S, K], but not [1, S, K].
    """
    if not isinstance(tensor, gs.Variable) or tensor.shape is None or tensor.dtype != x.dtype:
        return None
    if not all(isinstance(extent, int) for extent in (*tensor.shape, *x.shape)):
        return None
    if not 0 < len(tensor.shape) <= len(x.shape) or tensor.shape[-1] != x.shape[-1]:
        return None
    leading = (1,) * (len(x.shape) - len(tensor.shape)) + tuple(tensor.shape[:-1])
    outer = int(
        np.argmin([*np.equal(leading, x.shape[:-1]), False])
    )  # how many dimensions are the tokens' own
    return int(np.prod(leading)) if all(extent == 1 for extent in leading[outer:]) else None
