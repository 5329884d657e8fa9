# SPDX-License-Identifier: Apache-2.0
"""The ops that make their x themselves: definition, ONNX functions, and where the rewriter puts them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from lynx_compile.ops.functions import DOMAIN, GATED_OP, GELU_OP, NORM_OP, OP, WEIGHT_OP, lynx_functions
from lynx_compile.ops.sparse_linear import (
    GATE_FIRST,
    GELU_ERF,
    GELU_TANH,
    X_FIRST,
    Gated,
    Gelu,
    Norm,
    expand_low_rank,
    produce,
    sparse_linear,
)

CHANNELS, OUT_CHANNELS = 80, 136
Producers = Norm | Gelu | Gated


def _x() -> torch.Tensor:
    """[3, 8, K]: tokens of all sizes, where epsilon counts and where not; one of zeros, one constant."""
    x = (torch.randn(3, 8, CHANNELS) + torch.randn(3, 8, 1)) * torch.logspace(-4, 1, 8)[:, None]
    x[0, 0], x[1, 3] = 0, 2.5
    return x


def _x_of(producer: Producers) -> torch.Tensor:
    """Twice as wide where the gate is a half."""
    return torch.cat((_x(), _x()), -1) if isinstance(producer, Gated) and producer.halves else _x()


def _norm(*leading: int, rms: bool = False) -> Norm:
    gain, shift = torch.randn(2, *leading, CHANNELS)
    return Norm(1 + 0.3 * gain, 0.3 * shift, rms)


PRODUCERS = {
    "layer norm": lambda: _norm(3, 1),
    "layer norm of one row": lambda: _norm(),
    "layer norm with a row per token": lambda: _norm(3, 8),
    "rms norm": lambda: _norm(3, 1, rms=True),
    "gelu": Gelu,
    "gelu erf": lambda: Gelu(GELU_ERF),
    "gated": lambda: Gated(torch.randn(3, 8, CHANNELS)),
    "gated by gelu": lambda: Gated(torch.randn(3, 8, CHANNELS), GELU_TANH),
    "gated by gelu erf": lambda: Gated(torch.randn(3, 8, CHANNELS), GELU_ERF),
    "gated halves": lambda: Gated(torch.randn(3, 8, 2 * CHANNELS), halves=X_FIRST),
    "gated halves, gate first": lambda: Gated(torch.randn(3, 8, 2 * CHANNELS), GELU_ERF, GATE_FIRST),
}


@pytest.fixture(params=list(PRODUCERS))
def producer(request: pytest.FixtureRequest) -> Producers:
    torch.manual_seed(1)
    made: Producers = PRODUCERS[request.param]()
    return made


def test_produce_is_what_torch_computes() -> None:
    torch.manual_seed(0)
    x, gate = _x().double(), torch.randn(3, 8, CHANNELS).double()
    norm = _norm(3, 1)
    gain, shift = norm.gain.double(), norm.shift.double()
    functional, shape = torch.nn.functional, (CHANNELS,)
    for producer, expected in (
        (norm, functional.layer_norm(x, shape, eps=1e-6) * gain + shift),
        (replace(norm, rms=True), functional.rms_norm(x, shape, eps=1e-6) * gain + shift),
        (replace(norm, epsilon=1e-2), functional.layer_norm(x, shape, eps=1e-2) * gain + shift),
        (Gelu(), functional.gelu(x, approximate="tanh")),
        (Gelu(GELU_ERF), functional.gelu(x)),
        (Gated(gate), functional.silu(x) * gate),
        (Gated(gate, GELU_TANH), functional.gelu(x, approximate="tanh") * gate),
        (Gated(gate, GELU_ERF), functional.gelu(x) * gate),
    ):
        torch.testing.assert_close(produce(x, producer), expected, rtol=1e-12, atol=1e-12)


def test_halves_are_x_and_its_gate() -> None:
    x, gate = torch.randn(2, 4, CHANNELS)
    apart = produce(x, Gated(gate))
    both, turned = torch.cat((x, gate), -1), torch.cat((gate, x), -1)
    assert torch.equal(produce(both, Gated(both, halves=X_FIRST)), apart)
    assert torch.equal(produce(turned, Gated(turned, halves=GATE_FIRST)), apart)


def test_produce_rounds_once(producer: Producers) -> None:
    x = _x_of(producer).bfloat16()
    assert torch.equal(produce(x, producer), produce(x.float(), producer).bfloat16())


def test_rows_of_gain_serve_consecutive_tokens() -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(6, CHANNELS), _norm(3)
    whole = produce(x, norm)
    for token in range(6):
        row = Norm(norm.gain[token // 2], norm.shift[token // 2])
        assert torch.equal(whole[token], produce(x[token : token + 1], row)[0])


def _operands(rank: int) -> dict[str, torch.Tensor]:
    weight = expand_low_rank(torch.randn(OUT_CHANNELS, CHANNELS), torch.randn(OUT_CHANNELS, rank))
    return {
        "weight": weight,
        "lora_down": torch.randn(max(rank, 1), CHANNELS),
        "bias": torch.randn(OUT_CHANNELS),
    }


def _op(producer: Producers) -> tuple[str, dict[str, torch.Tensor], dict[str, int | float]]:
    """The op's name, its inputs and attributes beyond those of ``LynxSparseLinear``."""
    if isinstance(producer, Norm):
        attributes = {"rms": int(producer.rms), "epsilon": producer.epsilon}
        return NORM_OP, {"gain": producer.gain, "shift": producer.shift}, attributes
    activation = {"producer_activation": producer.activation}
    if isinstance(producer, Gelu):
        return GELU_OP, {}, activation
    return GATED_OP, {"gate": producer.gate}, {**activation, "halves": producer.halves}


