# SPDX-License-Identifier: Apache-2.0
"""The whole compiler: from a recipe to a TensorRT engine, one stage after the other."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from lynx_compile import __version__, parallel
from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError, LynxError
from lynx_compile.files.lock import lock, this_process
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.ownership import claimed
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import Display, Stages, StageVersion, key_of, silent
from lynx_compile.models import prompts
from lynx_compile.models import recording as recordings
from lynx_compile.models.dit import DiT, find_dit
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.onnx_source import OnnxSource
from lynx_compile.models.opened import Opened, open_model
from lynx_compile.models.recording import Group, Recording
from lynx_compile.passes.adopt import adopt
from lynx_compile.passes.budget import Selection, choose, require_speed
from lynx_compile.passes.build import BUILD, BuiltEngine, build
from lynx_compile.passes.calibrate import CALIBRATE, Statistics, Unkept, are_kept, calibrate, measurements
from lynx_compile.passes.compensate import COMPENSATE, compensate
from lynx_compile.passes.describe import describe
from lynx_compile.passes.durations import Calls
from lynx_compile.passes.export import EXPORT, DenseOnnx, export, referred
from lynx_compile.passes.forecast import forecast
from lynx_compile.passes.keep import keep
from lynx_compile.passes.record import CAPTURE, Rows, named_components, read_files, record
from lynx_compile.passes.rewrite import REWRITE, LynxOnnx, graph_digest, rewrite
from lynx_compile.passes.select import Candidates, SparseGroup, SparsityPlan, candidates, require_fp8
from lynx_compile.passes.sensitivity import SENSITIVITY, Sensitivities, sensitivity
from lynx_compile.passes.speed_table import Form
from lynx_compile.passes.target import Target, target_of
from lynx_compile.passes.tune import TUNE, Tuned, is_tuned, tune
from lynx_compile.passes.verify import SELECT, VERIFY, Verified, verify, within_error, within_psnr
from lynx_compile.recipe import Recipe
from lynx_compile.tools import report
from lynx_compile.tools.compiled import Compiled
from lynx_compile.tools.drawn import Drawn

RECORDED_ALIKE = {
    "prompts": "",
    "tokens_per_call": 1,
    "memory_gib": 1.0,
}  # what of calibration no recording depends on

log = logging.getLogger(__name__)


def compile(
    recipe: Recipe,
    output: Path,
    *,
    cache: Path | None = None,
    fresh: bool = False,
    display: Display | None = None,
) -> tuple[Manifest, ...]:
    """Compile ``recipe`` into the engine ``output``, with its manifest, ONNX, weights and log beside it.

    A pipeline of several denoisers becomes as many engines: ``-o wan.engine`` writes wan.transformer.engine and
    wan.transformer_2.engine. So does one that calls its transformer in several ways, which need a graph each:
    ltx.0.engine, ltx.1.engine ... A stage whose inputs are unchanged since the last run is taken from the cache.
    Nothing beside ``output`` is touched before every stage has succeeded, but for the log. Processes that were
    ``parallel.joined`` share capture, calibration and compensation out; those that are not the first return nothing.

    Args:
        cache: folder of what the stages leave; OUT.cache by default.
        fresh: run every stage again.
        display: gets a stage's name, yields a callable that takes (what, done, total).

    Raises:
        InputError: the recipe, the model or a file is wrong, or an output is not this run's to write.
        StageError: a stage failed. DiskFullError: there is no room.
    """
    outputs = Outputs.chosen(output, cache)
    with claimed(outputs, recipe.files, recipe.checkpoint), _logged(outputs.log):
        log.info("output %s, recipe %s", outputs.engine, recipe.model_dump_json())
        stages = Stages(outputs, fresh, display or silent)
        target = target_of(recipe.engine)
        plugin = trt.plugin_library(recipe.engine.plugin)
        require_fp8(recipe.sparsity, target.gpus)
        rows = read_files(recipe)
        with (display or silent)("open") as progress:  # a download, and hashing, take minutes
            with parallel.first_process_first():
                opened = open_model(recipe, outputs.cache / "converted", progress)
            for checkpoint in opened.checkpoints.values():
                checkpoint.digest(progress)
            if recipe.calibration.recording is not None:
                opened.check_values(DTYPES[recipe.model.dtype], progress)
        if fresh:
            _forget(outputs)
        recording = _recording(recipe, rows, opened, outputs, stages)
        del rows  # encoded ones are large
        ways = recording.ways()
        if len(ways) == 1:
            only = _compile_engine(recipe, opened, recording, ways[0], outputs, stages, target, plugin)
            return () if only is None else (only,)
        for line in recording.describe():
            log.info("%s", line)
        manifests = []
        for way in ways:
            part = outputs.part(recordings.part_name(way, ways))
            with claimed(part, recipe.files, recipe.checkpoint):
                if fresh:
                    _forget(part)
                own = Stages(part, fresh, display or silent)
                manifests.append(_compile_engine(recipe, opened, recording, way, part, own, target, plugin))
        return tuple(manifest for manifest in manifests if manifest is not None)


def _forget(outputs: Outputs) -> None:
    """What a stage would go on with where it stopped."""
    if not parallel.is_first():
        return
    for name in ("recording", "statistics", "weights", "sensitivity", "tuned"):
        shutil.rmtree(outputs.cache / name, ignore_errors=True)


def _recording(recipe: Recipe, rows: Rows, opened: Opened, outputs: Outputs, stages: Stages) -> Recording:
    """The pipeline's calls, or those that were recorded before."""
    if recipe.calibration.recording is not None:
        return recordings.load(Path(recipe.calibration.recording))

    def capture(progress: Progress) -> Recording:
        opened.check_values(DTYPES[recipe.model.dtype], progress)
        return record(recipe, opened, rows, outputs.cache / "recording", progress)

    return stages.run(
        CAPTURE,
        Recording,
        capture,
        {name: checkpoint.digest() for name, checkpoint in opened.checkpoints.items()},
        prompts.digest_of(rows), recipe.call, named_components(recipe), recipe.model.dtype,
        recipe.calibration.model_copy(update=RECORDED_ALIKE),
        shared=True,
    )  # fmt: skip


