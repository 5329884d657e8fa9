# SPDX-License-Identifier: Apache-2.0
"""The kernels called from torch against the definition. plugins/tests/device_test goes deeper, without torch."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lynx_compile.errors import InputError
from lynx_compile.ops.sparse_linear import (
    GATE_FIRST,
    GELU_ERF,
    GELU_TANH,
    SILU,
    X_FIRST,
    Gated,
    Gelu,
    Norm,
    activate,
    expand_low_rank,
    keep_mask,
    produce,
    sparse_linear,
)
from lynx_compile.ops.sparse_weight_linear import pack_weight
from lynx_compile.tools import bench
from lynx_compile.torch_ops.bindings import DTYPES as CODES
from lynx_compile.torch_ops.bindings import (
    LIBRARY,
    SparseLinear,
    SparseWeightLinear,
    load_library,
)

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU of compute capability 8.0 or later"
    ),
    pytest.mark.skipif(not LIBRARY.exists(), reason="needs the plugin library: make plugin"),
]
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load_library()


def _operands(
    rows: int, channels: int, out_channels: int, rank: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    torch.manual_seed(rows + rank)
    x = torch.randn(rows, channels, device="cuda", dtype=dtype)
    weight = (torch.randn(out_channels, channels, device="cuda") * channels**-0.5).to(dtype)
    lora_up = (torch.randn(out_channels, rank, device="cuda") * 0.1).to(dtype)
    down = (torch.randn(max(rank, 1), channels, device="cuda") * channels**-0.5).to(dtype)
    bias = torch.randn(out_channels, device="cuda", dtype=dtype)
    return [x, expand_low_rank(weight, lora_up), down, bias]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 16, 32, 64, 128])
@pytest.mark.parametrize(
    ("rows", "channels", "out_channels"), [(1, 64, 8), (129, 208, 200), (130, 12288, 264), (512, 3072, 9216)]
)
def test_equals_the_definition(
    library: ctypes.CDLL, dtype: torch.dtype, rank: int, rows: int, channels: int, out_channels: int
) -> None:
    x, weight, down, bias = _operands(rows, channels, out_channels, rank, dtype)
    op = SparseLinear(library, weight, down, bias, rows=rows, rank=rank, norm_scale=True)
    wanted = sparse_linear(
        x.double(), weight.double(), down.double(), bias.double(), rank=rank, norm_scale=True
    )
    bound = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    for tile in range(-1, library.lynx_tile_count(CODES[dtype])):
        op.prune(x)
        y = op.gemm(x, tile).double()
        assert (y - wanted).norm() < bound * wanted.norm(), tile
    assert torch.equal(op(x), op.gemm(x))


def _guarded(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN between NaN: (the whole, the part in the middle)."""
    whole = torch.full((rows * columns + 2048,), float("nan"), device="cuda", dtype=dtype)
    return whole, whole[1024:-1024].view(rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "out_channels", "options"),
    [
        (1, 64, 8, {}),
        (33, 192, 576, {"activation": GELU_TANH, "activation_from": 512}),
        (129, 128, 200, {"activation": GELU_ERF, "activation_from": 64}),
        (300, 3072, 72, {"activation": GELU_TANH}),
        (512, 3072, 9216, {}),
        (129, 192, 592, {"activation": SILU, "activation_from": 64, "gated": True}),
        (33, 256, 272, {"activation": GELU_ERF, "gated": True}),
        (512, 3072, 9216 + 6144, {"activation": SILU, "activation_from": 9216, "gated": True}),
        (4608, 3072, 3072, {"activation": GELU_TANH, "activation_from": 1536}),
        (512, 12288, 3072, {}),
    ],
)
def test_sparse_weight_equals_the_definition(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    rows: int,
    channels: int,
    out_channels: int,
    options: dict[str, int],
) -> None:
    x, wide, _, bias = _operands(rows, channels, out_channels, 0, dtype)
    weight = wide[:, :channels]
    keep = keep_mask(weight)
    wanted = torch.nn.functional.linear(x.double(), (weight * keep).double(), bias.double())
    start, gated = options.get("activation_from", 0), bool(options.get("gated"))
    wanted = activate(wanted, options.get("activation", 0), start, gated)
    bound = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    best = library.lynx_metadata_layout(CODES[dtype])
    for layout in {80, best}:
        values, metadata = pack_weight(weight, keep, layout)
        op = SparseWeightLinear(library, values, metadata, bias, rows=rows, metadata_layout=layout, **options)
        for tile in range(-1, library.lynx_tile_count(CODES[dtype]) if layout == best else 2):
            whole, op.y = _guarded(rows, wanted.shape[1], dtype)
            op._call.y = op.y.data_ptr()
            y = op(x, tile).double()
            assert (y - wanted).norm() < bound * wanted.norm(), (layout, tile)
            assert torch.equal(op(x, tile).double(), y), "a second run gives other bits"
            assert whole[:1024].isnan().all() and whole[-1024:].isnan().all()


