# SPDX-License-Identifier: Apache-2.0
"""The whole compiler: from a recipe to a TensorRT engine, one stage after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lynx_compile import __version__, models
from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import file_digest, uninterrupted
from lynx_compile.files.resume import Display, Stages, silent
from lynx_compile.models import flux
from lynx_compile.passes.build import BuiltEngine, build
from lynx_compile.passes.calibrate import Statistics, calibrate, measurements
from lynx_compile.passes.compensate import compensate
from lynx_compile.passes.describe import describe
from lynx_compile.passes.export import DenseOnnx, export
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.passes.select import select
from lynx_compile.recipe import Recipe
from lynx_compile.tools import report
from lynx_compile.tools.compiled import Compiled

log = logging.getLogger(__name__)


def compile(recipe: Recipe, output: Path, *, fresh: bool = False, display: Display | None = None) -> Manifest:
    """Compile ``recipe`` into the engine ``output``, with its manifest, ONNX, weights and log beside it.

    A stage whose inputs are unchanged since the last run for this output is taken from ``OUT.cache``. Nothing
    beside ``output`` is touched before every stage has succeeded, but for the log.

    Args:
        fresh: run every stage again.
        display: gets a stage's name, yields a callable that takes (what, done, total).

    Raises:
        InputError: the recipe, the model or a file is wrong. StageError: a stage failed.
    """
    cache = output.with_suffix(".cache")
    with _logged(output.with_suffix(".log")):
        log.info("lynx-compile %s, output %s, recipe %s", __version__, output, recipe.model_dump_json())
        stages = Stages(cache, fresh, display or silent)
        backend = trt.backend(recipe.engine.backend)
        plugin = trt.plugin_library(recipe.engine.plugin)
        dit = models.load(recipe)
        plan = select(dit.groups, recipe.sparsity, None if backend.ahead_of_time else trt.gpu())
        statistics = stages.run(
            "calibrate",
            Statistics,
            lambda progress: calibrate(dit, plan, recipe, cache / "statistics", progress),
            dit.digest, recipe.model.dtype, recipe.shapes, recipe.calibration,
            file_digest(Path(recipe.calibration.source)), recipe.sparsity.uses_norm_scale,
            measurements(plan),
        )  # fmt: skip
        weights = stages.run(
            "compensate",
            tuple[Path, ...],
            lambda progress: compensate(dit, plan, statistics, recipe.sparsity, cache / "weights", progress),
            # The costs count through what they decide.
            stages.key("calibrate"), recipe.sparsity.model_copy(update={"costs": None}),
            tuple((decision.linear.path, decision.operand) for decision in plan.decisions),
        )  # fmt: skip
        dit.release()  # a large model and its copy in the exporter would not fit together
        dense = stages.run(
            "export",
            DenseOnnx,
            lambda _: export(dit, cache / "dense" / "dense.onnx"),
            dit.digest, recipe.model.dtype, recipe.shapes,
        )  # fmt: skip
        dit.release()
        external = recipe.engine.weights == "external"
        layout = trt.metadata_layout(backend)
        lynx = stages.run(
            "rewrite",
            LynxOnnx,
            lambda _: rewrite(
                dense, plan, weights, cache / "lynx" / f"{output.stem}.onnx",
                external=external, metadata_layout=layout,
            ),
            stages.key("compensate"), stages.key("export"), plan, output.name, external, layout,
        )  # fmt: skip
        built = stages.run(
            "build",
            BuiltEngine,
            lambda progress: build(lynx, recipe.engine, cache / "engine" / output.name, progress=progress),
            stages.key("rewrite"), recipe.engine, backend.name, backend.version, plugin.sha256,
        )  # fmt: skip
        manifest = describe(recipe, dit, lynx, built, stages.costs, flux.call(dit.inputs))
        with uninterrupted():  # an engine never stands beside another run's manifest
            stages.publish(output.parent, "rewrite", "build")
            manifest.write(output.with_suffix(".json"))
            Compiled(recipe, dense.path, stages.key("export"), built.sha256).write(output)
        report.write(output)
        log.info("done: %s", manifest.summary())
        return manifest


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """The package's log (TensorRT's messages too) into ``path`` as well, with the error that ends the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"The log {path} cannot be written ({error.strerror}).",
            "Check the output's folder and its permissions.",
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("lynx_compile")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.info("ended by %s: %s", type(error).__name__, error)  # the caller shows it
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
