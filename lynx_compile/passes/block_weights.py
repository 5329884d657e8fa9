# SPDX-License-Identifier: Apache-2.0
"""Compensated weights by the linears of a block, where ``compensate`` writes them by nodes; and back again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch

from lynx_compile.files.tensors import load_keyed, save_keyed
from lynx_compile.models.structure import is_pointwise
from lynx_compile.ops.fp8 import pack, pack_dense
from lynx_compile.ops.sparse_linear import collapse_low_rank, expand_low_rank, keep_mask
from lynx_compile.passes.compensate import SparseLinearWeights, load_weights
from lynx_compile.passes.select import SparseGroup
from lynx_compile.recipe import NodeOperand
from lynx_compile.solve.linalg import moved
from lynx_compile.solve.tune import Outcome, Rows, TunedLinear, on_channels
from lynx_compile.torch_ops.fp8_bindings import Operand
from lynx_compile.torch_ops.modules import Fp8Linear

Files = Mapping[SparseGroup, Path]  # what ``compensate`` wrote
OPERANDS: dict[NodeOperand, Operand] = {
    "weight": "sparse weight", "none": "dense", "activation": "sparse activation",
}  # fmt: skip
TENSORS = tuple(field.name for field in fields(Rows) if field.name not in ("operand", "norm_scale"))


def inside_of(block: str, group: SparseGroup) -> list[str]:
    """The group's linears that stand in ``block``, by path."""
    return [linear.path for linear in group.linears if linear.path.startswith(f"{block}.")]


def rows_of(files: Files, block: str) -> dict[str, Rows]:
    """The weights of the linears in ``block``, by path."""
    found: dict[str, Rows] = {}
    for group, path in files.items():
        if inside := inside_of(block, group):
            parts = split(load_weights(path))
            found |= {linear: parts[linear] for linear in inside}
    return found


def tuned_linears(
    files: Files, block: str, rows: Mapping[str, Rows], device: torch.device, *, low_rank_alone: bool = False
) -> dict[str, TunedLinear]:
    """Modules of the linears in ``block``. What a node's linears share is tuned where all of them are in the block.

    They are made on ``device``: on a CPU, masks of a FLUX block's weights take seconds.

    ``low_rank_alone``: whether weights and biases stay as they are.
    """
    found: dict[str, TunedLinear] = {}
    for group in files:
        inside = inside_of(block, group)
        down = rows[inside[0]].lora_down if inside else None
        whole = len(inside) == len(group.linears)
        shared = None if down is None else torch.nn.Parameter(down.to(device, copy=True), requires_grad=whole)
        found |= {linear: TunedLinear(moved(rows[linear], device), shared) for linear in inside}
    return _low_rank_alone(found) if low_rank_alone else found


def all_linears(
    files: Files, rows: Mapping[str, Rows], device: torch.device, *, low_rank_alone: bool = False
) -> dict[str, TunedLinear]:
    """Modules of all the linears, by path; as of ``tuned_linears``."""
    found: dict[str, TunedLinear] = {}
    for group in files:
        down = rows[group.linears[0].path].lora_down
        shared = None if down is None else torch.nn.Parameter(down.to(device, copy=True))
        for linear in group.linears:
            found[linear.path] = TunedLinear(moved(rows[linear.path], device), shared)
    return _low_rank_alone(found) if low_rank_alone else found


def _low_rank_alone(linears: dict[str, TunedLinear]) -> dict[str, TunedLinear]:
    for tuned in linears.values():
        tuned.weight.requires_grad_(False)
        tuned.bias.requires_grad_(False)
    return linears


