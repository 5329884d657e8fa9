# SPDX-License-Identifier: Apache-2.0
"""Tune the compensated weights: block by block, towards what dense blocks make, and then end to end where it fits.

All recorded calls that there is memory for go through the model side by side, dense and tuned. At a block the dense
ones say what it should return, and the tuned ones what it is given by the blocks before it, tuned already; on both
``solve.tune.fit`` moves the weights of the block's linears. Calls of held-out prompts go through the compensated model
as well: a block keeps what made its held-out error least, which may be what it began with, and so does the whole model,
by the error at its output. ``passes.end_to_end`` goes on from there, and is held to the same.
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from lynx_compile.engine.arguments import flatten
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.models.blocks import Walk, at, block_paths
from lynx_compile.models.dit import DiT
from lynx_compile.models.onnx_source import OnnxSource
from lynx_compile.models.place import on_gpu
from lynx_compile.models.recording import Recording
from lynx_compile.passes.block_weights import (
    Files,
    inside_of,
    joined,
    load_block,
    rows_of,
    save_block,
    split,
    substitute,
    tuned_linears,
)
from lynx_compile.passes.calibrate import Statistics, Unkept
from lynx_compile.passes.compensate import expected_errors, load_weights, save_weights
from lynx_compile.passes.end_to_end import END_RATE, Whole, end_to_end, fits
from lynx_compile.passes.lanes import Lane, lanes, where
from lynx_compile.passes.select import SparseGroup, SparsityPlan
from lynx_compile.passes.states import rows_are_alike, samples_of
from lynx_compile.recipe import Recipe
from lynx_compile.solve.stacking import State
from lynx_compile.solve.tune import RATE, Effort, Outcome, Rows, TunedLinear, fit

TUNE = StageVersion("tune", 9, ("torch", "diffusers", "transformers"))
SMALL = 20_000_000  # weights that are tuned without a GPU: minutes on one core
TOKENS_A_STEP = {"cpu": 2048, "cuda": 16384}  # at least, in whole samples; fewer do not keep a GPU busy
BLOCKWISE = 0.25  # of the time, where tuning goes on end to end
END_STEPS = 8  # times the steps of a block, at most

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TunedBlock:
    """A block's held-out error, compensated and tuned, both after the tuned blocks before it."""

    path: str
    outcome: Outcome


@dataclass(frozen=True)
class Tuned:
    """``weights``: as ``compensate`` returns them.

    Errors: |y - y_dense| / |y_dense| of the model's output over the calls held out, before and after.
    """

    weights: tuple[Path, ...]
    blocks: tuple[TunedBlock, ...]
    compensated_error: float
    tuned_error: float
    whole: Whole | None = None


def is_tuned(dit: DiT, plan: SparsityPlan, recipe: Recipe) -> bool:
    """Whether the recipe asks for it; left to us, where there is a GPU or the model is ``SMALL``."""
    if not recipe.sparsity.needs_moments:
        return False
    if recipe.compensation.tune != "auto":
        return recipe.compensation.tune != "off"
    if isinstance(dit.checkpoint, OnnxSource):  # its module cannot run without ONNX Runtime
        return False
    return on_gpu() or sum(group.weights for group in plan.groups) <= SMALL


def reaches_end(dit: DiT, plan: SparsityPlan, recipe: Recipe) -> bool:
    """Whether tuning goes on end to end: where the recipe asks for it, or leaves it to us and memory holds it."""
    tune = recipe.compensation.tune
    if tune == "auto" and not (has_room := fits(dit, plan)):
        log.info("end to end does not fit the GPU's memory: tuning is block by block alone")
    return tune == "end_to_end" or (tune == "auto" and has_room)


def samples_a_step(dit: DiT, groups: Iterable[SparseGroup], recording: Recording) -> int:
    """How many of the batches' samples a step of tuning takes."""
    tokens = max(group.tokens for group in groups) / samples_of(recording, dit.calls.calls[0])
    return math.ceil(TOKENS_A_STEP[dit.device.type] / tokens)


