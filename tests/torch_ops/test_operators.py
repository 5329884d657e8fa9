# SPDX-License-Identifier: Apache-2.0
"""torch.ops.lynx and its modules on a CPU, where the definitions run; tests/gpu holds the kernels to the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn
from torch.nn import functional

from lynx_compile.ops import fp8
from lynx_compile.ops.fp8 import E4M3, Rounded, pack, pack_dense, round_rows
from lynx_compile.ops.sparse_linear import (
    GELU_TANH,
    SILU,
    Gated,
    Gelu,
    Norm,
    expand_low_rank,
    keep_mask,
    produce,
    sparse_linear,
)
from lynx_compile.ops.sparse_weight_linear import pack_weight
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.epilogue import Epilogue
from lynx_compile.torch_ops.modules import Fp8Linear, SparseActivationLinear, SparseWeightLinear
from lynx_compile.torch_ops.readers import Merged, Reader

TOKENS, CHANNELS, OUT, FROM = 10, 128, 192, 64


def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


X, BIAS, WEIGHT = normal(TOKENS, CHANNELS), normal(OUT), normal(OUT, CHANNELS) / CHANNELS**0.5
KEEP = keep_mask(WEIGHT)
GELU, SWIGLU = Epilogue(GELU_TANH, FROM), Epilogue(SILU, FROM, gated=True)
GAIN, SHIFT, GATE = normal(2, CHANNELS), normal(2, CHANNELS + 2)[:, :CHANNELS], normal(TOKENS, CHANNELS)


def sparse_weight() -> SparseWeightLinear:
    return SparseWeightLinear(*pack_weight(WEIGHT, KEEP, 90), BIAS, metadata_layout=90, epilogue=GELU)


def sparse_activation() -> SparseActivationLinear:
    up, down = normal(OUT, 16) / 8, normal(16, CHANNELS) / 8
    return SparseActivationLinear(
        expand_low_rank(WEIGHT, up), down, BIAS, rank=16, norm_scale=True, epilogue=GELU
    )


def fp8_linear(operand: Any, epilogue: Epilogue = GELU) -> Fp8Linear:
    rounded = round_rows(WEIGHT, KEEP if operand == "sparse weight" else None)
    packed = pack(rounded.values, KEEP) if operand == "sparse weight" else (pack_dense(rounded.values), None)
    return Fp8Linear(*packed, rounded.scale, BIAS, in_features=CHANNELS, operand=operand, epilogue=epilogue)


def gated_weight() -> SparseWeightLinear:
    return SparseWeightLinear(*pack_weight(WEIGHT, KEEP, 90), BIAS, metadata_layout=90, epilogue=SWIGLU)


MODULES = {
    "sparse weight": sparse_weight,
    "gated weight": gated_weight,
    "sparse activation": sparse_activation,
    "fp8 dense": lambda: fp8_linear("dense"),
    "fp8 sparse weight": lambda: fp8_linear("sparse weight"),
    "fp8 sparse activation": lambda: fp8_linear("sparse activation"),
    "fp8 dense, gated": lambda: fp8_linear("dense", SWIGLU),
    "fp8 sparse weight, gated": lambda: fp8_linear("sparse weight", SWIGLU),
}


def wanted(name: str, x: torch.Tensor) -> torch.Tensor:
    gelu = {"activation": GELU_TANH, "activation_from": FROM}
    if name == "sparse weight":
        y = x.double() @ (WEIGHT * KEEP).double().T + BIAS.double()
        return torch.cat((y[:, :FROM], functional.gelu(y[:, FROM:], approximate="tanh")), 1).to(x.dtype)
    if name == "gated weight":
        y = x.double() @ (WEIGHT * KEEP).double().T + BIAS.double()
        acted, gate = y[:, FROM:].unflatten(1, (-1, 2, 8)).unbind(2)
        return torch.cat((y[:, :FROM], (functional.silu(acted) * gate).flatten(1)), 1).to(x.dtype)
    if name == "sparse activation":
        op = sparse_activation()
        return sparse_linear(x, op.weight, op.lora_down, BIAS, rank=16, norm_scale=True, **gelu)
    weight = round_rows(WEIGHT, KEEP if "sparse weight" in name else None)
    if "gated" in name:
        return fp8.fp8_linear(x, weight, BIAS, activation=SILU, activation_from=FROM, gated=True)
    return fp8.fp8_linear(x, weight, BIAS, prune=name == "fp8 sparse activation", **gelu)


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = 2**-9) -> bool:
    """But for the last bit of bf16 here and there, which sums in another order turn over."""
    return float((found.double() - expected.double()).norm() / expected.double().norm()) < limit


COMPILED = 2**-7  # GELU then follows y's rounding to bf16


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_definition_for_any_number_of_tokens(name: str) -> None:
    module = MODULES[name]()
    assert close(module(X), wanted(name, X))
    assert module(X[None, :0]).shape == (1, 0, module.out_features)
    assert module.out_features == (OUT - (OUT - FROM) // 2 if "gated" in name else OUT)
    strided = normal(TOKENS, 3, CHANNELS)
    assert close(module(strided[:, 1]), wanted(name, strided[:, 1].contiguous()))
    parts = module.parts(X, [FROM, module.out_features - FROM])
    assert torch.equal(torch.cat(parts, 1), module(X))


@pytest.mark.parametrize("name", MODULES)
def test_a_cast_leaves_packed_tensors_alone(name: str) -> None:
    module = nn.Sequential(op := MODULES[name](), nn.Linear(op.out_features, 8))
    before = {key: value.clone() for key, value in module[0].state_dict().items()}
    module.to(torch.float16)
    assert module[1].weight.dtype == torch.float16
    for key, value in module[0].state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(_bits(value), _bits(before[key]))
    assert all(value.is_meta for value in module.to("meta").state_dict().values())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", MODULES)
def test_diffusers_takes_everything_off_a_gpu_again(name: str) -> None:
    """By groups with a stream too, where it forgets buffers; and it finds the model's dtype."""
    module = MODULES[name]()
    assert get_parameter_dtype(module) == module.bias.dtype == torch.bfloat16
    group = ModuleGroup(
        [module], torch.device("cpu"), torch.device("cpu"), module, stream=object(), record_stream=True,
        low_cpu_mem_usage=True,
    )  # fmt: skip
    kept = {name: held.data_ptr() for name, held in module.state_dict().items()}
    for held in module.state_dict(keep_vars=True).values():
        held.data = held.data.clone()  # as on a GPU
    group.offload_()
    assert {name: held.data_ptr() for name, held in module.state_dict().items()} == kept


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_module_compiles_whole(name: str, backend: str) -> None:
    torch._dynamo.reset()
    module = MODULES[name]()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        assert close(compiled(X), module(X), COMPILED)
        assert close(compiled(X[:7]), module(X[:7]), COMPILED)


