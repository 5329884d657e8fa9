# SPDX-License-Identifier: Apache-2.0
"""Find linears in a dense ONNX graph, with the bias and the GELU behind them, or say why they do not fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from onnx import TensorProto
from onnx_graphsurgeon.logger import G_LOGGER

from lynx_compile.files.tensors import read_external
from lynx_compile.models.structure import Linear
from lynx_compile.ops.functions import LINEAR_KEY
from lynx_compile.ops.sparse_linear import GELU_ERF, GELU_TANH, SILU

ONNX_NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "DOUBLE",
}


G_LOGGER.severity = (
    G_LOGGER.ERROR
)  # it warns of every bf16 model that numpy has no bf16, which nothing here needs


@dataclass(frozen=True)
class DenseGraph:
    """A graph that ``export`` wrote, and what graphsurgeon does not carry of it or would change.

    ``linear_of``: {node name: module path}. ``scalars``: values of scalar constants; a bf16 constant whose value
    graphsurgeon is asked for becomes float32. ``ones``: names of the LayerNorms' scales that are 1 in every channel,
    which is how the exporter writes a LayerNorm without weights. ``dtype``: of the activations. ``foreign``: names of
    constants of another dtype.
    """

    graph: gs.Graph
    linear_of: dict[str, str]
    scalars: dict[str, float]
    ones: frozenset[str]
    dtype: torch.dtype
    foreign: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Match:
    """A call of a linear in the graph: what it reads, its nodes (product, bias), and those of a GELU behind it.

    ``activation``: which GELU; 0 where there is none.
    ``convolution``: its channels are in front of the pixels: [batch, channels, pixels ...].
    """

    x: gs.Variable
    nodes: tuple[gs.Node, ...]
    gelu: tuple[gs.Node, ...] = ()
    activation: int = 0
    convolution: bool = False

    @property
    def y(self) -> gs.Variable:
        """What it makes."""
        return (self.gelu or self.nodes)[-1].outputs[0]


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
        if initializer.name in norm_scales and _is_one(initializer, folder)
    )
    own = TensorProto.DataType.Value(ONNX_NAMES[dtype])
    foreign = frozenset(tensor.name for tensor in model.graph.initializer if tensor.data_type != own)
    return DenseGraph(gs.import_onnx(model), linear_of, scalars, ones, dtype, foreign)


def _is_one(initializer: onnx.TensorProto, folder: Path) -> bool:
    if onnx.external_data_helper.uses_external_data(initializer):
        return bool((read_external(initializer, folder) == 1).all())
    return bool((onnx.numpy_helper.to_array(initializer).astype(np.float32) == 1).all())


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
        found = [_match_one(product, linear, dense) for product in products[linear.path]]
        if not found:
            reasons[linear.path] = (
                "the graph does not hold it: its result is constant, or nothing that the model returns depends on it"
            )
        elif refusals := [reason for reason in found if isinstance(reason, str)]:
            reasons[linear.path] = refusals[0]
        else:
            matches[linear.path] = tuple(_with_gelu(one, dense) for one in found if isinstance(one, Match))
    return matches, reasons


def _match_one(product: gs.Node, linear: Linear, dense: DenseGraph) -> Match | str:
    """The pattern at one MatMul, Gemm or Conv, or the reason why it does not fit."""
    x, weight, *bias = product.inputs
    y = product.outputs[0]
    constant = _constant(weight)
    if constant is None:
        return "its weight is no constant of the graph"
    if constant.name in dense.foreign:
        return f"its weight is not {str(dense.dtype).removeprefix('torch.')} as those of other linears"
    if product.op == "Gemm":
        attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0} | product.attrs
        if (attributes["alpha"], attributes["beta"], attributes["transA"]) != (1.0, 1.0, 0):
            return "its Gemm scales or transposes an operand"
        return Match(x, (product,)) if bool(bias) == linear.bias else "its bias is not in its Gemm"
    if product.op == "Conv":
        return _match_convolution(product)
    if not linear.bias:
        return Match(x, (product,))
    if len(y.outputs) != 1 or y in dense.graph.outputs or y.outputs[0].op != "Add":
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


def _constant(weight: gs.Tensor) -> gs.Constant | None:
    """A constant, or that of which ``weight`` is the Transpose."""
    if len(weight.inputs) == 1 and weight.inputs[0].op == "Transpose":
        weight = weight.inputs[0].inputs[0]
    return weight if isinstance(weight, gs.Constant) else None


# How the exporter writes activations of y, step by step behind it: each op's second operand is a constant or y itself.
STEPS: dict[int, tuple[tuple[str, float | str | None], ...]] = {
    GELU_TANH: (  # 0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))
        ("Pow", 3.0), ("Mul", 0.044715), ("Add", "y"), ("Mul", (2 / np.pi) ** 0.5), ("Tanh", None), ("Add", 1.0),
        ("Mul", 0.5), ("Mul", "y"),
    ),
    GELU_ERF: (("Div", 2**0.5), ("Erf", None), ("Add", 1.0), ("Mul", 0.5), ("Mul", "y")),
    SILU: (("Sigmoid", None), ("Mul", "y")),
}  # fmt: skip
IN_ORDER = ("Pow", "Div")  # of those ops, the ones that do not commute


def _with_gelu(match: Match, dense: DenseGraph) -> Match:
    """The match with the GELU behind it, if there is one and it is all that reads the linear."""
    for activation in (GELU_TANH, GELU_ERF):
        chain = activation_of(match.y, activation, dense)
        others = {id(reader) for reader in match.y.outputs} - {id(step) for step in chain}
        if chain and not others and match.y not in dense.graph.outputs:
            return replace(match, gelu=tuple(chain), activation=activation)
    return match


def activation_of(y: gs.Variable, activation: int, dense: DenseGraph) -> list[gs.Node]:
    """The nodes that make the activation of ``y``; none where it is not there or others read its inner values."""
    value = y
    chain: list[gs.Node] = []
    for op, operand in STEPS[activation]:
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
    if right is value and op not in IN_ORDER:
        left, right = right, left
    if operand == "y":
        return left is value and right is y
    return left is value and dense.scalars.get(right.name) == torch.tensor(operand, dtype=dense.dtype).item()
