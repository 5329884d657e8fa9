# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile compare``: how far the Lynx model is from the dense one, linear by linear, step by step, in images.

Both ONNX files run in ONNX Runtime in float32, driven and compared by polygraphy; or the module runs in torch, dense
and with the compiled linears in it (``compare_torch``). Every sparse linear gets the dense model's own input, since end
to end one flipped choice of channels spreads; the model's output is compared on the dense model's trajectory; the
images are each model's own. Where there is a GPU, ONNX Runtime is joined by both engines.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import (
    Comparator,
    IterationResult,
    RunResults,
)
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError, LynxError, StageError
from lynx_compile.files.atomic import atomic_path
from lynx_compile.files.float32 import float32_copy
from lynx_compile.files.lock import locked
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.ownership import LOCK, PRODUCER, SCRATCH
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import Display, silent
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.recipe import Model, Recipe
from lynx_compile.solve.moments import relative_error
from lynx_compile.tools import compare_torch, report
from lynx_compile.tools.compare_torch import TorchState
from lynx_compile.tools.comparison import (
    SHEET_COLUMNS,
    Comparison,
    EngineRun,
    Images,
    LinearError,
    Squares,
    StepError,
    missed,
    over_budget,
)
from lynx_compile.tools.compiled import Compiled
from lynx_compile.tools.held_out import (
    Sampler,
    State,
    Values,
    calibration_calls,
    draw,
    open_sampler,
    read_states,
    record_held_out,
    replaced,
    rows_of_images,
)
from lynx_compile.tools.images import as_picture, has_lpips, lpips, psnr, side_by_side
from lynx_compile.tools.linear_graphs import Part, linear_graphs
from lynx_compile.tools.metric import call_metric
from lynx_compile.torch_ops.operators import kernels_run

SHEET_PIXELS = 192
DIFFERENCE_GAIN = 4


AnyState = TypeVar("AnyState", State, TorchState)
Through = Literal["auto", "torch", "onnx"]


@dataclass(frozen=True)
class Measured:
    """What one of the two ways finds out; the fields as ``Comparison`` has them."""

    states: int
    linears: tuple[LinearError, ...]
    output: tuple[StepError, ...]
    images: Images | None
    metric: dict[str, float] | None
    engines: tuple[EngineRun, ...]
    not_measured: dict[str, str]


@dataclass(frozen=True)
class Job:
    """What is compared, and how what is done is shown. ``folder``: for what is needed meanwhile."""

    outputs: Outputs
    manifest: Manifest
    recipe: Recipe
    run_metric: bool
    display: Display
    folder: Path

    @property
    def component(self) -> str:
        return self.manifest.source.subfolder


def compare(
    engine: Path,
    *,
    cache: Path | None = None,
    run_metric: bool = False,
    through: Through = "auto",
    display: Display | None = None,
) -> Comparison:
    """Compare an engine with the dense model; writes ``OUT.compare.json``, ``.png`` and ``OUT.html``.

    Args:
        cache: folder that its compilation left; OUT.cache by default.
        run_metric: call the recipe's ``compare.metric``, which is somebody's code.
        through: what runs the models; auto is torch for what was compiled for torch, and on a GPU with our kernels.
        display: gets what is done, yields a callable that takes (what, done, total).

    Raises:
        InputError: a file is missing, damaged or of another run. StageError: a model cannot be run.
    """
    outputs = Outputs.find(engine, cache)
    manifest = Manifest.read(outputs.manifest)
    recipe = Compiled.read(outputs, manifest.engine.sha256).recipe
    limits = recipe.compare
    measure = _through_torch if _takes_torch(through, manifest, recipe) else _through_onnx
    with (
        _quiet(),
        locked(outputs.cache / LOCK),
        tempfile.TemporaryDirectory(prefix=SCRATCH, dir=outputs.cache) as scratch,
    ):
        found = measure(Job(outputs, manifest, recipe, run_metric, display or silent, Path(scratch)))
    comparison = Comparison(
        format_version=1,
        engine_sha256=manifest.engine.sha256,
        samples=limits.samples,
        steps=len(found.output),
        seed=limits.seed,
        states=min(limits.states, found.states),
        linears=found.linears,
        output=found.output,
        images=found.images,
        metric=found.metric,
        engines=found.engines,
        limits=limits,
        not_measured=found.not_measured,
        missed=missed(limits, found.linears, found.output, found.images, found.metric),
        over_budget=over_budget(manifest.budget, found.output, found.images),
    )
    comparison.write(outputs.comparison)
    report.write(outputs)
    return comparison


