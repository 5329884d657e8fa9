# SPDX-License-Identifier: Apache-2.0
"""Find linears in a dense ONNX graph, with the bias and the GELU behind them, or say why they do not fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from lynx_compile.export import LINEAR_KEY
from lynx_compile.models import Linear


@dataclass(frozen=True)
class DenseGraph:
    """A graph that ``export`` wrote, and what graphsurgeon does not carry of it or would change.

    ``linear_of``: {node name: module path}. ``scalars``: values of scalar constants; a bf16 constant whose value
    graphsurgeon is asked for becomes float32. ``dtype``: of the activations.
    """

    graph: gs.Graph
    linear_of: dict[str, str]
    scalars: dict[str, float]
    dtype: torch.dtype


@dataclass(frozen=True)
class Match:
    """A linear in the graph: what it reads, what it makes, and the nodes in between (product, bias, GELU)."""

    x: gs.Variable
    y: gs.Variable
    nodes: tuple[gs.Node, ...]
    gelu: bool = False


def import_graph(model: onnx.ModelProto, dtype: torch.dtype) -> DenseGraph:
    """Import ``model``, whose activations have ``dtype``."""
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
    return DenseGraph(gs.import_onnx(model), linear_of, scalars, dtype)


def match(dense: DenseGraph, linears: Sequence[Linear]) -> tuple[dict[str, Match], dict[str, str]]:
    """Find each linear's nodes; those not found come with a reason."""
    products: dict[str, list[gs.Node]] = defaultdict(list)
    for node in dense.graph.nodes:
        if node.name in dense.linear_of:
            products[dense.linear_of[node.name]].append(node)
    matches: dict[str, Match] = {}
    reasons: dict[str, str] = {}
    for linear in linears:
        found = products[linear.path]
        if len(found) != 1:
            reasons[linear.path] = f"the graph holds {len(found)} matrix products of it, not one"
        elif isinstance(one := _match_one(found[0], linear, dense.graph), str):
            reasons[linear.path] = one
        else:
            matches[linear.path] = _with_gelu(one, dense)
    return matches, reasons


def _match_one(product: gs.Node, linear: Linear, graph: gs.Graph) -> Match | str:
    """The pattern at one MatMul or Gemm, or the reason why it does not fit."""
    x, weight, *bias = product.inputs
    y = product.outputs[0]
    if not _is_weight(weight):
        return "its weight is no constant of the graph"
    if product.op == "Gemm":
        attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0} | product.attrs
        if (attributes["alpha"], attributes["beta"], attributes["transA"]) != (1.0, 1.0, 0):
            return "its Gemm scales or transposes an operand"
        return Match(x, y, (product,)) if bool(bias) == linear.bias else "its bias is not in its Gemm"
    if not linear.bias:
        return Match(x, y, (product,))
    if len(y.outputs) != 1 or y in graph.outputs or y.outputs[0].op != "Add":
        return "its bias is not added right behind its MatMul"
    add = y.outputs[0]
    other = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
    if not isinstance(other, gs.Constant) or tuple(other.shape) != (linear.out_channels,):
        return "what is added behind its MatMul is not its bias"
    return Match(x, add.outputs[0], (product, add))


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
    y = value = match.y
    chain: list[gs.Node] = []
    for op, operand in GELU:
        step = next((node for node in value.outputs if _is_step(node, op, value, operand, y, dense)), None)
        if step is None or value in dense.graph.outputs or (chain and len(value.outputs) != 1):
            return match
        chain.append(step)
        value = step.outputs[0]
    if {id(reader) for reader in y.outputs} - {id(step) for step in chain}:
        return match
    return replace(match, y=value, nodes=(*match.nodes, *chain), gelu=True)


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
