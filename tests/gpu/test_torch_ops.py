# SPDX-License-Identifier: Apache-2.0
"""torch.ops.lynx on a GPU: the kernels against the definitions on a CPU, in CUDA graphs, compiled, without a sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from lynx_compile.ops.fp8 import round_rows
from lynx_compile.ops.sparse_linear import GELU_TANH
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.bindings import DTYPES, LIBRARY
from lynx_compile.torch_ops.fp8_bindings import load_fp8_library
from lynx_compile.torch_ops.readers import Merged
from tests.torch_ops.test_operators import (
    BIAS,
    CHANNELS,
    FROM,
    MODULES,
    Attention,
    X,
    fp8_linear,
    normal,
    wanted,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="needs the plugin library: make plugin"),
]
# y's own rounding, and what the tensor cores' sums turn over; a pruned or rounded x is the same to the bit.
LIMIT = 2**-7


@pytest.fixture(params=list(MODULES))
def name(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("fp8") and not load_fp8_library().lynx_fp8_runs(DTYPES[torch.bfloat16]):
        pytest.skip("needs a GPU and a library with FP8 kernels")
    return str(request.param)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_module_is_its_definition(name: str) -> None:
    module = MODULES[name]().cuda()
    x, many = X.cuda(), normal(300, CHANNELS)
    module(x)  # loads the library
    with no_sync():
        y = module(x)
    assert off(y, wanted(name, X)) < LIMIT
    assert off(module(many.cuda()), wanted(name, many)) < LIMIT
    assert module(x[None, :0]).shape == (1, 0, module.out_features)
    odd = torch.cat((torch.zeros(3, dtype=x.dtype, device="cuda"), x.flatten()))[3:].view_as(x)
    assert odd.data_ptr() % 16 and torch.equal(module(odd), y)


def test_a_module_runs_in_a_cuda_graph_and_on_its_stream(name: str) -> None:
    module, x = MODULES[name]().cuda(), X.cuda()
    expected = module(x)
    static, stream = torch.zeros_like(x), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)


def test_a_module_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    module, x = MODULES[name]().cuda(), X.cuda()
    with torch.no_grad():
        y = torch.compile(module, fullgraph=True)(x)
    assert (
        off(y, wanted(name, X)) < 2**-6
    )  # inverses that a compiler rounds otherwise move single e4m3 values


class Blocks(nn.Module):
    """Blocks whose readers share a product, as a transformer with compiled linears has them."""

    def __init__(self) -> None:
        super().__init__()
        makes = (lambda: fp8_linear("sparse weight"), MODULES["sparse weight"], lambda: fp8_linear("dense"))
        self.blocks = nn.ModuleList(Attention(Merged(make(), [64, 64, 64])) for make in makes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([block(x) for block in self.blocks])


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_diffusers_offloads_compiled_linears_in_groups(level: str, use_stream: bool) -> None:
    if not load_fp8_library().lynx_fp8_runs(DTYPES[torch.bfloat16]):
        pytest.skip("needs a GPU and a library with FP8 kernels")
    module, x = Blocks().cuda(), X.cuda()
    with torch.no_grad():
        expected = module(x)
        groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(
            module.cpu(), torch.device("cuda"), torch.device("cpu"), level, use_stream=use_stream, **groups
        )
        assert all(not held.is_cuda for held in module.state_dict().values())
        for _ in range(3):
            assert torch.equal(module(x), expected)
        torch.cuda.synchronize()
        assert all(not held.is_cuda for held in module.blocks[0].state_dict().values()), (
            "a block that has run is gone again"
        )


def test_the_product_of_what_torch_rounded_is_the_whole_op() -> None:
    if not load_fp8_library().lynx_fp8_runs(DTYPES[torch.bfloat16]):
        pytest.skip("needs a GPU and a library with FP8 kernels")
    for operand in ("dense", "sparse weight"):
        linear, rounded = fp8_linear(operand).cuda(), round_rows(X.cuda())
        tensors = linear.weight, linear.metadata, linear.weight_scale, BIAS.cuda()
        y = operators.fp8_product(rounded.values, rounded.scale, *tensors, GELU_TANH, FROM, False)
        assert off(y, wanted(f"fp8 {operand}", X)) < LIMIT
        assert torch.equal(y, linear(X.cuda())), "our pass rounds to the same bits"