def tune(
    dit: DiT,
    plan: SparsityPlan,
    weights: Sequence[Path],
    statistics: Statistics | Unkept,
    recording: Recording,
    recipe: Recipe,
    folder: Path,
    key: str,
    progress: Progress,
) -> Tuned:
    """Tune ``weights``, one file per group of the plan, and write them anew into ``folder``.

    Deterministic as long as ``compensation.minutes`` do not end it. A block that is done is not tuned again by a later
    run of the same ``key``.

    Raises:
        StageError: the calls do not come to the same blocks.
    """
    files = dict(zip(plan.groups, weights, strict=True))
    has_end = reaches_end(dit, plan, recipe)
    seconds = 60 * recipe.compensation.minutes
    samples = samples_a_step(dit, files, recording)
    tuner = _Tuner(
        dit, files, recipe, samples, seconds * (BLOCKWISE if has_end else 1), folder / "blocks", key, progress
    )
    with lanes(dit, recording, recipe, samples) as calls:
        while (block := where(calls)) is not None:
            with dit.resident(block):
                tuner.pass_block(block, calls)
        compensated, blockwise = _output_errors(calls)
    log.info("held-out error at the output: %.4f compensated, %.4f block by block", compensated, blockwise)
    rows: Mapping[str, Rows] = {}
    tuned, whole = compensated, None
    if blockwise < compensated:
        rows, tuned = tuner.rows(), blockwise
    if has_end:
        solved = {linear: part for path in weights for linear, part in split(load_weights(path)).items()}
        effort = Effort(
            steps=END_STEPS * recipe.compensation.steps,
            seconds=max(seconds - tuner.spent, 1.0),
            samples=samples,
            seed=recipe.calibration.seed,
            rate=END_RATE,
        )
        saved = folder / "end_to_end.safetensors"
        moved, whole = end_to_end(
            dit, files, solved, {**solved, **rows}, recording, recipe, effort, saved, key,
            lambda what, done, total: progress(f"{what} end to end", done, total),
        )  # fmt: skip
        compensated, tuned = whole.compensated_error, whole.given_error
        log.info("held-out error at the output: %.4f end to end, from %.4f", whole.tuned_error, tuned)
        if whole.tuned_error < tuned and _fit_in(moved, dit.dtype):
            rows, tuned = moved, whole.tuned_error
    if not tuned < compensated:
        log.warning("tuning did not lower the held-out error at the output: the weights stay as they were")
        rows, tuned = {}, compensated
    paths = _written(dit, files, rows, statistics, folder, progress)
    shutil.rmtree(folder / "blocks", ignore_errors=True)  # they are as large as the weights
    for path in set(folder.glob("*.safetensors")).difference(paths):  # another plan's, and where ``fit`` was
        path.unlink()
    blocks = tuple(TunedBlock(*item) for item in tuner.outcomes.items())
    return Tuned(paths, blocks, compensated, tuned, whole)


def _written(
    dit: DiT,
    files: Files,
    rows: Mapping[str, Rows],
    statistics: Statistics | Unkept,
    folder: Path,
    progress: Progress,
) -> tuple[Path, ...]:
    """The groups' weights with ``rows`` in them, of the linears that it has, and the errors that the moments expect.

    The solved weights' errors are taken anew beside them: those that they have may be of more calls.
    """
    moved = [group for group in files if any(linear.path in rows for linear in group.linears)]
    paths = {group: folder / path.name for group, path in files.items()}
    for group in files.keys() - set(moved):
        save_weights(paths[group], load_weights(files[group]), dit.dtype)
    written = len(files) - len(moved)
    for name, finish in statistics.of(dict.fromkeys(group.name for group in moved), progress):
        moments = finish()
        for group in (group for group in moved if group.name == name):
            old = load_weights(files[group])
            new = joined(old, rows)
            before, after = expected_errors(dit, group, (old, new), moments)
            save_weights(paths[group], replace(new, errors=after, solved_errors=before), dit.dtype)
            written += 1
            progress("weights written", written, len(files))
    return tuple(paths.values())


