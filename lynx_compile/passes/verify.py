# SPDX-License-Identifier: Apache-2.0
"""Measure what the budget predicted, and step back until it holds: nothing over the budget is shipped silently.

The model with the plan's weights is run on calls held out, its FP8 linears by the kernels where a GPU is here that runs
them, or draws images where the budget is ``min_psnr``. Where that is over the limit, steps of the knapsack are taken
back, the last one first, as many as the prediction says are too many: a node returns to its next safer form, as it was
solved; the others keep what tuning made of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lynx_compile.engine.arguments import flatten
from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Call, Recording
from lynx_compile.passes.block_weights import kernel_linears, node_linears, substituted
from lynx_compile.passes.budget import Selection
from lynx_compile.passes.calibrate import replay
from lynx_compile.passes.select import SparseGroup
from lynx_compile.passes.states import spread_calls, weight_of
from lynx_compile.torch_ops.operators import fp8_kernels_run

SELECT = StageVersion("select", 4, ("torch", "diffusers", "transformers"))
VERIFY = StageVersion("verify", 6, ("torch", "diffusers", "transformers"))
CALLS = 64  # held out, that are measured at most
QUARTERS = 4  # ranges of denoising steps that errors are told by
# Channels of FP8 that kernels add up about as exactly as was measured, and from which on they promote their sums
# (kPromotedWidth of plugins/kernels/fp8_tiles.h).
KERNELS_AGREE, PROMOTED = 4096, 8192
NAMED = 3  # nodes that a warning names
KERNEL_ROWS = 8  # of which a weight of FP8 has a multiple (plugins/kernels/fp8_linear.cpp)
ROOM = 0.75  # of the limit: an error below it leaves room that is worth a word

Weights = Mapping[SparseGroup, Path]
Psnr = Callable[
    [Mapping[str, torch.nn.Module]], float
]  # of images that the pipeline draws with these linears, dB

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AtSteps:
    """Relative error of the model's output at the denoising steps from ``first`` to ``last``.

    ``predicted`` and ``solved``: of the solved weights. ``tuned``: None where nothing was tuned, or where the solved
    weights were taken, which can err less than weights that were tuned with more linears changed. Both None where no
    call of these steps was measured.
    """

    first: int
    last: int
    predicted: float
    solved: float | None
    tuned: float | None


@dataclass(frozen=True)
class Verified:
    """What holds: so many steps of the selection are ``taken``, and ``weights`` are those of that plan's groups.

    ``whole``: the error over all steps, and ``steps`` by ranges of them. ``calls``: that were held out, and measured.
    ``stepped_back``: the groups that lost a form.
    """

    taken: int
    weights: tuple[Path, ...]
    whole: AtSteps
    steps: tuple[AtSteps, ...]
    calls: int
    psnr: float | None
    stepped_back: tuple[str, ...]


def within_psnr(selection: Selection, solved: Weights, psnr: Psnr, progress: Progress) -> int:
    """So many steps as leave the images ``min_psnr``, with the solved weights: by halving, for it falls with them."""
    holds, fails = 0, len(selection.steps) + 1
    looks = 0
    while fails - holds > 1:
        middle = (holds + fails) // 2
        value = psnr(linears_of(selection, middle, solved, torch.device("cpu")))
        looks += 1
        progress("plans drawn with", looks, looks + (fails - holds - 1).bit_length())
        log.info("%d of %d steps: PSNR %.1f dB", middle, len(selection.steps), value)
        holds, fails = (middle, fails) if value >= selection.limit[1] else (holds, middle)
    return holds


def within_error(
    dit: DiT, selection: Selection, solved: Weights, recording: Recording, progress: Progress
) -> int:
    """So many steps as tuning is expected to bring within ``max_output_error``, from what the solved weights err.

    Where they err more than predicted they are expected to do so when they are tuned. What is tuned with forms that
    ``verify`` would take back makes up for errors that are no longer there then.
    """
    held_out = HeldOut(dit, recording, progress)
    taken, value = len(selection.steps), selection.limit[1]
    while taken:
        linears = held_out.linears_of(selection, taken, solved)
        error = held_out.error(held_out.squares(linears))
        predicted = selection.error(taken)
        expected = selection.expected(taken) * max(error / max(predicted, 1e-30), 1)
        log.info(
            "%d of %d steps: output error %.4f predicted, %.4f solved, %.4f expected when tuned",
            taken, len(selection.steps), predicted, error, expected,
        )  # fmt: skip
        if expected <= value:
            break
        taken = selection.fewer(taken, value / expected)
    return taken


def verify(
    dit: DiT,
    selection: Selection,
    taken: int,
    solved: Weights,
    tuned: Weights | None,
    recording: Recording,
    psnr: Psnr | None,
    progress: Progress,
) -> Verified:
    """Measure the plan of so many steps, and of fewer until the budget holds.

    Args:
        solved: of every node that could be. tuned: of the plan's, if they are.
        psnr: draws images; None where the budget does not ask for it.

    Raises:
        InputError: the budget leaves no linear to change, or what the recipe fixes is over it.
    """
    key, value = selection.limit
    held_out = HeldOut(dit, recording, progress)
    all_tuned: Weights | None = None if tuned is None else {**solved, **tuned}
    start, drawn = taken, None
    while True:
        plan = selection.plan(taken)  # refuses one in which nothing changes
        weights, before = solved, held_out.squares(held_out.linears_of(selection, taken, solved))
        squares = before
        if all_tuned is not None:
            after = held_out.squares(held_out.linears_of(selection, taken, all_tuned))
            if taken == start or held_out.error(after) <= held_out.error(before):
                weights, squares = all_tuned, after
        error = held_out.error(squares)
        if psnr is not None:
            drawn = psnr(linears_of(selection, taken, weights, torch.device("cpu")))
        if drawn is not None:
            share = 10 ** ((drawn - value) / 20)
        else:
            share = value / max(error, 1e-30) if key == "max_output_error" else 1.0
        if share >= 1:
            break
        if not taken:
            raise InputError(
                f"What the recipe fixes is over the budget ({key} {value:g}) by itself: it errs by {error:.4f}.",
                "Leave more to auto in sparsity.operand, or allow more.",
            )
        fewer = selection.fewer(taken, share)
        log.info(
            "%d steps are over the budget (output error %.4f%s): back to %d", taken, error,
            f", PSNR {drawn:.1f} dB" if drawn is not None else "", fewer,
        )  # fmt: skip
        taken = fewer

    def errors(steps: range) -> AtSteps:
        has_calls = any(call.step in steps for call in held_out.calls)
        return AtSteps(
            steps.start,
            steps.stop - 1,
            selection.error(taken, steps),
            held_out.error(before, steps) if has_calls else None,
            held_out.error(squares, steps) if has_calls and weights is not solved else None,
        )

    ranges = selection.ranges(QUARTERS)
    whole = errors(range(ranges[0].start, ranges[-1].stop))
    back = tuple(dict.fromkeys(step.group for step in selection.steps[taken:start]))
    _say(selection, taken, whole, error, back)
    if held_out.by_kernels:
        log.info("what is FP8 in it was measured by the kernels of this GPU")
    else:
        warn_of_long_sums(plan.groups)
    return Verified(
        taken,
        tuple(weights[group] for group in plan.groups),
        whole,
        tuple(errors(steps) for steps in ranges),
        len(held_out.calls),
        drawn,
        back,
    )


def warn_of_long_sums(groups: Iterable[SparseGroup]) -> None:
    """What was measured has exact sums; the tensor cores' of FP8 products are not, but where they are promoted."""
    long = [group.name for group in groups if group.fp8 and KERNELS_AGREE < group.in_channels < PROMOTED]
    if long:
        log.warning(
            "%d nodes in FP8 add up %d to %d channels (%s): kernels on a GPU may err by more there than was measured "
            "here, which lynx-compile compare shows. Where that is too much, name them in sparsity.exclude.",
            len(long), KERNELS_AGREE, PROMOTED, ", ".join(long[:NAMED]) + (", ..." if len(long) > NAMED else ""),
        )  # fmt: skip


