# SPDX-License-Identifier: Apache-2.0
"""Find what makes a tensor of a dense ONNX graph, where an op can do that itself.

Recognised are, each where nothing else reads the tensor or what lies in between::

    LayerNormalization ── * gain ── + shift        gain and shift: a row for all tokens, or for each sample (adaLN);
    Mul(x, 1 / sqrt(mean(x^2) + e)) ── * gain ──   either may be missing, and a norm may have weights of its own
    GELU in its tanh form
    SiLU(x) ── * gate                              of two linears, or of two halves of one

A norm that the exporter wrote with Casts to float32 is one as well: the op computes in float32 and rounds once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from lynx_compile.passes.match import DenseGraph, gelu_of

Producer = Literal["layer norm", "rms norm", "gelu", "gated"]


@dataclass(frozen=True)
class Produced:
    """A tensor that an op can make itself from ``x``.

    Of a norm, it is to be multiplied by all of ``gains`` and ``shift`` is to be added; they have one row or ``rows``.
    ``epsilon`` is its own. ``gate``: of a SiLU.
    """

    producer: Producer
    x: gs.Variable
    gains: tuple[gs.Tensor, ...] = ()
    shift: gs.Tensor | None = None
    rows: int = 1
    epsilon: float = 0.0
    gate: gs.Variable | None = None


def find_producer(x: gs.Variable, dense: DenseGraph) -> Produced | None:
    """How ``x`` is made, where an op can do it and nothing else reads ``x`` or what lies in between."""
    found = _find_norm(x, dense) or _find_gated(x, dense) or _find_gelu(x, dense)
    return found if found is not None and (found.x.dtype, found.x.shape) == (x.dtype, x.shape) else None


def with_halves(produced: Produced) -> Produced | None:
    """For an op whose SiLU and gate are the first and the second half of one tensor; None where they are not that."""
    if produced.producer != "gated":
        return produced
    whole = _whole_of(produced.x, produced.gate)
    return None if whole is None else replace(produced, x=whole, gate=None)


def _whole_of(first: gs.Variable, second: gs.Variable | None) -> gs.Variable | None:
    """The tensor that a Split over the last axis makes ``first`` and ``second`` of, and nothing else; of one shape."""
    split = first.inputs[0] if len(first.inputs) == 1 else None
    if split is None or split.op != "Split" or first.shape is None:
        return None
    if split.attrs.get("axis", 0) not in (-1, len(first.shape) - 1):
        return None
    if len(split.outputs) != 2 or split.outputs[0] is not first or split.outputs[1] is not second:
        return None
    whole = split.inputs[0]
    return whole if isinstance(whole, gs.Variable) else None


def _find_norm(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    """Norm ── Mul(gain) ── Add(shift); the last, or both, may be missing."""
    for scaled, shift in _either_way(_maker(z, dense), "Add"):
        made = _find_scaled(scaled, dense)
        if made is None or made.shift is not None:
            continue
        rows = _rows(shift, made.x)
        if rows is not None and rows == made.rows:
            return replace(made, shift=shift)
    return _find_scaled(z, dense)


def _find_scaled(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    """A norm, with its weights or without, ── Mul(gain), which may be missing or be weights of its own."""
    z = _operand(z, "Cast", dense) or z
    for normed, gain in _either_way(_maker(z, dense), "Mul"):
        made = _find_scaled(normed, dense)
        if made is None or made.shift is not None:
            continue
        rows = _rows(gain, made.x)
        if rows is not None and 1 in (rows, made.rows):
            return replace(made, gains=(*made.gains, gain), rows=max(rows, made.rows))
    return _find_layer_norm(z, dense) or _find_rms_norm(z, dense)


def _find_layer_norm(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    """LayerNormalization over the last axis, in float32, that makes nothing else; its weights count where they are."""
    norm = _maker(z, dense)
    if norm is None or norm.op != "LayerNormalization" or len(norm.outputs) != 1:
        return None
    x, scale, *bias = norm.inputs
    attributes = {"axis": -1, "stash_type": 1} | norm.attrs
    if x.shape is None or attributes["axis"] not in (-1, len(x.shape) - 1) or attributes["stash_type"] != 1:
        return None
    gains = () if scale.name in dense.ones else (scale,)
    if any(_rows(tensor, x) != 1 for tensor in (*gains, *bias)):
        return None
    epsilon = float(norm.attrs.get("epsilon", 1e-5))
    return Produced("layer norm", x, gains, bias[0] if bias else None, epsilon=epsilon)


def _find_rms_norm(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    """Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), epsilon))))."""
    for wide, inverse in _either_way(_maker(z, dense), "Mul"):
        root = _operand(inverse, "Reciprocal", dense)
        shifted = _operand(root, "Sqrt", dense)
        for mean, epsilon in _either_way(_maker(shifted, dense), "Add"):
            squares = _mean_of(mean, dense)
            square = _maker(squares, dense)
            if square is None or square.op != "Pow" or epsilon.name not in dense.scalars:
                continue
            base, power = square.inputs
            x = _source(wide)
            if x is not None and _source(base) is x and dense.scalars.get(power.name) == 2:
                return Produced("rms norm", x, epsilon=dense.scalars[epsilon.name])
    return None


def _mean_of(tensor: gs.Tensor, dense: DenseGraph) -> gs.Tensor | None:
    """What ``tensor`` is the mean of over the last axis, which stays."""
    mean = _maker(tensor, dense)
    if mean is None or mean.op != "ReduceMean" or not mean.attrs.get("keepdims", 1) or len(mean.inputs) != 2:
        return None
    x, axes = mean.inputs
    if x.shape is None or not isinstance(axes, gs.Constant):
        return None
    return x if np.ravel(axes.values).tolist() in ([-1], [len(x.shape) - 1]) else None


def _find_gated(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    """x, Sigmoid(x) ── Mul ── Mul(gate)."""
    for silu, gate in _either_way(_maker(z, dense), "Mul"):
        for x, sigmoid in _either_way(_maker(silu, dense), "Mul"):
            maker = _maker(sigmoid, dense)
            if maker is None or maker.op != "Sigmoid" or maker.inputs[0] is not x:
                continue
            if isinstance(gate, gs.Variable) and (gate.shape, gate.dtype) == (x.shape, x.dtype):
                return Produced("gated", x, gate=gate)
    return None


def _find_gelu(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    last = _maker(z, dense)
    for y, _ in _either_way(last, "Mul"):
        if isinstance(y, gs.Variable) and (chain := gelu_of(y, dense)) and chain[-1] is last:
            return Produced("gelu", y)
    return None


def _maker(tensor: gs.Tensor | None, dense: DenseGraph) -> gs.Node | None:
    """The node that makes ``tensor``, if one node alone reads it and it is no result of the graph."""
    if tensor is None or len(tensor.outputs) != 1 or len(tensor.inputs) != 1 or tensor in dense.graph.outputs:
        return None
    return tensor.inputs[0]


def _operand(tensor: gs.Tensor | None, op: str, dense: DenseGraph) -> gs.Tensor | None:
    """What ``tensor`` is ``op`` of, an op of one input."""
    maker = _maker(tensor, dense)
    return maker.inputs[0] if maker is not None and maker.op == op else None


def _source(tensor: gs.Tensor) -> gs.Variable | None:
    """What ``tensor`` is a Cast of, or itself; others may read it."""
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Cast":
        return tensor.inputs[0].inputs[0]
    return tensor if isinstance(tensor, gs.Variable) else None


def _either_way(node: gs.Node | None, op: str) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    """The two inputs of a commutative ``op`` in both orders; nothing where ``node`` is another one."""
    if node is not None and node.op == op:
        left, right = node.inputs
        yield left, right
        yield right, left


def _rows(tensor: gs.Tensor, x: gs.Variable) -> int | None:
    """How many rows ``tensor`` [..., K] has, if each serves as many consecutive tokens of ``x`` [..., K]; else None.

    So it is where it broadcasts over the inner dimensions of the tokens: [B, 1, K] over [B, S, K], but not [1, S, K].
    """
    if tensor.shape is None or x.shape is None or tensor.dtype != x.dtype:
        return None
    if not 0 < len(tensor.shape) <= len(x.shape) or tensor.shape[-1] != x.shape[-1]:
        return None
    if not all(isinstance(extent, int) for extent in tensor.shape):  # those of x may be open
        return None
    leading = (1,) * (len(x.shape) - len(tensor.shape)) + tuple(tensor.shape[:-1])
    unequal = (i for i, extent in enumerate(leading) if extent != x.shape[i])
    outer = next(unequal, len(leading))  # how many dimensions are the tokens' own
    return int(np.prod(leading)) if all(extent == 1 for extent in leading[outer:]) else None