def _takes_torch(through: Through, manifest: Manifest, recipe: Recipe) -> bool:
    """Whether torch runs the models.

    Raises:
        InputError: it was asked for, and cannot.
    """
    possible = recipe.calibration.prompts is not None and isinstance(recipe.model, Model)
    if through == "torch" and not possible:
        raise InputError(
            "There is no diffusers pipeline in the recipe whose transformer torch could run.",
            "Compare with onnx.",
        )
    if through != "auto":
        return through == "torch"
    return possible and (manifest.backend.name == "torch" or kernels_run(DTYPES[manifest.dtype]))


def _through_onnx(job: Job) -> Measured:
    outputs, manifest, recipe, folder = job.outputs, job.manifest, job.recipe, job.folder
    not_measured = dict[str, str]()
    with job.display("float32") as progress:
        dense = float32_copy(outputs.dense, folder / "dense.onnx")
        lynx = float32_copy(outputs.onnx, folder / "lynx.onnx")
        parts = linear_graphs(dense, lynx, manifest, recipe.calibration.memory_gib, folder)
        progress("copied", 1, 1)
    with job.display("dense") as progress:
        sampler = open_sampler(recipe, outputs.cache / "converted")
        if sampler is None:
            recording = calibration_calls(recipe)
            not_measured["held-out calls"] = "the recipe has a recording, and no pipeline to make others"
        else:
            recording = record_held_out(sampler, job.component, folder / "held-out", progress)
            not_measured |= _shared(sampler)
        states = read_states(recording, job.component, manifest)
        reference = _dense_outputs(_runner(dense, "dense"), states, progress)
    with job.display("output") as progress:
        on_output = _output_errors(_runner(lynx, "lynx"), states, reference, progress)
    with job.display("linears") as progress:
        linears = _linear_errors(parts, manifest, _spread(states, recipe.compare.states), progress)
    with job.display("images") as progress:
        swapped = None if sampler is None else _graph_in(sampler, job, _runner(lynx, "lynx"))
        images, metric, reasons = _images(sampler, swapped, job, progress)
    with job.display("engines") as progress:
        engines, reason = _engines(outputs, recipe, manifest, states, reference, folder, progress)
        not_measured |= reasons | ({"engines": reason} if reason else {})
    return Measured(len(states), linears, on_output, images, metric, engines, not_measured)


def _through_torch(job: Job) -> Measured:
    """The module in the recipe's dtype, on a GPU where there is one."""
    with job.display("dense") as progress:
        dtype = DTYPES[job.manifest.dtype]
        sampler = open_sampler(job.recipe, job.outputs.cache / "converted", dtype)
        assert sampler is not None, "torch was taken for a pipeline"
        module, engine = getattr(sampler.pipe, job.component), job.outputs.engine
        recording = record_held_out(sampler, job.component, job.folder / "held-out", progress)
        states = compare_torch.read_states(recording, job.component, job.manifest)
        reference = compare_torch.module_outputs(module, states, progress)
    with job.display("output") as progress, compare_torch.applied(module, engine):
        found = compare_torch.module_outputs(module, states, progress)
    squares = compare_torch.output_squares(found, reference)
    on_output = _by_step(states, [_whole(of_state) for of_state in squares])
    with job.display("linears") as progress:
        chosen = _spread(states, job.recipe.compare.states)
        linears = _by_linear(job.manifest, compare_torch.linear_squares(module, engine, chosen, progress))
    with job.display("images") as progress:
        images, metric, reasons = _images(sampler, compare_torch.applied(module, engine), job, progress)
    reasons |= _shared(sampler) | {"engines": "torch ran the models; --with onnx times them"}
    return Measured(len(states), linears, on_output, images, metric, (), reasons)


def _shared(sampler: Sampler) -> dict[str, str]:
    """What is not measured where no prompt was held out."""
    if sampler.held_out:
        return {}
    return {
        "other prompts": "the recipe has too few to hold some out; errors are on other noise of the same ones"
    }


@contextmanager
def _graph_in(sampler: Sampler, job: Job, lynx: Any) -> Iterator[None]:
    """The pipeline's transformer computes with a graph meanwhile."""
    with lynx, replaced(getattr(sampler.pipe, job.component), job.manifest, lynx.infer):
        yield


def _runner(path: Path, name: str) -> OnnxrtRunner:
    return OnnxrtRunner(SessionFromOnnx(str(path)), name=name)


def _dense_outputs(runner: Any, states: Sequence[State], progress: Progress) -> list[Values]:
    """What the dense graph returns in every state."""
    found = []
    with runner:
        for done, state in enumerate(states):
            found.append({name: np.array(value) for name, value in runner.infer(state.feed).items()})
            progress("states", done + 1, len(states))
    return found


def _output_errors(
    runner: Any, states: Sequence[State], dense: Sequence[Values], progress: Progress
) -> tuple[StepError, ...]:
    reference = RunResults([("dense", [IterationResult(values, runner_name="dense") for values in dense])])
    stream = Comparator.run([runner], data_loader=_feeds(states, progress), streaming=True)
    return _by_step(states, [_whole(found) for found in _squares([reference, stream])])


def _whole(found: Mapping[str, Squares]) -> float:
    """The error of a state: that of its worst output, where the model has several."""
    return max(squares.error for squares in found.values())


def _linear_errors(
    parts: Sequence[Part], manifest: Manifest, states: Sequence[State], progress: Progress
) -> tuple[LinearError, ...]:
    squares: dict[str, list[Squares]] = defaultdict(list)
    for number, part in enumerate(parts):
        runners = [_runner(part.dense, "dense"), _runner(part.lynx, "lynx")]
        feeds = _feeds(states, progress, number, len(parts))
        for found in _squares(Comparator.run(runners, data_loader=feeds, streaming=True)):
            for name, of_state in found.items():
                squares[part.linears[name]].append(of_state)
    return _by_linear(manifest, squares)


def _by_linear(manifest: Manifest, squares: Mapping[str, Sequence[Squares]]) -> tuple[LinearError, ...]:
    """Every sparse linear's errors, the worst first."""
    linears = [
        LinearError(
            linear=linear,
            layer=node.layer,
            error=relative_error(sum(s.lost for s in squares[linear]), sum(s.dense for s in squares[linear])),
            worst=max(s.error for s in squares[linear]),
            expected=expected,
        )
        for node in manifest.sparse
        for linear, expected in zip(node.linears, node.errors, strict=True)
    ]
    return tuple(sorted(linears, key=lambda linear: -linear.error))


def _squares(results: Any) -> list[dict[str, Squares]]:
    """{output: how far the second runner is from the first} for every state."""
    try:
        (states,) = Comparator.compare_accuracy(results, compare_func=_compare_squares)[0].values()
    except PolygraphyException as error:
        raise StageError("compare", f"polygraphy cannot run the models ({error}).", "Report it.") from error
    for state in states:
        if bad := [name for name, of_state in state.items() if not 0 < of_state.dense < math.inf]:
            raise StageError(
                "compare",
                f"'{bad[0]}' is not finite, or zero in the dense model.",
                "Check the calibration inputs and the checkpoint.",
            )
        if bad := [name for name, of_state in state.items() if not math.isfinite(of_state.lost)]:
            raise StageError("compare", f"'{bad[0]}' of the Lynx model is not finite.", "Report the model.")
    return list(states)


def _compare_squares(dense: IterationResult, lynx: IterationResult) -> dict[str, Squares]:
    def sums(name: str) -> Squares:
        y, y_dense = (np.asarray(result[name], dtype=np.float64) for result in (lynx, dense))
        return Squares(float(np.square(y - y_dense).sum()), float(np.square(y_dense).sum()))

    return {name: sums(name) for name in dense}


def _by_step(states: Sequence[State | TorchState], errors: Sequence[float]) -> tuple[StepError, ...]:
    steps: dict[int, list[float]] = defaultdict(list)
    for state, error in zip(states, errors, strict=True):
        steps[state.step].append(error)
    timesteps = {state.step: state.time for state in states}
    return tuple(
        StepError(step=step, timestep=timesteps[step], error=_mean_square(found), worst=max(found))
        for step, found in sorted(steps.items())
    )


def _mean_square(errors: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(error * error for error in errors))


def _spread(states: Sequence[AnyState], count: int) -> list[AnyState]:
    """So many states, evenly from the first to the last."""
    chosen = np.linspace(0, len(states) - 1, min(count, len(states))).round().astype(int)
    return [states[i] for i in chosen]


def _feeds(states: Sequence[State], progress: Progress, part: int = 0, parts: int = 1) -> Iterator[Values]:
    for done, state in enumerate(states):
        yield state.feed
        progress("states", part * len(states) + done + 1, parts * len(states))


def _images(
    sampler: Sampler | None, swapped: AbstractContextManager[None] | None, job: Job, progress: Progress
) -> tuple[Images | None, dict[str, float] | None, dict[str, str]]:
    """PSNR, LPIPS and the sheet; the recipe's metric; and what could not be measured, with reasons.

    ``swapped``: meanwhile the pipeline has the compiled model; None where there is no sampler.
    """
    reasons, metric, sheet = {}, job.recipe.compare.metric, job.outputs.sheet
    if metric is None:
        reasons["metric"] = "the recipe names none"
    elif not job.run_metric:
        reasons["metric"] = f"{metric} is code; allow it with --metric"
    if sampler is None or swapped is None:
        why = "the recipe has a recording, and no pipeline to draw them"
        return None, None, reasons | {"images": why, "LPIPS": "there are no images"}
    dense_images = draw(sampler, progress)
    with swapped:
        lynx_images = draw(sampler, progress)
    if dense_images is None or lynx_images is None:
        why = f"the {type(sampler.pipe).__name__} returns none"
        return None, None, reasons | {"images": why, "LPIPS": "there are no images"}
    pairs = list(zip(dense_images, lynx_images, strict=True))
    mean_lpips = None
    if not has_lpips():
        reasons["LPIPS"] = "the Python package lpips is not installed"
    else:
        scores = [lpips(*pair) for pair in pairs]
        mean_lpips = statistics.fmean(s for s in scores if s is not None) if None not in scores else None
        if mean_lpips is None:
            reasons["LPIPS"] = "lpips cannot use these images"
    _write_sheet(dense_images, lynx_images, sheet)
    numbers = None
    if metric is not None and job.run_metric:
        numbers = call_metric(metric, dense_images, lynx_images, rows_of_images(sampler, len(dense_images)))
    scores_db = tuple(psnr(*pair) for pair in pairs)
    return Images(psnr=scores_db, lpips=mean_lpips, sheet=sheet.name), numbers, reasons


def _write_sheet(dense: np.ndarray, lynx: np.ndarray, path: Path) -> None:
    """A row of the dense model's images, one of the Lynx model's, one of their differences, made stronger."""
    from PIL import PngImagePlugin

    columns = min(len(dense), SHEET_COLUMNS)
    difference = np.clip(DIFFERENCE_GAIN * np.abs(lynx - dense), 0, 1)
    rows = [side_by_side(images[:columns]) for images in (dense, lynx, difference)]
    grid = np.concatenate(rows, axis=1)  # [colours, height, width]
    picture = as_picture(grid, max(dense.shape[2:]), SHEET_PIXELS // 2, SHEET_PIXELS)
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Software", PRODUCER)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=facts)


def _engines(
    outputs: Outputs,
    recipe: Recipe,
    manifest: Manifest,
    states: Sequence[State],
    reference: Sequence[Values],
    folder: Path,
    progress: Progress,
) -> tuple[tuple[EngineRun, ...], str | None]:
    """Both engines on this machine's GPU, or the reason why not."""
    if trt.gpu() is None:
        return (), "there is no GPU here"
    from lynx_compile.tools.dense_engine import build_dense_engine, run_engine

    found = []
    try:
        dense = build_dense_engine(recipe, outputs.dense, manifest, folder / "dense.engine")
        kinds: tuple[tuple[Literal["dense", "lynx"], Path], ...] = (
            ("dense", dense),
            ("lynx", outputs.engine),
        )
        for kind, path in kinds:
            results, times = run_engine(path, [state.feed for state in states])
            given = [
                RunResults([(name, [IterationResult(value, runner_name=name) for value in values])])
                for name, values in (("onnx", reference), (kind, results))
            ]
            errors = _by_step(states, [_whole(squares) for squares in _squares(given)])
            found.append(EngineRun(kind=kind, steps=errors, milliseconds=1000 * statistics.median(times)))
            progress("engines", len(found), 2)
    except (LynxError, ImportError) as error:
        return tuple(found), str(error)
    return tuple(found), None


@contextmanager
def _quiet() -> Iterator[None]:
    """polygraphy prints every comparison, and calls what is above its own default threshold an error."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield
