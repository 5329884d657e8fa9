# SPDX-License-Identifier: Apache-2.0
"""How long the stages of a compilation will take: what they multiply, at the rate at which this machine does that.

Rates are those of one large product, tried for a moment. What does not multiply (reading weights, rounding, tracing) is
in the shares of them that stages were seen to reach, on two cores and on an H100, and in seconds a block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from lynx_compile.models.place import device_type
from lynx_compile.models.recording import Group, Recording
from lynx_compile.models.structure import LinearGroup
from lynx_compile.passes.calibrate import measurements
from lynx_compile.passes.select import SparseGroup, SparsityPlan
from lynx_compile.passes.sensitivity import FEWEST, MOST, ROWS
from lynx_compile.passes.verify import CALLS
from lynx_compile.recipe import Recipe
from lynx_compile.solve.rounding import PASSES
from lynx_compile.solve.weight_refit import DESCENT_STEPS, EXACT_CHANNELS

TRIED = {"cpu": 1024, "cuda": 8192}  # size of the product
RUN_SHARE, SOLVE_SHARE = 0.6, 0.3  # of the rate: in a run of the model, and in a solve
EXPORT_S, EXPORT_S_A_BLOCK = 5.0, 3.5  # FLUX.1-dev's 57 blocks took 198 s beside an H100, 257 s on two cores
# Packed and written: of FLUX.1-dev 261 s on two cores, and 31 s where a GPU packed.
WRITTEN_BYTES_A_S = {"cpu": 0.06e9, "cuda": 0.4e9}
STORED_BYTES_A_S = 0.3e9  # solved weights, read or written
PRUNED_BYTES_A_S = 0.15e9  # by magnitude, on two cores: of FLUX.1-dev 130 s, of Qwen-Image 174 s
PROBE = 4  # runs of the model that a probe is worth: forward twice, and back
VERIFIED = 3  # runs for a call that is verified: dense, solved and tuned
TUNED = 3  # runs for a call that tuning takes from block to block, as above


@dataclass(frozen=True)
class Calls:
    """What was recorded: ``fitted`` calls, and others held out; ``groups`` of all linears of the longest."""

    fitted: int
    held_out: int
    groups: Sequence[LinearGroup]

    @classmethod
    def of(cls, recording: Recording, way: Group, groups: Sequence[LinearGroup]) -> Calls:
        """Those of one engine."""
        held_out = len(recording.held_out(way.calls))
        return cls(len(way.calls) - held_out or 1, held_out, groups)

    @property
    def state(self) -> int:
        """Numbers that a call holds between two blocks: the tokens that a linear reads, at a model's width."""
        read = [
            (group.tokens, group.in_channels)
            for group in self.groups
            if any(linear.refusal is None for linear in group.linears)
        ]
        width = min((channels for _, channels in read), default=0)
        return max((tokens for tokens, _ in read), default=0) * width

    @property
    def flops(self) -> float:
        """Of the linears in one."""
        return sum(
            2.0 * group.tokens * group.in_channels * linear.out_channels
            for group in self.groups
            for linear in group.linears
        )


def seconds_of_stages(
    recipe: Recipe,
    plan: SparsityPlan,
    calls: Calls,
    *,
    kept: bool,
    judged: bool,
    blocks: int,
    solved: int,
    written: int,
) -> dict[str, float]:
    """By stage, of those whose time can be told: a builder's cannot, nor that of the user's pipeline.

    Args:
        kept: whether all moments are; else they are measured where they are wanted, and again after tuning.
        judged: whether a budget decides. blocks: of the model. solved, written: bytes of the solved weights, and of the
            rewritten ones.
    """
    device = device_type()
    run = RUN_SHARE * _rate(device, torch.bfloat16 if device == "cuda" else torch.float32)
    solve = SOLVE_SHARE * _rate(device, torch.float32)
    limit = recipe.calibration.tokens_per_call * recipe.calibration.batch
    tokens = {group.name: min(max(group.tokens, *group.calls, 0), limit) for group in plan.groups}
    products = sum(
        2.0 * calls.fitted * tokens[one.name] * one.channels**2 * (3 if one.pruned else 1)
        for one in measurements(plan)
    )
    measuring = calls.fitted * calls.flops / run + products / solve
    all_calls = calls.fitted + calls.held_out
    found = {
        "calibrate": measuring,
        "compensate": sum(_solve_flops(group, recipe) for group in plan.groups) / solve
        + (0.0 if recipe.sparsity.needs_moments else solved / PRUNED_BYTES_A_S)
        + (0.0 if kept else measuring),
        "tune": 60 * recipe.compensation.minutes
        + all_calls * TUNED * calls.flops / run
        + (0.0 if kept else measuring)
        + 3 * solved / STORED_BYTES_A_S,  # read, written block by block, and written whole
        "export": EXPORT_S + EXPORT_S_A_BLOCK * blocks,
        "rewrite": written / WRITTEN_BYTES_A_S[device],
    }
    if judged:
        nodes = Calls(0, 0, plan.groups).flops
        probes = min(max(-(-ROWS // recipe.calibration.batch), FEWEST), MOST, calls.fitted)
        found["sensitivity"] = probes * (PROBE * calls.flops + nodes) / run
        found["verify"] = min(calls.held_out, CALLS) * VERIFIED * calls.flops / run
    return found


def _solve_flops(group: SparseGroup, recipe: Recipe) -> float:
    """As the solves say what they do; N and K of the whole group."""
    channels, rows = float(group.in_channels), float(sum(one.out_channels for one in group.linears))
    method, product = recipe.sparsity.method, 2 * rows * channels**2
    rounding = (PASSES + 2) * product if group.fp8 and method != "none" else 0.0
    if not recipe.sparsity.needs_moments:
        return 0.0
    if method == "none" or group.operand == "none":
        return product + rounding
    if group.operand == "activation":
        return 8 * channels**3 + 4 * product + rounding
    exact = channels <= EXACT_CHANNELS
    refit = rows * (channels / 2) ** 3 if exact else DESCENT_STEPS * product
    return 2 * channels**3 + 2 * product + refit + rounding


@cache
def _rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a product of this machine."""
    size = TRIED[device]
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(4):  # the first one starts the library
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)
