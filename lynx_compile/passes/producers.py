# SPDX-License-Identifier: Apache-2.0
"""Find what makes a tensor of a dense ONNX graph, where an op can do that itself.

Recognised are, each where nothing else reads the tensor or what lies in between::

    LayerNormalization ── * gain ── + shift        gain and shift: a row for all tokens, or for each sample (adaLN);
    Mul(x, 1 / sqrt(mean(x^2) + e)) ── * gain ──   either may be missing, and a norm may have weights of its own
    GELU(x)                                        in its tanh form or by erf
    SiLU(x) ── * gate                              or a GELU; x and gate are two tensors, or the halves of one

A norm that the exporter wrote with Casts to float32 is one as well: the op computes in float32 and rounds once. Where
gain or shift are float32 in a half-precision model they are rounded to its dtype, in which the op reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from lynx_compile.ops.sparse_linear import APART, GATE_FIRST, GELU_ERF, GELU_TANH, X_FIRST
from lynx_compile.passes.match import STEPS, DenseGraph, activation_of
from lynx_compile.passes.sections import cut_of

Producer = Literal["layer norm", "rms norm", "gelu", "gated"]


@dataclass(frozen=True)
class Produced:
    """A tensor that an op can make itself from ``x``.

    Of a norm, it is to be multiplied by all of ``gains`` and ``shift`` is to be added; they have one row or ``rows``.
    ``epsilon`` is its own. ``activation``: of a GELU, or what ``gate`` multiplies. ``halves``: where ``x`` and ``gate``
    lie, as the op says; other than APART both are the tensor of which they are the halves.
    """

    producer: Producer
    x: gs.Variable
    gains: tuple[gs.Tensor, ...] = ()
    shift: gs.Tensor | None = None
    rows: int = 1
    epsilon: float = 0.0
    activation: int = 0
    gate: gs.Variable | None = None
    halves: int = APART


def find_producer(x: gs.Variable, dense: DenseGraph) -> Produced | None:
    """How ``x`` is made, where an op can do it and nothing else reads ``x`` or what lies in between."""
    found = _find_norm(x, dense) or _find_gated(x, dense) or _find_gelu(x, dense)
    if found is None or found.x.dtype != x.dtype:
        return None
    return found if found.halves or found.x.shape == x.shape else None


def _find_norm(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    """Norm ── Mul(gain) ── Add(shift); the last, or both, may be missing."""
    z = _operand(z, "Cast", dense) or z
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
    read, scale, *bias = norm.inputs
    x = _source(read)
    if x is None:
        return None
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
    """Activation(x) ── Mul(gate)."""
    for activated, gate in _either_way(_maker(z, dense), "Mul"):
        activation, x = _find_activation(activated, dense)
        if x is not None and isinstance(gate, gs.Variable) and (gate.shape, gate.dtype) == (x.shape, x.dtype):
            both, halves = _halves_of(x, gate)
            if halves:
                return Produced("gated", both, activation=activation, gate=both, halves=halves)
            return Produced("gated", x, activation=activation, gate=gate)
    return None


def _halves_of(x: gs.Variable, gate: gs.Variable) -> tuple[gs.Variable, int]:
    """The tensor that ``x`` and ``gate`` are the halves of, and in which order; x and APART where they are not."""
    first, second = cut_of(x), cut_of(gate)
    if first is None or second is None or first.whole is not second.whole:
        return x, APART
    if first.whole.shape[-1] != 2 * x.shape[-1] or {first.first, second.first} != {0, x.shape[-1]}:
        return x, APART
    return first.whole, X_FIRST if first.first == 0 else GATE_FIRST


def _find_gelu(z: gs.Tensor, dense: DenseGraph) -> Produced | None:
    activation, y = _find_activation(z, dense)
    return Produced("gelu", y, activation=activation) if y and activation in (GELU_TANH, GELU_ERF) else None


def _find_activation(z: gs.Tensor, dense: DenseGraph) -> tuple[int, gs.Variable | None]:
    """Which activation ``z`` is, and of what; all of them end in a product with that."""
    last = _maker(z, dense)
    for y, _ in _either_way(last, "Mul"):
        for activation in STEPS if isinstance(y, gs.Variable) else ():
            if (chain := activation_of(y, activation, dense)) and chain[-1] is last:
                return activation, y
    return 0, None


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
    if tensor.shape is None or x.shape is None or tensor.dtype not in (x.dtype, np.float32):
        return None
    if not 0 < len(tensor.shape) <= len(x.shape) or tensor.shape[-1] != x.shape[-1]:
        return None
    if not all(isinstance(extent, int) for extent in tensor.shape):  # those of x may be open
        return None
    leading = (1,) * (len(x.shape) - len(tensor.shape)) + tuple(tensor.shape[:-1])
    unequal = (i for i, extent in enumerate(leading) if extent != x.shape[i])
    outer = next(unequal, len(leading))  # how many dimensions are the tokens' own
    return int(np.prod(leading)) if all(extent == 1 for extent in leading[outer:]) else None
