# SPDX-License-Identifier: Apache-2.0
"""A transformer in several forms that share everything but its blocks' large linears.

What the forms are made of is found by running the model once: which linears of a repeated block read one tensor, and
how many tokens they see. Weights are pruned by magnitude and rounded; how good that is plays no part in how fast it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lynx_compile.models.structure import block_lists
from lynx_compile.ops.fp8 import STEP, Rounded, pack, pack_dense, round_rows
from lynx_compile.ops.sparse_linear import GATED_RUN, GELU_TANH, expand_low_rank, keep_mask
from lynx_compile.ops.sparse_weight_linear import MetadataLayout, gated_order, pack_weight
from lynx_compile.passes.block_weights import OPERANDS
from lynx_compile.passes.speed_table import DENSE, DENSE_FP8, Form
from lynx_compile.recipe import Sparsity
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.bindings import DTYPES
from lynx_compile.torch_ops.epilogue import NO_EPILOGUE, Epilogue
from lynx_compile.torch_ops.module_gates import ModuleGate, find_gate
from lynx_compile.torch_ops.modules import Fp8Linear, SparseActivationLinear, SparseWeightLinear
from lynx_compile.torch_ops.readers import Merged, Reader
from lynx_compile.torch_ops.swap import Group, gelu_behind, is_gate_last, linear_at, merge

LEAST_TOKENS = 64  # a modulation's linear sees one
FORMS = ("bf16_dense", "torch_fp8", "bf16_weight", "fp8_dense", "fp8_weight")  # of all linears alike
FORMS_AND_PLAN = (*FORMS, "plan")
PLAIN_MULTIPLE = 64  # rows before a gated epilogue: kGeluMultiple of plugins/kernels/tile_config.h
# The form of all linears that has a name of its own.
NAMES = {
    DENSE: "bf16_dense",
    Form("weight"): "bf16_weight",
    DENSE_FP8: "fp8_dense",
    Form("weight", fp8=True): "fp8_weight",
}


class DenseLinear(nn.Module):
    """Linears merged into one product in 16 bits, with GELU behind the channels from ``group.gelu_from`` on.

    ``gate``: of a product that makes it in its epilogue.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, group: Group, gate: ModuleGate | None = None
    ) -> None:
        super().__init__()
        self.group, self.gate = group, gate
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def parts(self, x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        return _activated(self.product(x), sizes, self.group.gelu_from)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class TorchFp8Linear(DenseLinear):
    """The same with torch's own row-wise FP8 product, x rounded token by token, as torchao does it."""

    weight_scale: torch.Tensor

    def __init__(self, weight: Rounded, bias: torch.Tensor | None, group: Group) -> None:
        super().__init__(weight.values, bias, group)
        self.register_buffer("weight_scale", weight.scale)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rounded = round_rows(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(
            rounded.values, self.weight.T, scale_a=rounded.scale[:, None], scale_b=self.weight_scale[None],
            bias=self.bias, out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)


class Mixed(nn.Module):
    """Linears that read one tensor and have several forms: ``products``, and of which linears each is."""

    def __init__(self, products: Sequence[nn.Module], members: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.products = nn.ModuleList(products)
        self.members = [list(each) for each in members]

    def parts(self, x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for product, members in zip(self.products, self.members, strict=True):
            linear: Any = product
            found |= zip(members, linear.parts(x, [sizes[index] for index in members]), strict=True)
        return [found[index] for index in range(len(sizes))]


def _activated(y: torch.Tensor, sizes: list[int], gelu_from: int) -> list[torch.Tensor]:
    parts, start = [], 0
    for part in y.split(sizes, -1):
        parts.append(functional.gelu(part, approximate="tanh") if start >= gelu_from else part)
        start += part.shape[-1]
    return parts


@dataclass
class Observed:
    """What a run showed: per block its groups of linears, and of each kind of block the first one's call."""

    groups: dict[str, list[list[str]]] = field(default_factory=dict)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks by their paths: those that the class names for regional compilation, as diffusers' do.

    Of others, the members of their lists of blocks.
    """
    if kinds := getattr(module, "_repeated_blocks", None):
        return {path: block for path, block in module.named_modules() if type(block).__name__ in kinds}
    lists = [(path, module.get_submodule(path)) for path in block_lists(module)]
    return {f"{path}.{name}": block for path, blocks in lists for name, block in blocks.named_children()}


def observe(module: nn.Module, call: dict[str, Any]) -> Observed:
    """Run a step and see what reads what."""
    found = Observed()
    with torch.no_grad(), _watched(module, found):
        module(**call)
    return found


@contextmanager
def _watched(module: nn.Module, found: Observed) -> Iterator[None]:
    handles = []
    seen: set[tuple[object, ...]] = set()
    for path, block in blocks_of(module).items():
        reads: list[tuple[str, torch.Tensor]] = []  # a tensor that lives keeps its identity

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            tokens = [
                t.shape[1] for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim == 3
            ]
            kind = type(block).__name__, *tokens, *(name for name, _ in block.named_parameters())
            if kind not in seen:
                seen.add(kind)
                found.calls[path] = args, kwargs

        def leave(
            block: nn.Module, args: object, y: object, path: str = path,
            reads: list[tuple[str, torch.Tensor]] = reads,
        ) -> None:  # fmt: skip
            found.groups[path] = _groups(reads)
            reads.clear()

        handles += [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave),
        ]
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):

                def read(
                    linear: nn.Module, args: tuple[torch.Tensor, ...], name: str = name,
                    reads: list[tuple[str, torch.Tensor]] = reads,
                ) -> None:  # fmt: skip
                    reads.append((name, args[0]))

                handles.append(linear.register_forward_pre_hook(read))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(reads: Sequence[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Linears that are called once, for many tokens, by the tensor that they read."""
    names, readers = [name for name, _ in reads], dict[int, list[str]]()
    for name, x in reads:
        if names.count(name) == 1 and x.numel() // x.shape[-1] >= LEAST_TOKENS:
            readers.setdefault(id(x), []).append(name)
    return list(readers.values())


def merge_dense(module: nn.Module, observed: Observed) -> None:
    """Turn ``module`` into its dense form: the linears of every group one product; their own weights are freed."""
    for path in blocks_of(module):
        for names in observed.groups.get(path, []):
            paths = [f"{path}.{name}" for name in names]
            ordered = sorted(paths, key=lambda each: gelu_behind(module, each) is not None)
            linears = [linear_at(module, each) for each in ordered]
            sizes = tuple(linear.out_features for linear in linears)
            plain = sum(
                size for each, size in zip(ordered, sizes, strict=True) if gelu_behind(module, each) is None
            )
            group = Group(tuple(ordered), sizes, plain)
            weight, bias = torch.cat([linear.weight for linear in linears]), _biases(linears)
            merge(module, group, DenseLinear(weight, bias, group, _gate(module, group)))


def _biases(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """Of all of them; zeros for those without one, where others have one."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
    ])  # fmt: skip


def _gate(module: nn.Module, group: Group) -> ModuleGate | None:
    """A gated activation that an epilogue can make, as ``rewrite`` has it."""
    gate = find_gate(module, group.linears, group.sizes)
    if gate is None or gate.channels % (GATED_RUN // 2) or not is_gate_last(group, gate):
        return None
    return None if (sum(group.sizes) - 2 * gate.channels) % PLAIN_MULTIPLE else gate


class Forms:
    """Makes forms of a dense one. FP8 weights that are not sparse are shared by the forms that have them.

    ``plan``: the form of every linear by its path, dense where it names none; ``sparsity``: rank and scale of pruned
    activations.
    """

    def __init__(
        self, dense: nn.Module, plan: Mapping[str, Form] | None = None, sparsity: Sparsity | None = None
    ) -> None:
        self.dense = dense
        self.plan, self.sparsity = plan or {}, sparsity or Sparsity()
        self._rounded: dict[int, Rounded] = {}
        self._layout: MetadataLayout = operators.metadata_layout(_dtype(dense))

    def make(self, form: str, **options: bool) -> nn.Module:
        """The module in one of ``FORMS_AND_PLAN``. ``options``: of ``Fp8Linear``."""
        if form == "bf16_dense":
            return self.dense
        of_all = next((each for each, name in NAMES.items() if name == form), None)
        made: dict[DenseLinear, nn.Module] = {}

        def make(linear: DenseLinear) -> nn.Module:
            if form == "torch_fp8":
                made[linear] = TorchFp8Linear(self._dense_fp8(linear), linear.bias, linear.group)
            elif of_all is not None:
                made[linear] = self._product(linear, of_all, options)
            else:
                made[linear] = self._planned(linear, options)
            return made[linear]

        module = _copied(self.dense, make, {})
        for linear, product in made.items():
            if isinstance(product, SparseWeightLinear) and product.epilogue.gated:
                merge(module, Group(linear.group.linears, linear.group.sizes, 0, gate=linear.gate), product)
        return module

    def uniform(self) -> str | None:
        """The name of the form that the plan gives to every linear; None where it mixes them."""
        forms = {
            self.plan.get(path, DENSE)
            for linear in dense_linears(self.dense)
            for path in linear.group.linears
        }
        return NAMES.get(next(iter(forms))) if len(forms) == 1 else None

    def release(self) -> None:
        """Forget the weights that are kept for the next form."""
        self._rounded.clear()

    def _planned(self, linear: DenseLinear, options: dict[str, bool]) -> nn.Module:
        """One product where all linears have one form, else one for each form."""
        forms = [self.plan.get(path, DENSE) for path in linear.group.linears]
        if len(set(forms)) == 1:
            return self._product(linear, forms[0], options)
        members = [[i for i, each in enumerate(forms) if each == form] for form in dict.fromkeys(forms)]
        products = [self._product(_part(linear, each), forms[each[0]], options) for each in members]
        return Mixed(products, members)

    def _product(self, linear: DenseLinear, form: Form, options: dict[str, bool]) -> nn.Module:
        if form == DENSE:
            return linear
        if form.fp8:
            return self._fp8(linear, form, options)
        return self._bf16_weight(linear) if form.operand == "weight" else self._bf16_activation(linear)

    def _bf16_weight(self, linear: DenseLinear) -> nn.Module:
        order, epilogue = _epilogue(linear)
        weight = linear.weight[order]
        values, metadata = pack_weight(weight, keep_mask(weight), self._layout)
        return SparseWeightLinear(
            values, metadata, _bias(linear)[order], metadata_layout=self._layout, epilogue=epilogue
        )

    def _bf16_activation(self, linear: DenseLinear) -> nn.Module:
        channels = linear.weight.shape[1]
        rank = self.sparsity.rank_for(channels)
        return SparseActivationLinear(
            expand_low_rank(linear.weight, linear.weight[:, :rank]), linear.weight[: max(rank, 1)].clone(),
            _bias(linear), rank=rank, norm_scale=self.sparsity.uses_norm_scale, epilogue=_gelu(linear),
        )  # fmt: skip

    def _fp8(self, linear: DenseLinear, form: Form, options: dict[str, bool]) -> nn.Module:
        channels = linear.weight.shape[1]
        if form.operand == "weight":
            keep = keep_mask(linear.weight)
            rounded = round_rows(linear.weight, keep)
            values, metadata = pack(rounded.values, keep)
        else:
            rounded, metadata = self._dense_fp8(linear), None
            values = pack_dense(rounded.values) if channels % STEP else rounded.values
        return Fp8Linear(
            values, metadata, rounded.scale, _bias(linear), in_features=channels, operand=OPERANDS[form.operand],
            epilogue=_gelu(linear), **options,
        )  # fmt: skip

    def _dense_fp8(self, linear: DenseLinear) -> Rounded:
        key = linear.weight.data_ptr()
        if key not in self._rounded:
            self._rounded[key] = round_rows(linear.weight)
        return self._rounded[key]


def _part(linear: DenseLinear, members: Sequence[int]) -> DenseLinear:
    """Some of the linears; no gate can be made of them."""
    group = linear.group
    pieces = linear.weight.split(list(group.sizes))
    biases = None if linear.bias is None else linear.bias.split(list(group.sizes))
    sizes = tuple(group.sizes[i] for i in members)
    starts = [sum(group.sizes[:i]) for i in members]
    plain = sum(size for size, start in zip(sizes, starts, strict=True) if start < group.gelu_from)
    own = Group(tuple(group.linears[i] for i in members), sizes, plain)
    bias = None if biases is None else torch.cat([biases[i] for i in members])
    return DenseLinear(torch.cat([pieces[i] for i in members]), bias, own)


def dense_linears(module: nn.Module) -> list[DenseLinear]:
    """The merged linears of a dense form."""
    return [each for each in module.modules() if isinstance(each, DenseLinear)]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(t.dtype for t in (*module.parameters(), *module.buffers()) if t.dtype in DTYPES)


def _epilogue(linear: DenseLinear) -> tuple[slice | list[int], Epilogue]:
    """What a product does behind it, and the order of the weight's rows that it wants for that."""
    if (gate := linear.gate) is None:
        return slice(None), _gelu(linear)
    rows = len(linear.weight)
    return gated_order(rows, *gate.rows), Epilogue(gate.activation, rows - 2 * gate.channels, gated=True)


def _gelu(linear: DenseLinear) -> Epilogue:
    first = linear.group.gelu_from
    return Epilogue(GELU_TANH, first) if first < len(linear.weight) else NO_EPILOGUE


def _bias(linear: DenseLinear) -> torch.Tensor:
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias


def _copied(
    module: nn.Module, make: Callable[[DenseLinear], nn.Module], copies: dict[nn.Module, nn.Module]
) -> nn.Module:
    """``module`` with its own tree of modules and the same tensors, but for its ``DenseLinear``s."""
    if module in copies:
        return copies[module]
    if isinstance(module, DenseLinear):
        copies[module] = make(module)
        return copies[module]
    copied = copies[module] = copy.copy(module)
    copied._modules = {
        name: child and _copied(child, make, copies) for name, child in module._modules.items()
    }
    if isinstance(copied, Merged):
        copied._held = {}
    assert not isinstance(copied, Reader) or isinstance(copied.merged, Merged)
    return copied


def weight_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers, each once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())