@contextmanager
def substituted(module: torch.nn.Module, linears: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Linears of ``module``, by path in it, compute as these meanwhile; they stay, since models ask for their dtype."""
    changed = substitute(module, linears)
    try:
        yield
    finally:
        for linear in changed:
            del linear.forward


def substitute(module: torch.nn.Module, linears: Mapping[str, torch.nn.Module]) -> list[torch.nn.Module]:
    """The same for good; the modules that were changed."""
    changed = []
    for path, new in linears.items():
        linear = module.get_submodule(path)
        linear.forward = partial(on_channels, new) if is_pointwise(linear) else new.forward
        changed.append(linear)
    return changed


class KernelLinear(torch.nn.Module):
    """An FP8 linear as the engine computes it: on a GPU by the kernels, sums included, on a CPU by their definition."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        super().__init__()
        assert rows.weight_scale is not None
        if rows.operand == "weight":
            values, metadata = pack(rows.weight, keep_mask(rows.weight.float()))
        else:
            values, metadata = pack_dense(rows.weight).clone(), None
        self.packed = Fp8Linear(
            values,  # copies: slices of a node's tensors can begin where no kernel can read
            metadata,
            rows.weight_scale.clone(),
            rows.bias.to(dtype, copy=True),
            in_features=rows.weight.shape[1],
            operand=OPERANDS[rows.operand],
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        y: torch.Tensor = self.packed(x.to(self.packed.bias.dtype))
        return y.to(x.dtype)


def node_linears(
    path: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, TunedLinear]:
    """Modules of a node's linears by path, from its file; they take no gradients."""
    found = {}
    for linear, rows in split(moved(load_weights(path), device)).items():
        down = None if rows.lora_down is None else torch.nn.Parameter(rows.lora_down)
        found[linear] = TunedLinear(rows, down).to(dtype=dtype).requires_grad_(False)
        found[linear].keep = None  # it is for gradients: what is pruned is 0
    return found


def kernel_linears(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, KernelLinear]:
    """``KernelLinear`` of an FP8 node's linears by path, from its file; the kernels take x in ``dtype``."""
    found = split(moved(load_weights(path), device))
    return {linear: KernelLinear(rows, dtype) for linear, rows in found.items()}


def split(weights: SparseLinearWeights) -> dict[str, Rows]:
    """A node's weights by its linears."""
    channels, rank = weights.in_channels, weights.rank
    sizes = weights.out_channels
    lora_up = collapse_low_rank(weights.weight, channels, rank).split(sizes) if rank else [None] * len(sizes)
    scale = [None] * len(sizes) if weights.weight_scale is None else weights.weight_scale.split(sizes)
    parts = zip(
        weights.linears,
        weights.weight[:, :channels].split(sizes),
        weights.bias.split(sizes),
        lora_up,
        scale,
        strict=True,
    )
    down = weights.lora_down if rank else None
    return {
        linear: Rows(weight, bias, weights.operand, weights.norm_scale, down, up, row_scale)
        for linear, weight, bias, up, row_scale in parts
    }


def joined(weights: SparseLinearWeights, rows: Mapping[str, Rows]) -> SparseLinearWeights:
    """A node's weights with ``rows`` for those of its linears that they have; the errors are left as they were."""
    parts = split(weights) | {linear: rows[linear] for linear in weights.linears if linear in rows}
    ordered = [parts[linear] for linear in weights.linears]
    weight, scale = torch.cat([part.weight for part in ordered]), None
    if weights.fp8:
        scale = torch.cat([_there(part.weight_scale) for part in ordered])
    elif weights.operand == "activation":
        ups = [part.lora_up for part in ordered if part.lora_up is not None]
        weight = expand_low_rank(weight, torch.cat(ups) if ups else weight.new_zeros(len(weight), 0))
    return replace(
        weights,
        weight=weight,
        lora_down=_there(ordered[0].lora_down) if weights.rank else weights.lora_down,
        bias=torch.cat([part.bias for part in ordered]),
        weight_scale=scale,
    )


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "all linears of a node have it or none"
    return tensor


def save_block(path: Path, key: str, rows: Mapping[str, Rows], outcome: Outcome) -> None:
    """Write a block that is done. ``key``: of everything that it depends on."""
    tensors = {
        f"{linear}:{name}": tensor
        for linear, part in rows.items()
        for name in TENSORS
        if (tensor := getattr(part, name)) is not None
    }
    facts = {
        "outcome": asdict(outcome),
        "linears": {linear: [part.operand, part.norm_scale] for linear, part in rows.items()},
    }
    save_keyed(path, key, tensors, facts)


def load_block(path: Path, key: str) -> tuple[dict[str, Rows], Outcome] | None:
    """What ``save_block`` wrote with this key; None where there is no such whole file."""
    done = load_keyed(path, key)
    if done is None:
        return None
    stored, facts = done
    tensors: dict[str, dict[str, torch.Tensor]] = {linear: {} for linear in facts["linears"]}
    for name_of_both, tensor in stored.items():
        linear, name = name_of_both.rsplit(":", 1)
        tensors[linear][name] = tensor
    rows = {
        linear: Rows(operand=operand, norm_scale=norm_scale, **tensors[linear])
        for linear, (operand, norm_scale) in facts["linears"].items()
    }
    return rows, Outcome(**facts["outcome"])
