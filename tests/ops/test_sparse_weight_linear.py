# SPDX-License-Identifier: Apache-2.0
"""2:4 weights: packing and its inverse, the op's definition, and its ONNX function in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from lynx_compile.ops.functions import DOMAIN, WEIGHT_OP, lynx_function
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.ops.sparse_weight_linear import (
    MetadataLayout,
    pack_weight,
    sparse_weight_linear,
    unpack_weight,
)

SHAPES = [(8, 64), (64, 64), (72, 192), (200, 320)]
each_layout = pytest.mark.parametrize("layout", [80, 90])


def _weight(out_channels: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """2:4 weights and their mask; the masks hold all six pairs."""
    torch.manual_seed(out_channels + channels)
    weight = torch.randn(out_channels, channels)
    keep = keep_mask(torch.randn(out_channels, channels))
    return weight * keep, keep


@each_layout
@pytest.mark.parametrize(("out_channels", "channels"), SHAPES)
def test_packed_weights_unpack_again(out_channels: int, channels: int, layout: MetadataLayout) -> None:
    weight, keep = _weight(out_channels, channels)
    values, metadata = pack_weight(weight, keep, layout)
    rows = -(-out_channels // 64) * 64
    assert values.shape == (rows, channels // 2) and metadata.shape == (channels // 64, rows // 64, 128)
    assert metadata.dtype == torch.int32 and metadata.is_contiguous() and values.is_contiguous()
    assert torch.equal(values[:out_channels].flatten(), weight[keep]) and not values[out_channels:].any()
    unpacked = unpack_weight(values, metadata, layout)
    assert torch.equal(unpacked[:out_channels], weight) and not unpacked[out_channels:].any()


@each_layout
def test_kept_zeros_keep_their_place(layout: MetadataLayout) -> None:
    """A refitted weight may be 0, or become 0 in 16 bits; its group still names two positions."""
    weight, keep = _weight(16, 64)
    values, metadata = pack_weight(torch.zeros_like(weight), keep, layout)
    ones = unpack_weight(torch.ones_like(values), metadata, layout)
    assert torch.equal(ones[:16].bool(), keep)
    assert torch.equal(ones[16:].unflatten(-1, (-1, 4)), torch.tensor([1.0, 1, 0, 0]).expand(48, 16, 4))


@each_layout
def test_every_nibble_is_legal(layout: MetadataLayout) -> None:
    _, metadata = pack_weight(*_weight(72, 128), layout)
    nibbles = metadata[..., None] >> torch.arange(0, 32, 4) & 15
    assert set(nibbles.unique().tolist()) == {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}


@each_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_op_is_its_formula(dtype: torch.dtype, layout: MetadataLayout) -> None:
    weight, keep = (t.to(dtype) if i == 0 else t for i, t in enumerate(_weight(72, 128)))
    x, bias = torch.randn(2, 3, 128).to(dtype), torch.randn(72).to(dtype)
    values, metadata = pack_weight(weight, keep, layout)
    options = {"metadata_layout": layout, "activation": 1, "activation_from": 16}
    got = sparse_weight_linear(x, values, metadata, bias, **options)
    y = x.double() @ weight.double().T + bias.double()
    y[..., 16:] = torch.nn.functional.gelu(y[..., 16:], approximate="tanh")
    assert got.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (1, partial(torch.nn.functional.gelu, approximate="tanh")),
        (2, torch.nn.functional.gelu),
        (3, torch.nn.functional.silu),
    ],
)
def test_gated_rows_are_pairs_eight_apart(
    activation: int, function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight, keep = _weight(16 + 32, 128)
    values, metadata = pack_weight(weight.double(), keep, 80)
    x, bias = torch.randn(5, 128).double(), torch.randn(48).double()
    options = {"metadata_layout": 80, "activation": activation, "activation_from": 16}
    got = sparse_weight_linear(x, values, metadata, bias, gated=True, **options)
    y = x @ weight.double().T + bias
    first, second = function(y[:, 16:24]) * y[:, 24:32], function(y[:, 32:40]) * y[:, 40:48]
    torch.testing.assert_close(got, torch.cat((y[:, :16], first, second), 1), rtol=1e-10, atol=1e-10)


def test_the_other_layout_gives_another_result() -> None:
    weight, keep = _weight(128, 128)
    values, metadata = pack_weight(weight, keep, 80)
    x, bias = torch.randn(4, 128), torch.zeros(128)
    right, wrong = (sparse_weight_linear(x, values, metadata, bias, metadata_layout=n) for n in (80, 90))
    assert torch.allclose(right, x @ weight.T, atol=1e-4)
    assert (wrong - right).norm() > 0.5 * right.norm()


def _run(feed: dict[str, torch.Tensor], **attributes: int) -> np.ndarray:
    kinds = {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.int32: TensorProto.INT32,
    }
    node = oh.make_node(
        WEIGHT_OP, list(feed), ["y"], domain=DOMAIN, plugin_namespace="lynx", plugin_version="1", **attributes
    )
    inputs = [
        oh.make_tensor_value_info(name, kinds[value.dtype], value.shape) for name, value in feed.items()
    ]
    result = oh.make_tensor_value_info("y", kinds[feed["x"].dtype], None)
    model = oh.make_model(
        oh.make_graph([node], "one", inputs, [result]),
        functions=[lynx_function(WEIGHT_OP)],
        opset_imports=[oh.make_opsetid("", 18), oh.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feed.items()})[0]


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("out_channels", "channels"), SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": 1},
        {"activation": 1, "activation_from": 8},
        {"activation": 2, "activation_from": 8},
        {"activation": 3, "activation_from": 8, "gated": 1},
        {"activation": 2, "gated": 1},
    ],
    ids=str,
)
def test_function_equals_the_definition(
    out_channels: int, channels: int, options: dict[str, int], dtype: torch.dtype, layout: MetadataLayout
) -> None:
    out_channels += options.get("gated", 0) * ((options.get("activation_from", 0) - out_channels) % 16)
    weight, keep = _weight(out_channels, channels)
    values, metadata = pack_weight(weight.to(dtype), keep, layout)
    feed = {"x": torch.randn(2, 5, channels).to(dtype), "values": values, "metadata": metadata}
    feed |= {"bias": torch.randn(out_channels).to(dtype)}
    y = _run(feed, metadata_layout=layout, out_channels=out_channels, **options)
    expected = sparse_weight_linear(**feed, metadata_layout=layout, **options).numpy()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


def test_the_function_heeds_the_layout() -> None:
    values, metadata = pack_weight(*_weight(64, 64), 80)
    feed = {"x": torch.randn(5, 64), "values": values, "metadata": metadata, "bias": torch.zeros(64)}
    right, wrong = (_run(feed, metadata_layout=layout, out_channels=64) for layout in (80, 90))
    assert np.linalg.norm(wrong - right) > 0.5 * np.linalg.norm(right)
