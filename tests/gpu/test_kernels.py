# SPDX-License-Identifier: Apache-2.0
"""The kernels called from torch against the definition. plugins/tests/device_test goes deeper, without torch."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lynx_compile import bench
from lynx_compile.kernels import LIBRARY, SparseLinear, load_library
from lynx_compile.sparsity import expand_low_rank, sparse_linear

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
    ("rows", "channels", "out_channels"), [(1, 64, 8), (129, 208, 200), (512, 3072, 9216)]
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
    for tile in range(-1, library.lynx_tile_count()):
        op.prune(x)
        y = op.gemm(x, tile).double()
        assert (y - wanted).norm() < bound * wanted.norm(), tile
    assert torch.equal(op(x), op.gemm(x))


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
    assert result.error is not None and result.error < bench.TOLERANCE
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert result.whole.median > 0 and result.tile is not None
