# SPDX-License-Identifier: Apache-2.0
"""The FP8 ops' ONNX functions against their definition, bit for bit where sums are exact."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from lynx_compile.ops.fp8 import E4M3, Rounded, fp8_linear, pack, pack_dense, round_rows, to_e4m3, to_words
from lynx_compile.ops.fp8_functions import FP8_FUNCTIONS, FP8_OP, FP8_WEIGHT_OP
from lynx_compile.ops.functions import DOMAIN, lynx_functions
from lynx_compile.ops.sparse_linear import (
    APART,
    GATE_FIRST,
    GELU_ERF,
    GELU_TANH,
    SILU,
    X_FIRST,
    Gated,
    Gelu,
    Norm,
    keep_mask,
    produce,
)

Feed = dict[str, torch.Tensor]
KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
}
NO_ACTIVATION = {"activation": 0, "activation_from": 0}


def _model(op: str, feed: Feed, attributes: dict[str, int | float]) -> onnx.ModelProto:
    node = oh.make_node(
        op, list(feed), ["y"], domain=DOMAIN, plugin_namespace="lynx", plugin_version="1",
        **NO_ACTIVATION | attributes,
    )  # fmt: skip
    inputs = [oh.make_tensor_value_info(name, KINDS[v.dtype], v.shape) for name, v in feed.items()]
    x = feed["x"]
    y = oh.make_tensor_value_info("y", KINDS[x.dtype], (*x.shape[:-1], None))
    graph = oh.make_graph([node], "one", inputs, [y])
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid(DOMAIN, 1)]
    return oh.make_model(graph, functions=lynx_functions([op]), opset_imports=opsets, ir_version=10)


def _run(op: str, feed: Feed, **attributes: int | float) -> torch.Tensor:
    model = _model(op, feed, attributes).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in feed.items()})[0])


def _dense(weight: Rounded, bias: torch.Tensor) -> Feed:
    return {"weight": to_words(pack_dense(weight.values)), "weight_scale": weight.scale, "bias": bias}


def _sparse(weight: Rounded, keep: torch.Tensor, bias: torch.Tensor) -> Feed:
    values, metadata = pack(weight.values, keep)
    return {"values": to_words(values), "metadata": metadata, "weight_scale": weight.scale, "bias": bias}


def _same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    np.testing.assert_array_equal(found.numpy(), wanted.numpy())  # a NaN equals a NaN


def test_words_hold_four_codes_the_first_lowest() -> None:
    codes = torch.tensor([[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]], dtype=torch.uint8)
    words = to_words(codes.view(E4M3)).tolist()[0]
    assert [word % 2**32 for word in words] == [0x67452301, 0xEFCDAB89]


def test_every_code_is_decoded() -> None:
    """Row n of the weight has code n in one column; tokens of one channel each read the columns."""
    channels = 32
    codes = torch.zeros(256, channels, dtype=torch.uint8)
    codes[torch.arange(256), torch.arange(256) % channels] = torch.arange(256, dtype=torch.uint8)
    weight, bias = Rounded(codes.view(E4M3), torch.ones(256)), torch.zeros(256)
    x = 448.0 * torch.eye(channels)
    y = _run(FP8_OP, {"x": x, **_dense(weight, bias)}, prune=0)
    _same(y, fp8_linear(x, weight, bias))
    finite = y[torch.arange(256) % channels, torch.arange(256)] / 448
    _same(finite, torch.arange(256, dtype=torch.uint8).view(E4M3).float())
    keep = torch.zeros(256, channels, dtype=torch.bool).unflatten(-1, (-1, 4))
    column = torch.arange(256) % channels
    keep[torch.arange(256), column // 4, column % 4] = True
    keep[torch.arange(256), column // 4, (column + 1 + torch.arange(256) // 64 % 3) % 4] = True
    keep[..., :2] |= ~keep.any(-1, keepdim=True)
    _same(_run(FP8_WEIGHT_OP, {"x": x, **_sparse(weight, keep.flatten(1), bias)}, out_channels=256), y)


def _tokens(channels: int) -> torch.Tensor:
    """Tokens whose values a scale of 1 leaves alone: all e4m3, the ties between them, what is just beside a tie; then
    random ones of all sizes, one of zeros, one of subnormals, and three with an infinity or a NaN.
    """
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(end)) for end in (-math.inf, math.inf)]
    values = torch.cat((codes, ties, *beside))
    values = torch.cat((values, values.new_zeros(-len(values) % (channels - 1))))
    rows = values.reshape(-1, channels - 1)
    exact = torch.cat((torch.full((len(rows), 1), 448.0), rows), 1)  # the largest: its scale is 1
    others = torch.randn(20, channels) * torch.logspace(-32, 32, 20)[:, None]
    special = torch.randn(6, channels)
    special[0], special[1] = 0.0, 1e-40 * torch.arange(channels)
    special[2, 3], special[3, 5], special[4, 7], special[5] = math.inf, -math.inf, math.nan, 2.0**-101
    return torch.cat((exact, others, special))


@pytest.mark.parametrize("channels", [64, 80, 128, 200])
@pytest.mark.parametrize("prune", [0, 1])
def test_tokens_are_rounded_bit_for_bit(channels: int, prune: int) -> None:
    """Against weights of ones on the diagonal, y is the rounded x."""
    torch.manual_seed(channels)
    x = _tokens(channels)
    keep = keep_mask(x) if prune else None
    identity = Rounded(to_e4m3(torch.eye(channels)), torch.ones(channels))
    y = _run(FP8_OP, {"x": x, **_dense(identity, torch.zeros(channels))}, prune=prune)
    wanted = round_rows(x, keep).dequantized()
    wanted[~x.isfinite().all(1)] = math.nan
    _same(y, wanted)
    assert y.isnan().all(1).sum() == 3
    if not prune:
        sparse = _sparse(identity, keep_mask(torch.eye(channels)), torch.zeros(channels))
        _same(_run(FP8_WEIGHT_OP, {"x": x, **sparse}, out_channels=channels), wanted)


def _whole_numbers(rows: int, channels: int, largest: int) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, (rows, channels)).float()


@pytest.mark.parametrize(("channels", "out_channels"), [(128, 64), (176, 200), (64, 8), (272, 72)])
def test_functions_equal_the_definition_bit_for_bit(channels: int, out_channels: int) -> None:
    """On whole numbers, of which every sum is exact; K is not always a multiple of 128, N not of 64."""
    torch.manual_seed(channels)
    x = _whole_numbers(2 * 9, channels, 16)
    x[:, 0] = 448.0
    x = (x * 2.0 ** torch.arange(-9.0, 9.0)[:, None]).reshape(2, 9, channels)  # scales that are powers of two
    weight = Rounded(
        to_e4m3(_whole_numbers(out_channels, channels, 8)), 2.0 ** torch.randint(-6, 6, (out_channels,))
    )
    bias = _whole_numbers(1, out_channels, 4)[0]
    for prune in (0, 1):
        y = _run(FP8_OP, {"x": x, **_dense(weight, bias)}, prune=prune)
        _same(y, fp8_linear(x, weight, bias, prune=bool(prune)))
    keep = keep_mask(torch.randn(out_channels, channels))
    pruned = Rounded(torch.where(keep, weight.values.float(), 0).to(E4M3), weight.scale)
    y = _run(FP8_WEIGHT_OP, {"x": x, **_sparse(weight, keep, bias)}, out_channels=out_channels)
    _same(y, fp8_linear(x, pruned, bias))
    assert not torch.equal(y, fp8_linear(x, weight, bias))


def _error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the token's largest value."""
    return float(((y - wanted).abs() / wanted.abs().amax(-1, keepdim=True)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activation_and_types(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(3, 11, 208).to(dtype), torch.randn(136, 208)
    bias = torch.randn(136).to(dtype)
    keep = keep_mask(weight)
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    for kept, activation, gated in ((None, 1, 0), (keep, 2, 0), (None, 3, 1), (keep, 1, 1)):
        options = {"activation": activation, "activation_from": 72 if gated else 64, "gated": gated}
        rounded = round_rows(weight, kept)
        wanted = fp8_linear(
            x, rounded, bias, activation=activation, activation_from=72 if gated else 64, gated=bool(gated)
        )
        if kept is None:
            y = _run(FP8_OP, {"x": x, **_dense(rounded, bias)}, prune=0, **options)
        else:
            y = _run(FP8_WEIGHT_OP, {"x": x, **_sparse(rounded, keep, bias)}, out_channels=136, **options)
        assert y.dtype == dtype and y.shape == wanted.shape == (3, 11, 104 if gated else 136)
        assert _error(y.float(), wanted.float()) < bound
        assert _error(y.float(), fp8_linear(x, rounded, bias)[..., : y.shape[-1]].float()) > 0.02


PRODUCED = ["Norm", "rms Norm", "Gelu", "Gelu by erf", "Gated", "Gated by the first half", "Gated apart"]


def _produced(name: str, x: torch.Tensor) -> tuple[torch.Tensor, Feed, dict[str, int | float]]:
    """z, and the inputs and attributes beyond those of the op without a producer."""
    if name.startswith("Gelu"):
        gelu = Gelu(GELU_ERF if "erf" in name else GELU_TANH)
        return produce(x, gelu), {}, {"producer_activation": gelu.activation}
    if name.startswith("Gated"):
        halves, activation = {"Gated": (X_FIRST, SILU), "Gated apart": (APART, GELU_TANH)}.get(
            name, (GATE_FIRST, GELU_ERF)
        )
        gated = Gated(torch.randn_like(x) if halves == APART else x, activation, halves)
        attributes: dict[str, int | float] = {"producer_activation": activation, "halves": halves}
        return produce(x, gated), {"gate": gated.gate}, attributes
    norm = Norm(1 + 0.3 * torch.randn(3, 1, 208), 0.3 * torch.randn(3, 1, 208), name == "rms Norm")
    inputs = {"gain": norm.gain, "shift": norm.shift}
    return produce(x, norm), inputs, {"rms": int(norm.rms), "epsilon": norm.epsilon}


@pytest.mark.parametrize("producer", PRODUCED)
@pytest.mark.parametrize("form", ["dense", "pruned", "sparse weight"])
def test_producers(producer: str, form: str) -> None:
    torch.manual_seed(4)
    x = torch.randn(3, 8, 416 if producer in ("Gated", "Gated by the first half") else 208)
    z, inputs, attributes = _produced(producer, x)
    weight, bias = torch.randn(136, 208), torch.randn(136)
    keep = keep_mask(weight) if form == "sparse weight" else None
    rounded = round_rows(weight, keep)
    if keep is None:
        base, own, feed = FP8_OP, {"prune": int(form == "pruned")}, _dense(rounded, bias)
    else:
        base, own, feed = FP8_WEIGHT_OP, {"out_channels": 136}, _sparse(rounded, keep, bias)
    op = base.replace("Lynx", f"Lynx{producer.removeprefix('rms ').split()[0]}")
    y = _run(op, {"x": x, **feed, **inputs}, **own, **attributes)
    assert _error(y, fp8_linear(z, rounded, bias, prune=form == "pruned")) < 1e-4


@pytest.mark.parametrize("op", list(FP8_FUNCTIONS))
def test_the_checker_takes_the_functions(op: str) -> None:
    x, weight = torch.randn(2, 8, 80), torch.randn(136, 80)
    keep = keep_mask(weight)
    sparse = "SparseWeight" in op
    feed = _sparse(round_rows(weight, keep), keep, torch.randn(136)) if sparse else None
    feed = feed or _dense(round_rows(weight), torch.randn(136))
    attributes: dict[str, int | float] = {"out_channels": 136} if sparse else {"prune": 1}
    if "Norm" in op:
        feed |= {"gain": torch.ones(1, 80), "shift": torch.zeros(1, 80)}
        attributes |= {"rms": 0, "epsilon": 1e-6}
    if "Gated" in op:
        feed |= {"gate": torch.randn_like(x)}
    onnx.checker.check_model(_model(op, {"x": x, **feed}, attributes), full_check=True)