def _compile_engine(
    recipe: Recipe,
    opened: Opened,
    recording: Recording,
    calls: Group,
    outputs: Outputs,
    stages: Stages,
    target: Target,
    plugin: trt.PluginLibrary,
) -> Manifest | None:
    """One way in which one denoiser is called, from its recorded calls to its engine; None where others build it."""
    dit = find_dit(opened.of(calls.component), recording, calls, DTYPES[recipe.model.dtype])
    recorded = recording.header.key, calls.component, calls.index, recipe.model.dtype
    made = _decide(recipe, dit, recording, recorded, outputs, stages, target)
    if made is None:
        return None
    dit.release()  # a large model and its copy in the exporter would not fit together
    dense = stages.run(
        EXPORT, DenseOnnx, lambda _: _dense(dit, outputs.dense), dit.digest, *recorded, referred(dit)
    )
    dit.release()
    external = recipe.engine.weights == "external"
    layout = target.metadata_layout
    lynx = stages.run(
        REWRITE,
        LynxOnnx,
        lambda progress: rewrite(
            dense, made.plan, made.weights, outputs.cache / "lynx" / outputs.onnx.name,
            external=external, metadata_layout=layout, progress=progress,
        ),
        *map(stages.key, (*made.stages, EXPORT)), made.plan, outputs.onnx.name, external, layout,
        reads=(*made.stages, EXPORT), published=True,
    )  # fmt: skip
    engine = outputs.cache / "engine" / outputs.engine.name
    built = stages.run(
        BUILD,
        BuiltEngine,
        lambda progress: keep(lynx, recipe.engine, target, engine)
        if target.name == "torch"
        else build(lynx, recipe.engine, engine, progress=progress),
        # Weights that a runtime binds are none of the engine's: other LoRAs, or other seeds, build nothing anew.
        graph_digest(lynx) if external else stages.key(REWRITE),
        recipe.engine.model_copy(update={"plugin": None}), plugin.sha256,
        target.name, target.version, target.gpu, target.gpus, outputs.engine.name,
        reads=(REWRITE,), published=True,
    )  # fmt: skip
    written, decided = stages.written(REWRITE, BUILD), (made.selection, made.verified)
    manifest = describe(recipe, dit, dense, lynx, built, written, stages.costs, *decided)
    with stages.publish(REWRITE, BUILD):  # an engine never stands beside another run's manifest
        manifest.write(outputs.manifest)
        Compiled(recipe, stages.key(EXPORT), built.sha256).write(outputs)
    report.write(outputs)
    log.info("done: %s", manifest.summary())
    return manifest


