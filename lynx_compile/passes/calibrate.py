# SPDX-License-Identifier: Apache-2.0
"""Run the recorded calls again and gather the second moments that compensation needs, linear by linear."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lynx_compile import parallel
from lynx_compile.engine.arguments import flatten, parameters, spread, unflatten
from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.files.tensors import save_tensors
from lynx_compile.models.capture import sample_seed
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.models.structure import is_pointwise
from lynx_compile.ops.fp8 import round_rows
from lynx_compile.ops.sparse_linear import keep_mask, norm_scale_of
from lynx_compile.passes.select import SparsityPlan
from lynx_compile.recipe import Calibration, Recipe, Sparsity
from lynx_compile.solve.moments import LayerStatistics, Moments, PrunedStatistics

CALIBRATE = StageVersion("calibrate", 2, ("torch", "diffusers", "transformers"))
TOKENS_PER_CHANNEL = 10  # fewer calibration tokens than this leave the solves badly determined (measured)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """A folder with the ``LayerStatistics`` of every tensor that the plan's nodes read, one safetensors file each."""

    folder: Path
    groups: tuple[str, ...]

    def load(self, group: str) -> LayerStatistics:
        path = _file(self.folder, group)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StageError(
                "calibrate", f"{path} cannot be read ({error}).", "Run again with --fresh."
            ) from None
        kind = PrunedStatistics if "ss" in tensors else LayerStatistics
        return kind(int(tensors.pop("tokens")), **tensors)


@dataclass(frozen=True)
class Measurement:
    """A tensor [..., K] to measure: the name of its group, and the path of a linear that reads it.

    ``pruned``: whether one of its readers has pruned activations, whose moments come with it then.
    ``rounded``: whether one multiplies in FP8; what rounding loses comes with it then.
    """

    name: str
    path: str
    channels: int
    pruned: bool
    rounded: bool = False

    @property
    def bytes(self) -> int:
        """Of its float32 covariances."""
        return 4 * self.channels**2 * (3 if self.pruned else 1)


def calibrate(
    dit: DiT, plan: SparsityPlan, recording: Recording, recipe: Recipe, folder: Path, progress: Progress
) -> Statistics:
    """Measure what the plan's linears read, over the recorded calls that the engine serves.

    Deterministic: calls in their order, the choice of tokens from ``calibration.seed`` and a call's place. Moments that
    do not fit ``calibration.memory_gib`` together are gathered in several passes. Several processes have a share of the
    calls each, and add their moments up.

    Raises:
        StageError: an activation is not finite.
    """
    wanted = measurements(plan)
    passes = _passes(wanted, recipe.calibration.memory_gib)
    calls = parallel.share(tuple(enumerate(dit.calls.calls)))
    tokens: dict[Measurement, int] = {}
    for number, part in enumerate(passes):
        choice = torch.Generator()
        with _measured(dit.module, part, recipe, choice) as moments:
            for done, (place, call) in enumerate(calls):
                progress("calls", number * len(calls) + done, len(passes) * len(calls))
                choice.manual_seed(sample_seed(recipe.calibration.seed, place))
                replay(dit, recording.arguments(call))
        with parallel.adding_up() as all_reduce:
            for one in part:
                moments[one.name].add_up(all_reduce)
                if parallel.is_first():
                    statistics = moments[one.name].finish()
                    tokens[one] = statistics.tokens
                    save_tensors(_file(folder, one.name), _tensors(statistics))
    progress("calls", len(passes) * len(calls), len(passes) * len(calls))
    _warn_if_few(tokens)
    return Statistics(folder, tuple(one.name for one in wanted))


def replay(dit: DiT, arguments: Mapping[str, Any], *, gradients: bool = False) -> Any:
    """The result of a recorded call, run again where the module is: in the engine's dtypes, or all in float32."""
    args, kwargs = given(dit, arguments, next(dit.module.parameters()).device)
    # And never inference mode: what a module caches in it can take no part in tuning.
    with torch.set_grad_enabled(gradients):
        return dit.module(*args, **kwargs)


