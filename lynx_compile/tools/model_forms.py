# SPDX-License-Identifier: Apache-2.0
"""A transformer in several forms that share everything but its blocks' large linears.

What the forms are made of is found by running the model once: which linears of a repeated block read one tensor, and
how many tokens they see. Weights are pruned by magnitude and rounded; how good that is plays no part in how fast it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lynx_compile.ops.fp8 import STEP, Rounded, pack, pack_dense, round_rows
from lynx_compile.ops.sparse_linear import GELU_TANH, keep_mask
from lynx_compile.ops.sparse_weight_linear import MetadataLayout, pack_weight
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.epilogue import NO_EPILOGUE, Epilogue
from lynx_compile.torch_ops.modules import Fp8Linear, SparseWeightLinear
from lynx_compile.torch_ops.readers import Merged, Reader
from lynx_compile.torch_ops.swap import Group, gelu_behind, linear_at, merge

LEAST_TOKENS = 64  # a modulation's linear sees one
FORMS = ("bf16_dense", "torch_fp8", "bf16_weight", "fp8_dense", "fp8_weight")


class DenseLinear(nn.Module):
    """Linears merged into one product in bf16, with GELU behind the channels from ``gelu_from`` on."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gelu_from: int) -> None:
        super().__init__()
        self.gelu_from = gelu_from
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def parts(self, x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        return _activated(self.product(x), sizes, self.gelu_from)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class TorchFp8Linear(DenseLinear):
    """The same with torch's own row-wise FP8 product, x rounded token by token, as torchao does it."""

    weight_scale: torch.Tensor

    def __init__(self, weight: Rounded, bias: torch.Tensor | None, gelu_from: int) -> None:
        super().__init__(weight.values, bias, gelu_from)
        self.register_buffer("weight_scale", weight.scale)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rounded = round_rows(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(
            rounded.values, self.weight.T, scale_a=rounded.scale[:, None], scale_b=self.weight_scale[None],
            bias=self.bias, out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)


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
    """The repeated blocks by their paths, as diffusers names their classes for regional compilation."""
    kinds: Any = module._repeated_blocks
    return {path: block for path, block in module.named_modules() if type(block).__name__ in kinds}


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
        readers: dict[int, list[str]] = {}
        alive: list[torch.Tensor] = []  # an address is one tensor's as long as it lives

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            tokens = [
                t.shape[1] for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim == 3
            ]
            kind = type(block).__name__, *tokens, *(name for name, _ in block.named_parameters())
            if kind not in seen:
                seen.add(kind)
                found.calls[path] = args, kwargs

        def leave(
            block: nn.Module, args: object, y: object, path: str = path, readers: dict[int, list[str]] = readers,
            alive: list[torch.Tensor] = alive,
        ) -> None:  # fmt: skip
            found.groups[path] = list(readers.values())
            alive.clear()

        handles += [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave),
        ]
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):

                def read(
                    linear: nn.Module, args: tuple[torch.Tensor, ...], name: str = name,
                    readers: dict[int, list[str]] = readers, alive: list[torch.Tensor] = alive,
                ) -> None:  # fmt: skip
                    x = args[0]
                    if x.numel() // x.shape[-1] >= LEAST_TOKENS:
                        alive.append(x)
                        readers.setdefault(id(x), []).append(name)

                handles.append(linear.register_forward_pre_hook(read))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def merge_dense(module: nn.Module, observed: Observed) -> None:
    """Turn ``module`` into its dense form: the linears of every group one product; their own weights are freed."""
    for path, block in blocks_of(module).items():
        for names in observed.groups[path]:
            ordered = sorted(names, key=lambda name: gelu_behind(block, name) is not None)
            linears = [linear_at(block, name) for name in ordered]
            sizes = [linear.out_features for linear in linears]
            plain = sum(
                size for name, size in zip(ordered, sizes, strict=True) if gelu_behind(block, name) is None
            )
            weight = torch.cat([linear.weight for linear in linears])
            biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
            bias = torch.cat(biases) if biases else None
            group = Group(tuple(ordered), tuple(sizes), plain)
            merge(block, group, DenseLinear(weight, bias, plain))


class Forms:
    """Makes forms of a dense one. FP8 weights that are not sparse are shared by the two forms that have them."""

    def __init__(self, dense: nn.Module) -> None:
        self.dense = dense
        self._rounded: dict[int, Rounded] = {}
        self._layout: MetadataLayout = operators.metadata_layout(torch.bfloat16)

    def make(self, form: str, **options: bool) -> nn.Module:
        if form == "bf16_dense":
            return self.dense
        makers: dict[str, Callable[[DenseLinear], nn.Module]] = {
            "torch_fp8": self._torch_fp8,
            "bf16_weight": self._bf16_weight,
            "fp8_dense": lambda linear: self._fp8_dense(linear, **options),
            "fp8_weight": lambda linear: self._fp8_weight(linear, **options),
        }
        return _copied(self.dense, makers[form], {})

    def release(self) -> None:
        """Forget the weights that are kept for the next form."""
        self._rounded.clear()

    def _torch_fp8(self, linear: DenseLinear) -> nn.Module:
        return TorchFp8Linear(self._dense_fp8(linear), linear.bias, linear.gelu_from)

    def _bf16_weight(self, linear: DenseLinear) -> nn.Module:
        values, metadata = pack_weight(linear.weight, keep_mask(linear.weight), self._layout)
        return SparseWeightLinear(
            values, metadata, _bias(linear), metadata_layout=self._layout, epilogue=_gelu(linear)
        )

    def _fp8_dense(self, linear: DenseLinear, **options: Any) -> nn.Module:
        rounded, channels = self._dense_fp8(linear), linear.weight.shape[1]
        values = (
            pack_dense(rounded.values) if channels % STEP else rounded.values
        )  # the same tensor, not a copy
        return Fp8Linear(
            values, None, rounded.scale, _bias(linear), in_features=channels, operand="dense",
            epilogue=_gelu(linear), **options,
        )  # fmt: skip

    def _fp8_weight(self, linear: DenseLinear, **options: Any) -> nn.Module:
        keep = keep_mask(linear.weight)
        rounded = round_rows(linear.weight, keep)
        values, metadata = pack(rounded.values, keep)
        return Fp8Linear(
            values, metadata, rounded.scale, _bias(linear), in_features=linear.weight.shape[1],
            operand="sparse weight", epilogue=_gelu(linear), **options,
        )  # fmt: skip

    def _dense_fp8(self, linear: DenseLinear) -> Rounded:
        key = linear.weight.data_ptr()
        if key not in self._rounded:
            self._rounded[key] = round_rows(linear.weight)
        return self._rounded[key]


def _gelu(linear: DenseLinear) -> Epilogue:
    return Epilogue(GELU_TANH, linear.gelu_from) if linear.gelu_from < len(linear.weight) else NO_EPILOGUE


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
