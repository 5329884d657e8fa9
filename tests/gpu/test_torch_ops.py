# SPDX-License-Identifier: Apache-2.0
"""torch.ops.lynx on a GPU: the kernels against the definitions on a CPU, in CUDA graphs, compiled, without a sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lynx_compile.ops.fp8 import round_rows
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.bindings import DTYPES, LIBRARY
from lynx_compile.torch_ops.fp8_bindings import load_fp8_library
from tests.torch_ops.test_operators import BIAS, CHANNELS, FROM, MODULES, X, fp8_linear, normal, wanted

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


def test_the_product_of_what_torch_rounded_is_the_whole_op() -> None:
    if not load_fp8_library().lynx_fp8_runs(DTYPES[torch.bfloat16]):
        pytest.skip("needs a GPU and a library with FP8 kernels")
    for operand in ("dense", "sparse weight"):
        linear, rounded = fp8_linear(operand).cuda(), round_rows(X.cuda())
        tensors = linear.weight, linear.metadata, linear.weight_scale, BIAS.cuda()
        y = operators.fp8_product(rounded.values, rounded.scale, *tensors, FROM)
        assert off(y, wanted(f"fp8 {operand}", X)) < LIMIT
        assert torch.equal(y, linear(X.cuda())), "our pass rounds to the same bits"