def test_wrong_metadata_layout_gives_another_result(library: ctypes.CDLL) -> None:
    """The test above must be able to fail."""
    x, wide, _, bias = _operands(129, 256, 200, 0, torch.bfloat16)
    keep = keep_mask(wide)
    results = []
    for packed in (80, 90):
        values, metadata = pack_weight(wide, keep, packed)
        results.append(SparseWeightLinear(library, values, metadata, bias, rows=129, metadata_layout=80)(x))
    assert (results[0] - results[1]).double().norm() > 0.1 * results[0].double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [GELU_TANH, GELU_ERF])
@pytest.mark.parametrize("start", [0, 512])
def test_gelu_in_the_epilogue(library: ctypes.CDLL, dtype: torch.dtype, start: int, activation: int) -> None:
    x, weight, down, bias = _operands(300, 768, 1152, 16, dtype)
    gelu = {"activation": activation, "activation_from": start}
    op = SparseLinear(library, weight, down, bias, rows=300, rank=16, **gelu)
    wanted = sparse_linear(
        x.double(), weight.double(), down.double(), bias.double(),
        rank=16, **gelu,
    )  # fmt: skip
    bound = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    for tile in range(-1, library.lynx_tile_count(CODES[dtype])):
        assert (op(x, tile).double() - wanted).norm() < bound * wanted.norm(), tile


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 16, 32, 64, 128])
@pytest.mark.parametrize(
    "kind", ["layer norm", "rms norm", "gelu", "gelu erf", "gated", "gated by gelu", "x first", "gate first"]
)
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (130, 208), (130, 3840), (4608, 3072)])
def test_fused_producer(
    library: ctypes.CDLL, dtype: torch.dtype, rank: int, kind: str, rows: int, channels: int
) -> None:
    """Against the op on the producer's result in float64, rounded once as the kernel does."""
    x, weight, down, bias = _operands(rows, channels, 200, rank, dtype)
    x = x + 0.5
    gain_rows = 2 if rows % 2 == 0 else 1
    gain, shift = (
        (torch.randn(gain_rows, channels, device="cuda") * 0.3 + offset).to(dtype) for offset in (1, 0)
    )
    gate = torch.randn_like(x)
    wide = x.double()
    acting = {
        "gelu": Gelu(),
        "gelu erf": Gelu(GELU_ERF),
        "gated": Gated(gate),
        "gated by gelu": Gated(gate, GELU_ERF),
        "x first": Gated(torch.cat((x, gate), 1), SILU, X_FIRST),
        "gate first": Gated(torch.cat((gate, x), 1), GELU_TANH, GATE_FIRST),
    }
    source = x
    if kind in acting:
        producer = acting[kind]
        apart = producer if isinstance(producer, Gelu) else Gated(gate.double(), producer.activation)
        produced = produce(wide, apart)
        source = producer.gate if "first" in kind else x
    else:
        producer = Norm(gain, shift, rms=kind == "rms norm")
        centred = wide if producer.rms else wide - wide.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        gains, shifts = (t.double().repeat_interleave(rows // gain_rows, 0) for t in (gain, shift))
        produced = normed * gains + shifts
    op = SparseLinear(library, weight, down, bias, rows=rows, rank=rank, norm_scale=True, producer=producer)
    wanted = sparse_linear(
        produced.to(dtype).double(), weight.double(), down.double(), bias.double(), rank=rank, norm_scale=True
    )
    # A sum in float32 may round z another way, and so decide a close call otherwise: few do.
    assert (op(source).double() - wanted).norm() < 2.0**-5 * wanted.norm()
    plain = SparseLinear(library, weight, down, bias, rows=rows, rank=rank, norm_scale=True)
    assert (plain(x).double() - wanted).norm() > 2.0**-3 * wanted.norm()


def test_what_the_kernels_cannot_do_is_refused(library: ctypes.CDLL) -> None:
    x, weight, down, bias = _operands(64, 128, 192, 0, torch.bfloat16)
    with pytest.raises(InputError, match="CUDA error"):
        SparseLinear(library, weight, down, bias, rows=64, activation=1, activation_from=8)(x)
    values, metadata = pack_weight(weight, keep_mask(weight), 80)
    with pytest.raises(InputError, match="CUDA error"):
        SparseWeightLinear(library, values, metadata, bias, rows=64, metadata_layout=80)(x, tile=99)


@pytest.mark.parametrize("operand", ["activation", "weight"])
def test_more_elements_than_32_bits_count(library: ctypes.CDLL, operand: str) -> None:
    rows, channels, out_channels = 2**19 + 33, 4160, 64
    assert rows * channels > 2**31
    _, weight, down, bias = _operands(1, channels, out_channels, 0, torch.bfloat16)
    x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
    sampled = torch.tensor([0, 2**31 // channels, 2**31 // channels + 1, rows - 1], device="cuda")
    of_rows = x[sampled].double()
    if operand == "activation":
        op = SparseLinear(library, weight, down, bias, rows=rows, norm_scale=True)
        wanted = sparse_linear(of_rows, weight.double(), down.double(), bias.double(), norm_scale=True)
    else:
        layout, keep = library.lynx_metadata_layout(CODES[torch.bfloat16]), keep_mask(weight)
        values, metadata = pack_weight(weight, keep, layout)
        op = SparseWeightLinear(library, values, metadata, bias, rows=rows, metadata_layout=layout)
        wanted = torch.nn.functional.linear(of_rows, (weight * keep).double(), bias.double())
    for tile in range(-1, library.lynx_tile_count(CODES[torch.bfloat16])):
        y = op(x, tile)[sampled].double()
        assert (y - wanted).norm() < 2.0**-7 * wanted.norm(), tile


def test_two_streams_share_nothing(library: ctypes.CDLL) -> None:
    x, wide, _, bias = _operands(512, 768, 1152, 0, torch.bfloat16)
    layout = library.lynx_metadata_layout(CODES[torch.bfloat16])
    values, metadata = pack_weight(wide, keep_mask(wide), layout)
    ops = [
        SparseWeightLinear(library, values, metadata, bias, rows=512, metadata_layout=layout) for _ in "ab"
    ]
    inputs = [x, -x]
    alone = [op(value).clone() for op, value in zip(ops, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in ops]
    for _ in range(50):
        for op, value, stream in zip(ops, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                op(value)
    torch.cuda.synchronize()
    assert all(torch.equal(op.y, wanted) for op, wanted in zip(ops, alone, strict=True))


def test_sparse_weight_in_a_graph(library: ctypes.CDLL) -> None:
    """512 tokens and K = 12288: stream-K, whose workspace must be cleared at every replay."""
    x, wide, _, bias = _operands(512, 12288, 3072, 0, torch.bfloat16)
    layout = library.lynx_metadata_layout(CODES[torch.bfloat16])
    values, metadata = pack_weight(wide, keep_mask(wide), layout)
    op = SparseWeightLinear(library, values, metadata, bias, rows=512, metadata_layout=layout)
    for tile in range(-1, library.lynx_tile_count(CODES[torch.bfloat16])):
        expected = [op(x, tile).clone(), op(-x, tile).clone()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            op(x, tile)
        for _ in range(2):
            graph.replay()
            assert torch.equal(op.y, expected[0]), tile
        x.neg_()
        graph.replay()
        assert torch.equal(op.y, expected[1]), tile
        x.neg_()


def test_graph_replay_follows_the_input(library: ctypes.CDLL) -> None:
    x, weight, down, bias = _operands(256, 768, 1152, 32, torch.bfloat16)
    op = SparseLinear(library, weight, down, bias, rows=256, rank=32, norm_scale=True)
    expected = [op(x).clone(), op(-x).clone()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(x)
    graph.replay()
    assert torch.equal(op.y, expected[0])
    x.neg_()
    graph.replay()
    assert torch.equal(op.y, expected[1]) and not torch.equal(*expected)


def test_bench_measures_one_shape() -> None:
    shape = bench.Shape("FLUX.1-dev", "to_out", 512, 3072, 3072)
    result = bench.bench([shape], rounds=3).results[0]
    assert result.error is not None and result.error < 2.0**-7
    assert result.ratio.low <= result.ratio.median <= result.ratio.high
    assert result.whole.median > 0 and result.tile is not None and result.weight_tile is not None