def linears_of(
    selection: Selection,
    taken: int,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    by_kernels: bool = False,
) -> dict[str, torch.nn.Module]:
    """The linears of a plan that change, by path: as many weights as the model has there, once more.

    ``by_kernels``: those in FP8 as ``KernelLinear``, where each could be a node by itself.
    """
    found: dict[str, torch.nn.Module] = {}
    for group in selection.plan(taken).groups:
        alone = all(linear.out_channels % KERNEL_ROWS == 0 for linear in group.linears)
        made = kernel_linears if by_kernels and group.fp8 and alone else node_linears
        found |= made(weights[group], device, dtype)
    return found


class HeldOut:
    """The calls held out, what the dense model returns in them, and what other linears make of that."""

    def __init__(self, dit: DiT, recording: Recording, progress: Progress, most: int = CALLS) -> None:
        calls = dit.calls.calls
        # Not every so manieth: runs are of one length, so that those could all be of one step or branch.
        self.calls = spread_calls([calls[number] for number in sorted(recording.held_out(calls))], 0, most)
        like = next(p for p in dit.module.parameters() if p.is_floating_point())
        self.device, self.dtype = dit.device, like.dtype
        self.by_kernels = self.device.type == "cuda" and fp8_kernels_run(self.dtype)
        self._run = partial(_outputs, dit, recording)
        self._progress = partial(progress, "calls held out")
        self._module = dit.module
        last = max(call.step for call in calls)
        self._weights = torch.tensor([weight_of(call, last) for call in self.calls], dtype=torch.float64)
        self._dense = [self._run(call) for call in self.calls]

    def linears_of(self, selection: Selection, taken: int, weights: Weights) -> dict[str, torch.nn.Module]:
        """As these calls run them."""
        return linears_of(selection, taken, weights, self.device, self.dtype, self.by_kernels)

    def squares(self, linears: Mapping[str, torch.nn.Module]) -> torch.Tensor:
        """|y - y_dense|^2 / |y_dense|^2 of every call with ``linears``, [calls]."""
        found = []
        with substituted(self._module, linears):
            for number, (call, dense) in enumerate(zip(self.calls, self._dense, strict=True)):
                self._progress(number, len(self.calls))
                lost = float((self._run(call) - dense).square().sum())
                found.append(lost / max(float(dense.square().sum()), 1e-30))
        self._progress(len(self.calls), len(self.calls))
        return torch.tensor(found, dtype=torch.float64)

    def error(self, squares: torch.Tensor, steps: range | None = None) -> float:
        """Relative error at the output, at some denoising steps or all; weighed as tuning weighs calls."""
        inside = torch.tensor([steps is None or call.step in steps for call in self.calls])
        weights = self._weights * inside
        return float(((weights * squares).sum() / weights.sum().clamp_min(1e-30)) ** 0.5)