def given(
    dit: DiT, arguments: Mapping[str, Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``replay`` gives the module in a recorded call, on ``device``."""
    known = parameters(type(dit.module).forward)
    like = next(p for p in dit.module.parameters() if p.is_floating_point())
    compiled = flatten(dit.arguments).tensors
    flat = flatten(dit.taken(arguments))
    tensors = {}
    for name, tensor in flat.tensors.items():
        floating = torch.float32 if like.dtype == torch.float32 else compiled[name].dtype
        tensors[name] = tensor.to(device, floating if tensor.is_floating_point() else None)
    args, kwargs = spread(known, unflatten(flat.structure, tensors))
    return tuple(args), dict(kwargs)


def measurements(plan: SparsityPlan) -> tuple[Measurement, ...]:
    """What the plan needs to be measured: every tensor once, whatever the operands of its readers."""
    found: dict[str, Measurement] = {}
    for group in plan.groups:
        first = found.get(
            group.name, Measurement(group.name, group.linears[0].path, group.in_channels, pruned=False)
        )
        found[group.name] = replace(
            first,
            pruned=first.pruned or group.operand == "activation",
            rounded=first.rounded or group.fp8,
        )
    return tuple(found.values())


@contextmanager
def _measured(
    module: torch.nn.Module, wanted: tuple[Measurement, ...], recipe: Recipe, choice: torch.Generator
) -> Iterator[Mapping[str, Moments]]:
    """Hooks on one reader of every tensor, removed whatever happens; a linear that is called twice measures both."""
    device = next(module.parameters()).device
    moments = {
        one.name: Moments(one.channels, device, pruned=one.pruned, rounded=one.rounded) for one in wanted
    }

    def hook(one: Measurement) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda linear, arguments: _measure(
            one,
            arguments[0].movedim(1, -1) if is_pointwise(linear) else arguments[0],
            moments[one.name],
            recipe.calibration,
            recipe.sparsity,
            choice,
        )

    handles = [module.get_submodule(one.path).register_forward_pre_hook(hook(one)) for one in wanted]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    one: Measurement,
    x: torch.Tensor,
    moments: Moments,
    calibration: Calibration,
    sparsity: Sparsity,
    choice: torch.Generator,
) -> None:
    tokens = x.reshape(-1, x.shape[-1])
    if not len(tokens):  # such as a reference image that this call has not
        return
    limit = calibration.tokens_per_call * (x.shape[0] if x.ndim > 2 else 1)
    if len(tokens) > limit:
        tokens = tokens[torch.randperm(len(tokens), generator=choice)[:limit].to(tokens.device)]
    tokens = tokens.float()
    if not torch.isfinite(tokens).all():
        raise StageError(
            "calibrate",
            f"the input of '{one.path}' is not finite (NaN or infinity).",
            "Use dtype bf16 (fp16 overflows in some models), or check the calibration inputs.",
        )
    rounding = [round_rows(tokens).dequantized() - tokens] if one.rounded else []
    if not one.pruned:
        moments.add(tokens, rounding=rounding)
        return
    keep = keep_mask(tokens)
    pruned = torch.where(keep, tokens, 0.0)
    if sparsity.uses_norm_scale:
        pruned = pruned * norm_scale_of(tokens, keep)
    moments.add(tokens, pruned, [*rounding, *(error * keep for error in rounding)])


def _passes(wanted: tuple[Measurement, ...], memory_gib: float) -> list[tuple[Measurement, ...]]:
    """Split what is measured so that the moments of each part fit."""
    passes: list[list[Measurement]] = [[]]
    used, limit = 0, memory_gib * 2**30
    for one in wanted:
        if passes[-1] and used + one.bytes > limit:
            passes.append([])
            used = 0
        passes[-1].append(one)
        used += one.bytes
    return [tuple(part) for part in passes]


def _warn_if_few(tokens: Mapping[Measurement, int]) -> None:
    """One warning for everything whose solve is badly determined, with what the worst of it needs."""
    short = {one: n for one, n in tokens.items() if n < TOKENS_PER_CHANNEL * one.channels}
    if short:
        worst = min(short, key=lambda one: short[one] / one.channels)
        needed = TOKENS_PER_CHANNEL * worst.channels
        log.warning(
            "%d of %d inputs were calibrated on too few tokens: '%s' on %d, its %d channels need at least %d. "
            "Raise calibration.samples %.1f-fold (or tokens_per_call).",
            len(short), len(tokens), worst.name, short[worst], worst.channels, needed, needed / short[worst],
        )  # fmt: skip


def _tensors(statistics: LayerStatistics) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in vars(statistics).items() if value is not None}


def _file(folder: Path, group: str) -> Path:
    return folder / f"{group}.safetensors"
