# SPDX-License-Identifier: Apache-2.0
"""The feed-forwards of diffusers' transformers: what is between their linears is found, in every form they write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, SwiGLU
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from diffusers.models.transformers.transformer_z_image import FeedForward as ZImageFeedForward
from torch.nn import functional

from lynx_compile.models.structure import LinearGroup
from lynx_compile.ops.functions import DOMAIN, WEIGHT_OP
from lynx_compile.ops.sparse_linear import APART, GATE_FIRST, GELU_ERF, GELU_TANH, SILU, X_FIRST, keep_mask
from lynx_compile.passes import rewrite as rewrite_module
from lynx_compile.passes.compensate import SparseLinearWeights, save_weights
from lynx_compile.passes.export import export
from lynx_compile.passes.rewrite import SparseNode, rewrite
from lynx_compile.passes.select import SparsityPlan, select
from lynx_compile.recipe import Sparsity
from tests.passes.exact import fp8_plan, fp8_weights
from tests.passes.test_match import _error, _linear, _pair, _producers

CHANNELS, HIDDEN = 64, 128


class Between(torch.nn.Module):
    """``up`` ── ``between`` ── ``down``."""

    def __init__(self, up: int, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.between, self.down = (
            torch.nn.Linear(CHANNELS, up),
            between,
            torch.nn.Linear(HIDDEN, CHANNELS),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))


class Diffusers(torch.nn.Module):
    """As diffusers' own ``FeedForward`` puts it together."""

    def __init__(self, up: torch.nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, torch.nn.Linear(HIDDEN, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Model(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.inner(x),)


def _dit(inner: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """A ``DiT`` as far as export and rewrite read one; its first groups are what reads x."""
    module = Model(inner)
    paths = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    for path in paths:
        linear = module.get_submodule(path)
        if linear.bias is None:  # so that _naive finds one to save; zeros change nothing
            linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    last = next(path for path in paths if module.get_submodule(path).in_features >= HIDDEN)
    groups = tuple(
        LinearGroup(names[0], tuple(_linear(module, name) for name in names), 8)
        for names in ([path for path in paths if path != last], [last])
    )
    inputs = {"x": torch.randn(2, 8, CHANNELS).to(dtype)}
    return SimpleNamespace(
        module=module, module_on_cpu=lambda dtype: copy.deepcopy(module).to(dtype), dtype=dtype, inputs=inputs,
        arguments=inputs, axes=(), groups=groups, linears=[linear for group in groups for linear in group.linears],
    )  # fmt: skip


def _swish_of_the_second(h: torch.Tensor) -> torch.Tensor:
    value, gate = h.chunk(2, -1)
    return functional.silu(gate) * value


def _tanh_gelu_of_the_first(h: torch.Tensor) -> torch.Tensor:
    gate, value = h.split(HIDDEN, -1)
    return value * functional.gelu(gate, approximate="tanh")


def _neither_half(h: torch.Tensor) -> torch.Tensor:
    """The gate is not what follows x, but overlaps with it."""
    return functional.silu(h[..., :HIDDEN]) * h[..., HIDDEN // 2 : HIDDEN // 2 + HIDDEN]


# What is between the linears: [the activation, where x and its gate lie].
GATED: dict[str, tuple[Callable[[], torch.nn.Module], int, int]] = {
    "diffusers' GEGLU": (lambda: Diffusers(GEGLU(CHANNELS, HIDDEN)), GELU_ERF, GATE_FIRST),
    "diffusers' SwiGLU": (lambda: Diffusers(SwiGLU(CHANNELS, HIDDEN)), SILU, GATE_FIRST),
    "FLUX.2's": (lambda: Flux2FeedForward(CHANNELS, inner_dim=HIDDEN, bias=True), SILU, X_FIRST),
    "Z-Image's": (lambda: ZImageFeedForward(CHANNELS, HIDDEN), SILU, X_FIRST),
    "SiLU of the second half": (lambda: Between(2 * HIDDEN, _swish_of_the_second), SILU, GATE_FIRST),
    "GELU of the first half": (lambda: Between(2 * HIDDEN, _tanh_gelu_of_the_first), GELU_TANH, X_FIRST),
    "neither half": (lambda: Between(2 * HIDDEN, _neither_half), SILU, APART),
}
IN_BF16 = ("FLUX.2's", "diffusers' GEGLU", "diffusers' GELU", "GELU of the first half")  # some of each kind


def _in_dtypes(names: Iterable[str]) -> pytest.MarkDecorator:
    """All in float32, in which ONNX Runtime computes, and some in bfloat16, in which constants look otherwise."""
    cases = [(name, torch.float32) for name in names] + [
        (name, torch.bfloat16) for name in names if name in IN_BF16
    ]
    return pytest.mark.parametrize(
        ("name", "dtype"), cases, ids=[f"{name}, {dtype}" for name, dtype in cases]
    )


@_in_dtypes(GATED)
def test_a_gated_activation_becomes_part_of_what_reads_it(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, activation, halves = GATED[name]
    dit = _dit(make(), dtype)
    fused, _ = pair = _pair(dit, export(dit, tmp_path / "dense.onnx", dtype), tmp_path)
    assert [node.producer for node in fused.sparse] == [None, "gated"]
    graph = onnx.load(fused.path, load_external_data=False).graph
    node = next(node for node in graph.node if node.name == fused.sparse[1].name)
    attributes = {a.name: oh.get_attribute_value(a) for a in node.attribute}
    assert (attributes["producer_activation"], attributes["halves"]) == (activation, halves)
    assert (node.input[0] == node.input[-1]) == (halves != APART)
    # What cut the halves is gone: the node reads what the first one wrote.
    left = {node.op_type for node in graph.node if node.domain != DOMAIN}
    assert left == (set() if halves else {"Slice"})
    if dtype == torch.float32:  # ONNX Runtime has no bf16 here
        assert _error(pair, dit) < 2e-5


GELUS: dict[str, tuple[Callable[[], torch.nn.Module], int | None]] = {
    "diffusers' GELU": (lambda: Diffusers(GELU(CHANNELS, HIDDEN)), GELU_ERF),
    "diffusers' GELU, tanh": (lambda: Diffusers(GELU(CHANNELS, HIDDEN, approximate="tanh")), GELU_TANH),
    "diffusers' ApproximateGELU": (lambda: Diffusers(ApproximateGELU(CHANNELS, HIDDEN)), None),
}


@_in_dtypes(GELUS)
@pytest.mark.parametrize("fused_in", ["epilogue", "producer"])
def test_both_forms_of_gelu_are_fused(name: str, fused_in: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In the epilogue of the linear in front, or, where that stays dense, by the node behind."""
    torch.manual_seed(0)
    make, activation = GELUS[name]
    dit = _dit(make(), dtype)
    first = dit.groups[0].linears[0].path
    sparsity = Sparsity(operand={first: "none"}) if fused_in == "producer" else None
    fused, _ = pair = _pair(dit, export(dit, tmp_path / "dense.onnx", dtype), tmp_path, sparsity)
    graph = onnx.load(fused.path, load_external_data=False).graph
    attributes = [
        {a.name: oh.get_attribute_value(a) for a in node.attribute}
        for node in graph.node
        if node.domain == DOMAIN
    ]
    if activation is None:  # x * sigmoid(1.702 x) is neither
        assert {node.producer for node in fused.sparse} == {None} and not any(
            a["activation"] for a in attributes
        )
    elif fused_in == "producer":
        assert _producers(fused) == {dit.linears[-1].path: "gelu"}
        assert attributes[0]["producer_activation"] == activation
    else:
        assert [a["activation"] for a in attributes] == [activation, 0]
    if dtype == torch.float32:
        assert _error(pair, dit) < 2e-5


def test_fp8_holds_every_form_too(tmp_path: Path) -> None:
    """The other form of GELU in the epilogue of the node in front, a gate in the node behind, which has to round x."""
    torch.manual_seed(0)
    for name in ("diffusers' GEGLU", "FLUX.2's"):
        make, activation, _ = GATED[name]
        first, second = _in_fp8(_dit(make()), tmp_path)
        assert (first.activation, first.gated, first.out_channels) == (0, None, 2 * HIDDEN)
        assert second.producer == "gated"
        graph = onnx.load(tmp_path / "fp8.onnx", load_external_data=False).graph
        (node,) = (node for node in graph.node if node.name == second.name)
        assert {a.name: a.i for a in node.attribute}["producer_activation"] == activation
    first, second = _in_fp8(_dit(GELUS["diffusers' GELU"][0]()), tmp_path)
    assert (first.activation, first.gated, second.producer) == (GELU_ERF, None, None)


def _in_fp8(dit: Any, folder: Path) -> tuple[SparseNode, SparseNode]:
    """Both nodes of a file with 2:4 weights in FP8, which makes what the dense one does but for the rounding."""
    plan = fp8_plan(dit.groups, lambda _: "weight")
    with torch.no_grad():
        for group in plan.groups:
            for linear in group.linears:
                weight = dit.module.get_submodule(linear.path).weight
                weight.copy_(torch.where(keep_mask(weight), weight, 0))
    dense = export(dit, folder / "dense.onnx")
    lynx = rewrite(dense, plan, fp8_weights(dit.module, plan, folder), folder / "fp8.onnx")
    wanted, found = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
            None, {"x": dit.inputs["x"].numpy()}
        )[0]
        for path in (dense.path, lynx.path)
    )
    assert np.linalg.norm(found - wanted) < 0.08 * np.linalg.norm(wanted)
    first, second = lynx.sparse
    return first, second


def _plan_of_weights(dit: Any, folder: Path) -> tuple[SparsityPlan, list[Path]]:
    """2:4 weights for all linears: of each group of 4 the first two."""
    plan = select(dit.groups, Sparsity(operand="weight"))
    files = []
    for index, group in enumerate(plan.groups):
        linears = [dit.module.get_submodule(linear.path) for linear in group.linears]
        weight = torch.cat([linear.weight.detach() for linear in linears]).float()
        weight = (weight.unflatten(1, (-1, 4)) * torch.tensor([1.0, 1, 0, 0])).flatten(1)
        solved = SparseLinearWeights(
            tuple(linear.path for linear in group.linears), tuple(len(linear.weight) for linear in linears), weight,
            torch.zeros(1, weight.shape[1]), torch.cat([linear.bias.detach() for linear in linears]).float(), 0, False,
            (0.0,) * len(linears), "weight",
        )  # fmt: skip
        files.append(folder / f"{index}.safetensors")
        save_weights(files[-1], solved)
    return plan, files


class ParallelBlock(torch.nn.Module):
    """q, k, v and the feed-forward of one linear, as FLUX.2's single blocks have it."""

    def __init__(self, cut: str = "split") -> None:
        super().__init__()
        self.proj = torch.nn.Linear(CHANNELS, 3 * 64 + 2 * HIDDEN)
        self.out = torch.nn.Linear(64 + HIDDEN, CHANNELS)
        self.cut = cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(x)
        if self.cut == "split":
            qkv, mlp = y.split([3 * 64, 2 * HIDDEN], -1)
            gate, value = mlp[..., :HIDDEN], mlp[..., HIDDEN:]
        elif self.cut == "slice":
            qkv, gate, value = y[..., : 3 * 64], y[..., 3 * 64 : -HIDDEN], y[..., -HIDDEN:]
        else:  # in front
            value, gate, qkv = y.split([HIDDEN, HIDDEN, 3 * 64], -1)
        q, k, v = qkv.chunk(3, -1)
        return self.out(torch.cat((q * k + v, functional.silu(gate) * value), -1))


PARALLEL = {
    f"q, k, v beside it, {cut}": partial(ParallelBlock, cut) for cut in ("split", "slice", "in front")
}
IN_AN_EPILOGUE = {name: (make, form) for name, (make, form, halves) in GATED.items() if halves}
IN_AN_EPILOGUE |= {name: (make, SILU) for name, make in PARALLEL.items()}


@_in_dtypes(IN_AN_EPILOGUE)
def test_an_epilogue_holds_a_gated_activation(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, activation = IN_AN_EPILOGUE[name]
    dit = _dit(make(), dtype)
    dense = export(dit, tmp_path / "dense.onnx", dtype)
    plan, files = _plan_of_weights(dit, tmp_path)
    fused = rewrite(dense, plan, files, tmp_path / "fused.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite_module, "find_gate", lambda matches, dense: None)
        plain = rewrite(dense, plan, files, tmp_path / "plain.onnx")
    first, _ = fused.sparse
    rest = 3 * 64 if name in PARALLEL else 0
    assert (first.activation, first.activation_from, first.out_channels) == (
        activation,
        rest,
        rest + 2 * HIDDEN,
    )
    assert fused.plugins == {WEIGHT_OP: ("activation", "activation_from", "gated")}
    graph = onnx.load(fused.path, load_external_data=False).graph
    left = {node.op_type for node in graph.node if node.domain != DOMAIN}
    assert left == ({"Split", "Mul", "Add", "Concat"} if rest else set())
    assert [node.gated for node in plain.sparse] == [None, None]
    if dtype == torch.float32:
        assert _error((fused, plain), dit) < 2e-5


def _also_returned(h: torch.Tensor) -> torch.Tensor:
    gate, value = h.chunk(2, -1)
    return functional.silu(gate) * value + gate


def _activated_twice(h: torch.Tensor) -> torch.Tensor:
    gate, value = h.chunk(2, -1)
    activated = functional.silu(gate)
    return activated * value + activated


KEPT = {
    "overlapping halves": lambda: Between(2 * HIDDEN, _neither_half),
    "x read elsewhere": lambda: Between(2 * HIDDEN, _also_returned),
    "the activated read elsewhere": lambda: Between(2 * HIDDEN, _activated_twice),
    "its own gate": lambda: Between(HIDDEN, lambda h: functional.silu(h) * h),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_others_read_stays_out_of_the_epilogue(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dit = _dit(KEPT[name]())
    plan, files = _plan_of_weights(dit, tmp_path)
    lynx = rewrite(export(dit, tmp_path / "dense.onnx"), plan, files, tmp_path / "lynx.onnx")
    assert [(node.activation, node.gated) for node in lynx.sparse] == [(0, None)] * 2