def _outputs(dit: DiT, recording: Recording, call: Call) -> torch.Tensor:
    """All that the call returns, in a row."""
    result = flatten(replay(dit, recording.arguments(call)), "output")
    return torch.cat([t.flatten().double().cpu() for t in result.tensors.values() if t.is_floating_point()])


def _say(selection: Selection, taken: int, whole: AtSteps, error: float, back: tuple[str, ...]) -> None:
    """The budget's outcome in the log."""
    key, value = selection.limit
    log.info(
        "budget %s %g: %.2fx on the blocks' linears; output error %.4f predicted, %.4f solved%s",
        key, value, selection.speed(taken), whole.predicted, whole.solved or 0.0,
        f", {whole.tuned:.4f} tuned" if whole.tuned is not None else "",
    )  # fmt: skip
    if back:
        log.warning(
            "over the budget when measured, so safer forms for %d nodes: %s", len(back), ", ".join(back)
        )
    if key == "max_output_error" and error < ROOM * value:
        more = value * selection.expected(taken) / error
        if (speed := selection.speed_at(more)) > selection.speed(taken):
            log.info(
                "the error is far below the %g allowed: with max_output_error: %.3f the linears would be %.2fx as "
                "fast, and the error again about %g", value, more, speed, value,
            )  # fmt: skip
    parts = [f"{speed:.2f}x for steps {s.start} to {s.stop - 1}" for s, speed in selection.halves(taken)]
    if parts:
        log.info("two engines would be %s, with the same error in each", " and ".join(parts))
