# SPDX-License-Identifier: Apache-2.0
"""Plans and weights that need no calibration.

``exact_weights`` lose nothing, so that a rewritten graph must equal the dense one: all of W is the low rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from lynx_compile.models.structure import LinearGroup
from lynx_compile.ops.fp8 import round_rows
from lynx_compile.ops.sparse_linear import expand_low_rank, keep_mask
from lynx_compile.passes.compensate import SparseLinearWeights, save_weights
from lynx_compile.passes.select import Decision, SparseGroup, SparsityPlan
from lynx_compile.recipe import NodeOperand

SIZE = 64


class Layers(torch.nn.Module):
    """A block whose MLP serves image and text, and one of convolutions, as Sana's feed-forward has them."""

    def __init__(self) -> None:
        super().__init__()
        up, down = torch.nn.Linear(SIZE, 2 * SIZE), torch.nn.Linear(2 * SIZE, SIZE)
        wide, deep = (
            torch.nn.Conv2d(SIZE, 2 * SIZE, 1),
            torch.nn.Conv2d(2 * SIZE, 2 * SIZE, 3, 1, 1, groups=2 * SIZE),
        )
        narrow = torch.nn.Conv2d(2 * SIZE, SIZE, 1, bias=False)
        self.blocks = torch.nn.ModuleList(
            [
                torch.nn.ModuleDict({"up": up, "down": down}),
                torch.nn.ModuleDict({"wide": wide, "deep": deep, "narrow": narrow}),
            ]
        )  # fmt: skip

    def forward(
        self, step: torch.Tensor, image: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mlp, convolutions = self.blocks
        image = image + step
        image, text = (mlp["down"](functional.gelu(mlp["up"](x), approximate="tanh")) for x in (image, text))
        pixels = image.movedim(-1, 1).unflatten(-1, (2, 4))
        pixels = convolutions["narrow"](convolutions["deep"](functional.silu(convolutions["wide"](pixels))))
        return pixels, text


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
    return _weights(module, plan, folder, exact=True)


def pruned_weights(module: torch.nn.Module, plan: SparsityPlan, folder: Path) -> list[Path]:
    """One file a group: W' = W and a low rank of 16 that adds nothing. What is pruned is lost."""
    return _weights(module, plan, folder, exact=False)


def _weights(module: torch.nn.Module, plan: SparsityPlan, folder: Path, *, exact: bool) -> list[Path]:
    files = []
    for index, group in enumerate(plan.groups):
        linears = [module.get_submodule(linear.path) for linear in group.linears]
        weight = torch.cat([linear.weight.detach().float().flatten(1) for linear in linears])
        biases = [
            torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach().float()
            for linear in linears
        ]
        rank = weight.shape[1] if exact else 16
        zeros, low_rank = torch.zeros_like(weight), torch.zeros(len(weight), 16)
        solved = SparseLinearWeights(
            linears=tuple(linear.path for linear in group.linears),
            out_channels=tuple(len(linear.weight) for linear in linears),
            weight=expand_low_rank(zeros, weight) if exact else expand_low_rank(weight, low_rank),
            lora_down=torch.eye(rank, weight.shape[1]),
            bias=torch.cat(biases),
            rank=rank,
            norm_scale=False,
            errors=(0.0,) * len(linears),
        )
        files.append(folder / f"{index}.safetensors")
        save_weights(files[-1], solved)
    return files


def fp8_plan(groups: Sequence[LinearGroup], operand_of: Callable[[str], NodeOperand]) -> SparsityPlan:
    """Every candidate in FP8, with the operand that ``operand_of`` says of its path."""
    decisions, parts = [], []
    for group in groups:
        made = [
            Decision(linear, operand_of(linear.path), "", fp8=True)
            if linear.refusal is None
            else Decision(linear, "none", linear.refusal)
            for linear in group.linears
        ]
        decisions += made
        for operand in sorted({decision.operand for decision in made if decision.fp8}):
            linears = tuple(one.linear for one in made if one.fp8 and one.operand == operand)
            parts.append(SparseGroup(group.name, linears, group.tokens, operand, fp8=True, calls=group.calls))
    return SparsityPlan(tuple(decisions), tuple(parts))


def fp8_weights(module: torch.nn.Module, plan: SparsityPlan, folder: Path) -> list[Path]:
    """One file a group: W as it is, pruned by magnitude where it is the operand, and rounded."""
    files = []
    for index, group in enumerate(plan.groups):
        linears = [module.get_submodule(linear.path) for linear in group.linears]
        weight = torch.cat([linear.weight.detach().float().flatten(1) for linear in linears])
        biases = [
            torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach().float()
            for linear in linears
        ]
        rounded = round_rows(weight, keep_mask(weight) if group.operand == "weight" else None)
        solved = SparseLinearWeights(
            linears=tuple(linear.path for linear in group.linears),
            out_channels=tuple(len(linear.weight) for linear in linears),
            weight=rounded.values,
            lora_down=torch.zeros(1, weight.shape[1]),
            bias=torch.cat(biases),
            rank=0,
            norm_scale=False,
            errors=(0.0,) * len(linears),
            operand=group.operand,
            weight_scale=rounded.scale,
        )
        files.append(folder / f"{index}.fp8.safetensors")
        save_weights(files[-1], solved)
    return files


def two_of_four(module: torch.nn.Module, plan: SparsityPlan) -> None:
    """Leave two of four of the plan's weights, of each group of channels those that are largest."""
    for linear in (linear for group in plan.groups for linear in group.linears):
        weight = module.get_submodule(linear.path).weight
        weight.data *= keep_mask(weight.data)


def two_of_four_weights(module: torch.nn.Module, plan: SparsityPlan, folder: Path) -> list[Path]:
    """One file a group of 2:4 weights: what ``two_of_four`` has left."""
    files = []
    for index, group in enumerate(plan.groups):
        linears = [module.get_submodule(linear.path) for linear in group.linears]
        biases = [
            torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears
        ]
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        solved = SparseLinearWeights(
            linears=tuple(linear.path for linear in group.linears),
            out_channels=tuple(len(linear.weight) for linear in linears),
            weight=weight,
            lora_down=torch.zeros(1, weight.shape[1]),
            bias=torch.cat([bias.detach().float() for bias in biases]),
            rank=0,
            norm_scale=False,
            errors=(0.0,) * len(linears),
            operand="weight",
        )
        files.append(folder / f"{index}.safetensors")
        save_weights(files[-1], solved)
    return files
