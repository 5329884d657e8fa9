# SPDX-License-Identifier: Apache-2.0
"""Gated activations of diffusers' feed-forwards, made by the product: the same results, compiled whole, undone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from diffusers.models.transformers.transformer_z_image import FeedForward
from torch import nn

from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.ops.sparse_weight_linear import gated_order, pack_weight
from lynx_compile.torch_ops.epilogue import Epilogue
from lynx_compile.torch_ops.module_gates import find_gate
from lynx_compile.torch_ops.modules import SparseWeightLinear
from lynx_compile.torch_ops.swap import Group, is_gate_last, merge, undo


class Beside(nn.Module):
    """A gate and a plain linear of the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.act = nn.Linear(64, 64), SwiGLU(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.act(x), self.plain(x)), -1)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "GEGLU": (lambda: nn.Sequential(GEGLU(64, 48)), ("0.proj",)),
    "SwiGLU": (lambda: nn.Sequential(SwiGLU(64, 48)), ("0.proj",)),
    "beside": (Beside, ("act.proj", "plain")),
    "Flux2": (lambda: nn.Sequential(Flux2FeedForward(64, 64)), ("0.linear_in",)),
    "ZImage": (lambda: nn.Sequential(FeedForward(64, 128)), ("0.w1", "0.w3")),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_product_makes_what_the_module_made(name: str) -> None:
    torch.manual_seed(0)
    make, paths = MODULES[name]
    module, x = make().requires_grad_(False), torch.randn(2, 5, 64)
    linears = [module.get_submodule(path) for path in paths]
    for linear in linears:
        linear.weight *= keep_mask(linear.weight)
    wanted = module(x)
    sizes = tuple(linear.out_features for linear in linears)
    gate = find_gate(module, paths, sizes)
    assert gate is not None
    group = Group(paths, sizes, sum(sizes), gate=gate)
    assert is_gate_last(group, gate)
    order = gated_order(sum(sizes), *gate.rows)
    weight = torch.cat([linear.weight for linear in linears])[order]
    biases = [
        linear.bias if linear.bias is not None else linear.weight.new_zeros(len(linear.weight))
        for linear in linears
    ]
    epilogue = Epilogue(gate.activation, sum(sizes) - 2 * gate.channels, gated=True)
    packed = pack_weight(weight, keep_mask(weight), 80)
    op = SparseWeightLinear(*packed, torch.cat(biases)[order], metadata_layout=80, epilogue=epilogue)
    before = [type(each) for each in module.modules()]
    changes = merge(module, group, op)
    assert torch.allclose(module(x), wanted, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), wanted, atol=1e-5)
    undo(module, changes)
    assert torch.equal(module(x), wanted) and [type(each) for each in module.modules()] == before


def test_a_gate_before_the_rows_of_another_linear_is_left_alone() -> None:
    module = Beside()
    gate = find_gate(module, ("act.proj", "plain"), (64, 64))
    assert gate is not None and gate.rows == (32, 0, 32)
    wider = gate.__class__(
        gate.activation, 48, 32, 16, gate.linear, gate.reader
    )  # 32 rows of its own, then 64 others
    assert not is_gate_last(Group(("act.proj", "plain"), (64, 64), 128), wider)
    assert find_gate(module, ("plain",), (64,)) is None