class _OfBlocks(Mapping[str, Rows]):
    """The weights of linears, by path, in the files of their blocks: those of all would not fit into memory."""

    def __init__(self, places: Mapping[str, Path], key: str) -> None:
        self._places = places
        self._block = lru_cache(1)(lambda path: load_block(path, key))

    def __getitem__(self, linear: str) -> Rows:
        done = self._block(self._places[linear])
        assert done is not None, "it has just been written"
        return done[0][linear]

    def __contains__(self, linear: object) -> bool:
        return linear in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Tuner:
    """Tunes each block when the calls have come to it. ``outcomes``: of the blocks that are done, by path."""

    def __init__(
        self,
        dit: DiT,
        files: Files,
        recipe: Recipe,
        samples: int,
        seconds: float,
        folder: Path,
        key: str,
        progress: Progress,
    ) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._dit, self._files, self._recipe = dit, files, recipe
        self._samples, self._seconds = samples, seconds
        self._folder, self._key, self._progress = folder, key, progress
        self._device = dit.device
        self._paths = [
            path for path in block_paths(dit.module) if any(inside_of(path, group) for group in files)
        ]

    def pass_block(self, path: str, calls: Sequence[Lane]) -> None:
        """Take the calls through a block, which is tuned before the tuned ones go on."""
        block = self._dit.module.get_submodule(path)
        states: dict[bool, list[State]] = {False: [], True: []}
        for lane in calls:
            result = _through(block, lane.dense)
            states[lane.is_held_out] += lane.at_block(result)
            lane.dense.go_on(result)
        if path not in self._paths:
            for lane in calls:
                for walk in lane.walks[1:]:
                    walk.go_on(_through(block, walk))
            return
        compensated = rows_of(self._files, path)
        made = self._with(path, compensated)
        for lane in calls:
            if lane.compensated is not None:
                lane.compensated.go_on(_through(made, lane.compensated))
        del made
        made = self._with(path, self._tuned(path, compensated, states[False], states[True]))
        for lane in calls:
            lane.tuned.go_on(_through(made, lane.tuned))

    @property
    def spent(self) -> float:
        """Seconds, on the blocks that are done."""
        return sum(outcome.seconds for outcome in self.outcomes.values())

    def rows(self) -> Mapping[str, Rows]:
        """The weights of the linears in blocks that tuning moved, by path."""
        moved = [path for path, outcome in self.outcomes.items() if outcome.after < outcome.before]
        places = {
            linear: self._file(path)
            for path in moved
            for group in self._files
            for linear in inside_of(path, group)
        }
        return _OfBlocks(places, self._key)

    def _tuned(
        self, path: str, compensated: Mapping[str, Rows], train: Sequence[State], held_out: Sequence[State]
    ) -> Mapping[str, Rows]:
        """The block's weights: of an earlier run, or tuned now."""
        done = load_block(self._file(path), self._key)
        if done is None:
            if not rows_are_alike(self._dit.module.get_submodule(path), train, self._device):
                train, held_out = ([replace(s, kind=None) for s in some] for some in (train, held_out))
            linears = self._linears(path, compensated)
            outcome = fit(
                self._module(path, linears),
                linears.values(),
                train,
                held_out,
                self._effort(path),
                self._steps(path),
            )
            rows = {linear: tuned.rows() for linear, tuned in linears.items()}
            if not outcome.after < outcome.before or not _fit_in(rows, self._dit.dtype):
                rows, outcome = dict(compensated), replace(outcome, after=outcome.before)
            save_block(self._file(path), self._key, rows, outcome)
            done = rows, outcome
        rows, self.outcomes[path] = done
        log.info("%s: %s", path, self.outcomes[path])
        return rows

    def _effort(self, path: str) -> Effort:
        """An equal share of the time that is left."""
        left = len(self._paths) - len(self.outcomes)
        return Effort(
            steps=self._recipe.compensation.steps,
            seconds=max(self._seconds - self.spent, 0.0) / left,
            samples=self._samples,
            seed=self._recipe.calibration.seed + self._paths.index(path),
            rate=RATE,
        )

    def _steps(self, path: str) -> Progress:
        """Of all blocks together, where time may leave each fewer."""
        steps, number = self._recipe.compensation.steps, len(self.outcomes)
        return lambda what, done, total: self._progress(
            f"steps at {path}", number * steps + done * steps // total, len(self._paths) * steps
        )

    def _with(self, path: str, rows: Mapping[str, Rows]) -> torch.nn.Module:
        return self._module(path, self._linears(path, rows))

    def _linears(self, path: str, rows: Mapping[str, Rows]) -> dict[str, TunedLinear]:
        paper = self._recipe.sparsity.method == "paper"  # which trains its low rank alone
        return tuned_linears(self._files, path, rows, self._device, low_rank_alone=paper)

    def _module(self, path: str, linears: Mapping[str, TunedLinear]) -> torch.nn.Module:
        """A copy of the block that computes with ``linears``, whose own modules stay: models ask for their dtype."""
        made = copy.deepcopy(self._dit.module.get_submodule(path)).requires_grad_(False)
        made.__dict__.pop("forward", None)  # that at which calls stop
        substitute(made, {name.removeprefix(f"{path}."): tuned for name, tuned in linears.items()})
        return made

    def _file(self, path: str) -> Path:
        return self._folder / f"{path}.safetensors"


@torch.no_grad()
def _through(block: torch.nn.Module, walk: Walk) -> object:
    """What the block makes of what it is given."""
    given = at(walk)
    return block(*given.args, **given.kwargs)


def _fit_in(rows: Mapping[str, Rows], dtype: torch.dtype) -> bool:
    """Whether ``dtype``, in which ``rewrite`` writes them, holds these weights."""
    tensors = [t for part in rows.values() for t in (part.weight, part.bias, part.lora_down, part.lora_up)]
    return all(bool(t.float().to(dtype).isfinite().all()) for t in tensors if t is not None)


def _output_errors(calls: Sequence[Lane]) -> tuple[float, float]:
    """|y - y_dense| / |y_dense| over the calls held out: of the compensated model's output, and of the tuned one's."""
    lost, whole = torch.zeros(2, dtype=torch.float64), 0.0
    for lane in calls:
        if lane.compensated is not None:
            dense, *others = (
                torch.cat(
                    [t.flatten().double().cpu() for t in flatten(walk.result, "output").tensors.values()]
                )
                for walk in (lane.dense, lane.compensated, lane.tuned)
            )
            lost += torch.stack([(other - dense).square().sum() for other in others])
            whole += float(dense.square().sum())
    compensated, tuned = (lost / max(whole, 1e-30)).sqrt().tolist()
    return compensated, tuned