@pytest.mark.parametrize("producer", ["none", "norm", "gelu", "gated"])
def test_producers_are_their_definitions(producer: str) -> None:
    given: dict[str, Any] = {"norm": Norm(GAIN, SHIFT, True, 1e-5), "gelu": Gelu(), "gated": Gated(GATE)}
    z = produce(X, given[producer]) if producer in given else X
    norm = (GAIN, SHIFT) if producer == "norm" else (None, None)
    gate = GATE if producer == "gated" else None
    op = sparse_activation()
    y = operators.sparse_activation(
        X, op.weight, op.lora_down, BIAS, 16, True, FROM, producer, *norm, gate, True, 1e-5
    )
    assert close(y, wanted("sparse activation", z))
    linear = fp8_linear("sparse weight")
    x = torch.cat((X, GATE), 1) if producer == "gated" else X
    tensors = linear.weight, linear.metadata, linear.weight_scale, BIAS
    y = operators.fp8_linear(
        x, *tensors, "sparse weight", GELU_TANH, FROM, False, producer, *norm, True, 1e-5
    )
    assert close(y, wanted("fp8 sparse weight", z))


def test_the_product_of_what_torch_rounded_is_the_whole_op() -> None:
    for operand in ("dense", "sparse weight"):
        linear, rounded = fp8_linear(operand), round_rows(X)
        tensors = linear.weight, linear.metadata, linear.weight_scale, BIAS
        y = operators.fp8_product(rounded.values, rounded.scale, *tensors, GELU_TANH, FROM, False)
        assert close(y, wanted(f"fp8 {operand}", X))


def test_the_ops_are_what_they_say_to_torch() -> None:
    op, linear = sparse_activation(), fp8_linear("sparse weight")
    packed = sparse_weight()
    rounded: Rounded = round_rows(X)
    tensors = linear.weight, linear.metadata, linear.weight_scale, BIAS
    norm = "norm", GAIN, SHIFT.contiguous()
    # torch cannot compare e4m3 before and after a call, which its check of the schema does.
    others = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"
    for function, arguments in (
        (operators.sparse_weight, (X, packed.values, packed.metadata, BIAS, 90, SILU, FROM, True)),
        (operators.sparse_weight, (X, packed.values, packed.metadata, BIAS, 90, GELU_TANH, FROM, False)),
        (
            operators.sparse_activation,
            (X, op.weight, op.lora_down, BIAS, 16, True, FROM, *norm, None, True, 1e-5),
        ),
        (operators.fp8_linear, (X, *tensors, "sparse weight", SILU, FROM, True, *norm, True, 1e-5)),
        (operators.fp8_product, (rounded.values, rounded.scale, *tensors, GELU_TANH, FROM, False)),
    ):
        eight = any(isinstance(each, torch.Tensor) and each.dtype == E4M3 for each in arguments)
        torch.library.opcheck(function, arguments, test_utils=others if eight else "ALL")


class Attention(nn.Module):
    """Three readers of one tensor."""

    def __init__(self, merged: Merged) -> None:
        super().__init__()
        self.q, self.k, self.v = (Reader(merged, i) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = functional.layer_norm(x, (CHANNELS,))
        return self.q(z) * self.k(z) + self.v(z)


def test_readers_of_one_tensor_are_computed_once_and_hold_nothing() -> None:
    torch._dynamo.reset()
    linear = fp8_linear("sparse weight")
    merged, calls = Merged(linear, [64, 64, 64]), []
    module = Attention(merged)
    linear.register_buffer("unused", None)
    rows = linear.rows
    linear.rows = lambda x: calls.append(len(x)) or rows(x)  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        eager = module(X)
        assert calls == [TOKENS] and not merged._held
        y = linear(functional.layer_norm(X, (CHANNELS,)))
        assert torch.equal(eager, y[:, :64] * y[:, 64:128] + y[:, 128:])
        module.q(X)  # alone: what the others would take is dropped with the next tensor
        assert torch.equal(module(X), eager) and not merged._held
    del linear.rows
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(2):
            assert close(compiled(X), eager, COMPILED)
    products = [node for node in counter.graphs[0].graph.nodes if "lynx" in str(node.target)]
    assert len(products) == 1 and counter.frame_count == 1 and not merged._held