@dataclass(frozen=True)
class _Decided:
    """What every linear becomes, and its weights, with the ``stages`` that wrote them.

    ``selection`` and ``verified``: what decided, where a budget did.
    """

    plan: SparsityPlan
    weights: tuple[Path, ...]
    stages: tuple[StageVersion, ...]
    selection: Selection | None = None
    verified: Verified | None = None


def _decide(
    recipe: Recipe,
    dit: DiT,
    recording: Recording,
    recorded: tuple[str, str, int, str],
    outputs: Outputs,
    stages: Stages,
    target: Target,
) -> _Decided | None:
    """From what linears could become to what they do, by error where the recipe leaves it open; None where another
    process decides."""
    judged = recipe.judge
    if isinstance(dit.checkpoint, OnnxSource):
        log.warning(
            "an ONNX model has no gradients: speed decides on its linears, and no error is held against it"
        )
    found = candidates(dit.groups, recipe.sparsity, target.gpus, by_speed=judged is None)
    nodes, everything = found.nodes, found.everything()
    plan = None if found.open else found.plan({})
    if judged is not None and plan is None:
        require_speed(found, judged)
    _foresee(recipe, dit, found, Calls.of(recording, dit.calls, dit.groups), target, outputs)
    measured = (
        dit.digest, *recorded, recipe.calibration.tokens_per_call, recipe.calibration.seed,
        recipe.sparsity.uses_norm_scale, recipe.sparsity.needs_moments, measurements(everything),
    )  # fmt: skip
    statistics: Statistics | Unkept = Unkept(dit, everything, recording, recipe)
    kept = (CALIBRATE,) if are_kept(everything, recipe) else ()
    if kept:
        statistics = stages.run(
            CALIBRATE,
            Statistics,
            lambda progress: calibrate(
                dit, everything, recording, recipe, outputs.cache / "statistics", progress, stages.key(CALIBRATE)
            ),
            *measured, shared=True,
        )  # fmt: skip
    files = stages.run(
        COMPENSATE,
        tuple[Path, ...],
        lambda progress: compensate(
            dit, everything, statistics, recipe.sparsity, outputs.cache / "weights", progress, stages.key(COMPENSATE)
        ),
        # The costs count through what they decide.
        key_of(CALIBRATE, *measured), recipe.sparsity.model_copy(update={"costs": None}), _forms(nodes),
        reads=kept, shared=True,
    )  # fmt: skip
    if not parallel.is_first():
        dit.release()
        return None  # what follows is one process's work
    solved = dict(zip(nodes, files, strict=True))
    if judged is None or plan is not None:
        assert plan is not None, "speed leaves nothing open"
        weights, by = _tuned(recipe, dit, plan, solved, statistics, recording, outputs, stages)
        return _Decided(plan, tuple(weights.values()), by)
    sensitivities = stages.run(
        SENSITIVITY,
        Sensitivities,
        lambda progress: sensitivity(
            dit, nodes, files, recording, recipe, outputs.cache / "sensitivity", stages.key(SENSITIVITY), progress
        ),
        stages.key(COMPENSATE), *recorded, recipe.calibration.seed, _forms(nodes),
        reads=(COMPENSATE,),
    )  # fmt: skip
    selection = choose(found, sensitivities, judged, tuned=is_tuned(dit, found.fastest(), recipe))
    order = tuple((step.group, step.after.form) for step in selection.steps)
    drawn = Drawn(recipe, outputs.cache / "converted", dit.component) if judged.min_psnr is not None else None
    others = recipe.compare.prompts if drawn is not None else None
    images = None if others is None else prompts.digest_of(prompts.read(Path(others)))
    taken = len(order)
    if drawn is not None:
        dit.release()  # the pipeline has a transformer of its own
        taken = stages.run(
            SELECT,
            int,
            lambda progress: within_psnr(selection, solved, drawn, progress),
            stages.key(SENSITIVITY), *recorded, order, judged, recipe.call, recipe.compare, images,
            reads=(COMPENSATE,),
        )  # fmt: skip
        drawn.release()
    elif selection.is_optimistic:
        taken = stages.run(
            SELECT,
            int,
            lambda progress: within_error(dit, selection, solved, recording, progress),
            stages.key(SENSITIVITY), *recorded, order, judged,
            reads=(COMPENSATE,),
        )  # fmt: skip
    weights, by = _tuned(recipe, dit, selection.plan(taken), solved, statistics, recording, outputs, stages)
    verified = stages.run(
        VERIFY,
        Verified,
        lambda progress: verify(
            dit, selection, taken, solved, weights if TUNE in by else None, recording, drawn, progress
        ),
        *map(stages.key, by), stages.key(SENSITIVITY), order, taken, judged, recipe.call, recipe.compare, images,
        reads=by,
    )  # fmt: skip
    by = (*dict.fromkeys((COMPENSATE, *by)), VERIFY)
    return _Decided(selection.plan(verified.taken), verified.weights, by, selection, verified)


