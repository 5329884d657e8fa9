# SPDX-License-Identifier: Apache-2.0
"""Run the recorded calls again and gather the second moments that compensation needs, linear by linear."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from lynx_compile import parallel
from lynx_compile.engine.arguments import flatten, parameters, spread, unflatten
from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.files.tensors import save_tensors
from lynx_compile.files.unfinished import unfinished
from lynx_compile.models.blocks import Walk, at, block_paths, walks
from lynx_compile.models.capture import sample_seed
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Call, Recording
from lynx_compile.models.structure import is_pointwise
from lynx_compile.ops.fp8 import round_rows
from lynx_compile.ops.sparse_linear import keep_mask, norm_scale_of
from lynx_compile.passes.select import SparsityPlan
from lynx_compile.recipe import Calibration, Recipe, Sparsity
from lynx_compile.solve.moments import LayerStatistics, Moments, PrunedStatistics

CALIBRATE = StageVersion("calibrate", 2, ("torch", "diffusers", "transformers"))
CPU = torch.device("cpu")
TOKENS_PER_CHANNEL = 10  # fewer calibration tokens than this leave the solves badly determined (measured)

log = logging.getLogger(__name__)

Finish = Callable[[], LayerStatistics]  # reads or works out what was measured; once


@dataclass(frozen=True)
class Statistics:
    """A folder with the ``LayerStatistics`` of every tensor that the plan's nodes read, one safetensors file each."""

    folder: Path
    groups: tuple[str, ...]

    def of(self, names: Collection[str], progress: Progress) -> Iterator[tuple[str, Finish]]:
        """Those of these groups, one after the other."""
        for name in names:
            yield name, partial(self.load, name)

    def load(self, group: str) -> LayerStatistics:
        path = _file(self.folder, group)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StageError(
                "calibrate",
                f"{path} cannot be read ({error}).",
                "Run again with --fresh, or delete the cache.",
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


@dataclass(frozen=True)
class Unkept:
    """Statistics too large to keep: measured when they are asked for, a block's or a pass's at a time, and dropped.

    ``sampled``: of no more calls than ``calibration.memory_gib`` holds side by side, which one pass goes through.
    """

    dit: DiT
    plan: SparsityPlan
    recording: Recording
    recipe: Recipe
    sampled: bool = False

    def of(self, names: Collection[str], progress: Progress) -> Iterator[tuple[str, Finish]]:
        """Those of these groups, in the order in which they are measured; the same whichever are asked for."""
        wanted = measurements(self.plan)
        return _measure_all(
            self.dit, wanted, self.recording, self.recipe, names, progress, sampled=self.sampled
        )


def are_kept(plan: SparsityPlan, recipe: Recipe) -> bool:
    """Whether ``calibrate`` keeps the plan's moments: where ``calibration.memory_gib`` holds all of them."""
    wanted = measurements(plan) if recipe.sparsity.needs_moments else ()
    return len(_passes(wanted, recipe.calibration.memory_gib)) == 1


def calibrate(
    dit: DiT,
    plan: SparsityPlan,
    recording: Recording,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    key: str = "",
) -> Statistics:
    """Measure what the plan's linears read, over the recorded calls that the engine serves and none of those held out.

    Deterministic: calls in their order, the choice of tokens from ``calibration.seed`` and a call's place. Several
    processes have a share of the calls each, and add their moments up.

    Where the moments, or the model, do not fit into memory together, the calls go through it side by side, block after
    block, and a block's moments are written before the next one's begin; a later run of the same ``key`` does not
    measure them again if this one is stopped. Calls that do not fit side by side are left out where the model does not
    fit; else, and where there are several processes, there are several passes over all.

    Raises:
        StageError: an activation is not finite.
    """
    wanted = measurements(plan) if recipe.sparsity.needs_moments else ()
    found = Statistics(folder, tuple(one.name for one in wanted))
    with unfinished(folder, key) as has:
        left = [name for name in found.groups if not has(_file(folder, name))]
        for name, finish in _measure_all(dit, wanted, recording, recipe, left, progress):
            if parallel.is_first():
                save_tensors(_file(folder, name), _tensors(finish()))
    return found


def _measure_all(
    dit: DiT,
    wanted: tuple[Measurement, ...],
    recording: Recording,
    recipe: Recipe,
    names: Collection[str],
    progress: Progress,
    *,
    sampled: bool = False,
) -> Iterator[tuple[str, Finish]]:
    """What is measured of ``names``, as ``calibrate`` says, in all processes.

    What shares a block or a pass with one of them is measured as well: the choice of tokens depends on it.
    """
    passes = _passes(wanted, recipe.calibration.memory_gib)
    left, tokens = set(names), dict[Measurement, int]()
    calls = fitted_calls(dit, recording)
    if left and (len(passes) > 1 or dit.is_streamed) and parallel.is_alone():
        chosen = _calls_that_fit(dit, calls, recording, recipe)
        calls = chosen if sampled else calls
        if chosen == calls or dit.is_streamed:  # else all of them are measured, in several passes
            for one, moments in _by_block(dit, wanted, chosen, recording, recipe, names, progress):
                tokens[one] = moments.tokens
                left.discard(one.name)
                yield one.name, moments.finish
    passes = [part for part in passes if any(one.name in left for one in part)]
    own = parallel.share(calls)
    for number, part in enumerate(passes):
        choice = torch.Generator()
        with _measured(dit.module, part, recipe, choice, dit.device) as moments_of:
            for done, (place, call) in enumerate(own):
                progress("calls", number * len(own) + done, len(passes) * len(own))
                choice.manual_seed(sample_seed(recipe.calibration.seed, place))
                replay(dit, recording.arguments(call))
        with parallel.adding_up() as all_reduce:
            for one in part:
                moments_of[one.name].add_up(all_reduce)
        for one in part:
            moments = moments_of.pop(one.name)
            if one.name in left:
                tokens[one] = moments.tokens
                yield one.name, moments.finish
    if passes:
        progress("calls", len(passes) * len(own), len(passes) * len(own))
    _warn_if_few(tokens)


def _by_block(
    dit: DiT,
    wanted: tuple[Measurement, ...],
    calls: Sequence[tuple[int, Call]],
    recording: Recording,
    recipe: Recipe,
    names: Collection[str],
    progress: Progress,
) -> Iterator[tuple[Measurement, Moments]]:
    """What is measured of ``names``, one block's moments in memory at a time, as far as that can be."""
    blocks = block_paths(dit.module)
    inside = {path: tuple(one for one in wanted if one.path.startswith(f"{path}.")) for path in blocks}
    if sum(map(len, inside.values())) < len(wanted):
        return
    left = {path for path in blocks if any(one.name in names for one in inside[path])}
    with walks(dit.module, [partial(_replay_call, dit, recording, call) for _, call in calls]) as made:
        for walk in made:
            walk.start()
        for number in range(len(blocks)):
            places = {walk.at.path if walk.at else None for walk in made}
            if len(places) > 1:
                log.info("the calls do not run the same blocks: they are measured one after the other")
                return
            if (path := places.pop()) is None or not left:
                return
            measured = inside[path] if path in left else ()
            left.discard(path)
            choice = torch.Generator()
            with (
                dit.resident(path),
                _measured(dit.module, measured, recipe, choice, dit.device) as moments,
            ):
                block = dit.module.get_submodule(path)
                for done, ((place, _), walk) in enumerate(zip(calls, made, strict=True)):
                    choice.manual_seed(sample_seed(recipe.calibration.seed, place))
                    progress(f"calls through {path}", number * len(made) + done, len(blocks) * len(made))
                    _through(block, walk)
            for one in measured:
                own = moments.pop(one.name)
                if one.name in names:
                    yield one, own


@torch.no_grad()
def _through(block: torch.nn.Module, walk: Walk) -> None:
    """Take a call through the block that it has come to."""
    given = at(walk)
    walk.go_on(block(*given.args, **given.kwargs))


def _calls_that_fit(
    dit: DiT, calls: tuple[tuple[int, Call], ...], recording: Recording, recipe: Recipe
) -> tuple[tuple[int, Call], ...]:
    """Those that ``calibration.memory_gib`` holds between two blocks, drawn at random."""
    with walks(dit.module, [partial(_replay_call, dit, recording, calls[0][1])]) as (walk,):
        walk.start()
        given = tree_leaves((walk.at.args, walk.at.kwargs)) if walk.at else []
    sizes = {leaf.data_ptr(): leaf.nbytes for leaf in given if isinstance(leaf, torch.Tensor)}
    most = max(int(recipe.calibration.memory_gib * 2**30 / (2 * max(sum(sizes.values()), 1))), 1)
    if most >= len(calls):
        return calls
    log.info("measuring on %d of %d calls, which fit calibration.memory_gib", most, len(calls))
    choice = torch.Generator().manual_seed(recipe.calibration.seed)
    return tuple(calls[n] for n in sorted(torch.randperm(len(calls), generator=choice)[:most].tolist()))


def _replay_call(dit: DiT, recording: Recording, call: Call) -> Any:
    return replay(dit, recording.arguments(call))


def fitted_calls(dit: DiT, recording: Recording) -> tuple[tuple[int, Call], ...]:
    """The recorded calls with their places, but for those held out; a single call is all that there is."""
    apart, everything = recording.held_out(dit.calls.calls), tuple(enumerate(dit.calls.calls))
    return tuple(pair for pair in everything if pair[0] not in apart) or everything


def replay(dit: DiT, arguments: Mapping[str, Any], *, gradients: bool = False) -> Any:
    """The result of a recorded call, run again where the module is: in the engine's dtypes, or all in float32."""
    args, kwargs = given(dit, arguments, dit.device)
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
    module: torch.nn.Module,
    wanted: tuple[Measurement, ...],
    recipe: Recipe,
    choice: torch.Generator,
    device: torch.device = CPU,
) -> Iterator[dict[str, Moments]]:
    """Hooks on one reader of every tensor, removed whatever happens; a linear that is called twice measures both."""
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