def _model(op: str, feed: dict[str, torch.Tensor], attributes: dict[str, int | float]) -> onnx.ModelProto:
    kinds = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    node = oh.make_node(
        op, list(feed), ["y"], domain=DOMAIN, plugin_namespace="lynx", plugin_version="1",
        **attributes,
    )  # fmt: skip
    inputs = [oh.make_tensor_value_info(n, kinds[v.dtype], v.shape) for n, v in feed.items()]
    graph = oh.make_graph(
        [node], "one", inputs, [oh.make_tensor_value_info("y", TensorProto.FLOAT, [3, 8, OUT_CHANNELS])]
    )
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid(DOMAIN, 1)]
    return oh.make_model(graph, functions=lynx_functions([op]), opset_imports=opsets, ir_version=10)


def _evaluate(op: str, feed: dict[str, torch.Tensor], attributes: dict[str, int | float]) -> np.ndarray:
    model = _model(op, feed, attributes).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    y: np.ndarray = session.run(None, {name: value.numpy() for name, value in feed.items()})[0]
    return y


def _error(y: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the token's largest value."""
    return float((np.abs(y - expected) / np.abs(expected).max(-1, keepdims=True)).max())


@pytest.mark.parametrize("options", [{}, {"norm_scale": 1, "activation": 1, "activation_from": 64}])
@pytest.mark.parametrize("rank", [0, 16])
def test_function_equals_the_definition(producer: Producers, rank: int, options: dict[str, int]) -> None:
    torch.manual_seed(rank)
    x, operands = _x_of(producer), _operands(rank)
    op, inputs, attributes = _op(producer)
    y = _evaluate(op, {"x": x, **operands, **inputs}, {"rank": rank, "norm_scale": 0} | options | attributes)
    expected = sparse_linear(produce(x, producer), **operands, rank=rank, **options).numpy()  # type: ignore[arg-type]
    assert _error(y, expected) < 2e-5


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": 1e-5}, {"epsilon": 9e-7}, {"rms": 1}, {"gain": -1.0}, {"shift": -1e-2}],
)
def test_a_wrong_norm_is_another_function(wrong: dict[str, float]) -> None:
    """What the comparison above must see, and does."""
    torch.manual_seed(0)
    x, operands, norm = _x(), _operands(0), _norm(3, 1)
    op, inputs, attributes = _op(norm)
    attributes |= {name: value for name, value in wrong.items() if name in attributes}
    inputs = {name: value + wrong.get(name, 0) for name, value in inputs.items()}
    y = _evaluate(op, {"x": x, **operands, **inputs}, {"rank": 0, "norm_scale": 0} | attributes)
    expected = sparse_linear(produce(x, norm), **operands).numpy()
    assert _error(y, expected) > 1e-3


@pytest.mark.parametrize("op", [NORM_OP, GELU_OP, GATED_OP])
def test_the_checker_takes_a_function_that_calls_a_function(op: str) -> None:
    producer = {NORM_OP: _norm(3, 1), GELU_OP: Gelu(), GATED_OP: Gated(_x())}[op]
    _, inputs, attributes = _op(producer)
    model = _model(op, {"x": _x(), **_operands(16), **inputs}, {"rank": 16, "norm_scale": 1} | attributes)
    onnx.checker.check_model(model, full_check=True)


def test_functions_come_with_what_they_call() -> None:
    assert [f.name for f in lynx_functions([GELU_OP])] == [OP, GELU_OP]
    assert [f.name for f in lynx_functions([WEIGHT_OP, NORM_OP])] == [OP, NORM_OP, WEIGHT_OP]
    assert [f.name for f in lynx_functions([WEIGHT_OP])] == [WEIGHT_OP]