def _tuned(
    recipe: Recipe,
    dit: DiT,
    plan: SparsityPlan,
    solved: Mapping[SparseGroup, Path],
    statistics: Statistics | Unkept,
    recording: Recording,
    outputs: Outputs,
    stages: Stages,
) -> tuple[dict[SparseGroup, Path], tuple[StageVersion, ...]]:
    """The weights of a plan's groups, tuned if the recipe wants it, and the stage that wrote them."""
    weights = [solved[group] for group in plan.groups]
    if not is_tuned(dit, plan, recipe):
        return dict(zip(plan.groups, weights, strict=True)), (COMPENSATE,)
    blocks = outputs.cache / "tuned"
    kept = (CALIBRATE,) if isinstance(statistics, Statistics) else ()
    if isinstance(statistics, Unkept):
        statistics = replace(statistics, sampled=True)  # it is for the errors alone
    tuned = stages.run(
        TUNE,
        Tuned,
        lambda progress: tune(
            dit, plan, weights, statistics, recording, recipe, blocks, stages.key(TUNE), progress
        ),
        stages.key(COMPENSATE), recipe.compensation, recipe.calibration.seed, recipe.calibration.memory_gib,
        _forms(plan.groups), reads=(*kept, COMPENSATE),
    )  # fmt: skip
    return dict(zip(plan.groups, tuned.weights, strict=True)), (TUNE,)


def _forms(nodes: Sequence[SparseGroup]) -> tuple[tuple[tuple[str, ...], Form], ...]:
    """Of what stages work on, what their results depend on."""
    return tuple((tuple(linear.path for linear in node.linears), node.form) for node in nodes)


def _foresee(
    recipe: Recipe, dit: DiT, found: Candidates, calls: Calls, target: Target, outputs: Outputs
) -> None:
    """Say what the stages will take, and refuse what this machine has not."""
    expected = forecast(recipe, dit.checkpoint, target, outputs, found, calls)
    for line in expected.describe():
        log.info("expected: %s", line)
    expected.require(outputs.folder)


def _dense(dit: DiT, path: Path) -> DenseOnnx:
    """A module is traced; what is ONNX already is taken as it is."""
    source = dit.checkpoint
    return adopt(source.onnx, path) if isinstance(source, OnnxSource) else export(dit, path, referring=True)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """The package's log (TensorRT's messages too) into ``path`` as well, with the error that ends the run.

    The file is locked meanwhile: another run for this output may have another cache.
    """
    if not parallel.is_first():
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"The log {path} cannot be written ({error.strerror}).",
            "Check the output's folder and its permissions.",
        ) from None
    handler, logger = _Handler(file), logging.getLogger("lynx_compile")
    try:
        lock(file.fileno(), path)
        file.truncate(0)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        log.info("lynx-compile %s, %s", __version__, this_process())
        try:
            yield
        except LynxError as error:
            error.log = path
            raise
    except BaseException as error:
        log.info("ended by %s: %s", type(error).__name__, error)  # the caller shows it
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            file.close()


class _Handler(logging.StreamHandler[TextIO]):
    """A log that falls silent where the disk is full: the run's own error says so."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass
