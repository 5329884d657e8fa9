# SPDX-License-Identifier: Apache-2.0
"""Sparse linears that lose nothing, so that a rewritten graph must equal the dense one: all of W is the low rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lynx_compile.models.structure import LinearGroup
from lynx_compile.ops.sparse_linear import expand_low_rank
from lynx_compile.passes.compensate import SparseLinearWeights
from lynx_compile.passes.compensate import _save as save_weights
from lynx_compile.passes.select import Decision, SparseGroup, SparsityPlan


def exact_plan(groups: Sequence[LinearGroup]) -> SparsityPlan:
    """Every candidate with pruned activations; of linears of another kind the reason why not."""
    decisions = [
        Decision(linear, "activation" if linear.refusal is None else "none", linear.refusal or "")
        for group in groups
        for linear in group.linears
    ]
    sparse = [
        SparseGroup(group.name, linears, group.tokens, "activation", calls=group.calls)
        for group in groups
        if (linears := tuple(linear for linear in group.linears if linear.refusal is None))
    ]
    return SparsityPlan(tuple(decisions), tuple(sparse))


def exact_weights(module: torch.nn.Module, plan: SparsityPlan, folder: Path) -> list[Path]:
    """One file a group: W' = 0 and A = 1, B = W, so that s (z~ W'^T) + (x A^T) B^T = x W^T."""
    files = []
    for index, group in enumerate(plan.groups):
        linears = [module.get_submodule(linear.path) for linear in group.linears]
        weight = torch.cat([linear.weight.detach().float().flatten(1) for linear in linears])
        biases = [
            torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach().float()
            for linear in linears
        ]
        solved = SparseLinearWeights(
            linears=tuple(linear.path for linear in group.linears),
            out_channels=tuple(len(linear.weight) for linear in linears),
            weight=expand_low_rank(torch.zeros_like(weight), weight),
            lora_down=torch.eye(weight.shape[1]),
            bias=torch.cat(biases),
            rank=weight.shape[1],
            norm_scale=False,
            errors=(0.0,) * len(linears),
        )
        files.append(folder / f"{index}.safetensors")
        save_weights(files[-1], solved)
    return files
