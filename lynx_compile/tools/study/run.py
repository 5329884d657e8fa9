# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile study``: the methods of the literature and ours on one model, at equal rank and equal tuning time.

Every method changes the same linears, from one calibration, and is measured alike on prompts and noise that
calibration did not see: the model's output on the dense model's own calls, every linear on the dense model's own
input, and images against the dense model's of the same noise. The module runs in torch, in float32 where it is small,
with what each method would store; FP8 with the rounding of the op's definition (``ops.fp8``). A seed decides the
calibration's noise, the tuning and the noise that is measured on.

What is done is kept: a method and seed whose inputs are unchanged are not done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch

from lynx_compile import __version__
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import save_text
from lynx_compile.files.digest import file_digest
from lynx_compile.files.lock import locked
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import Display, silent
from lynx_compile.models import prompts
from lynx_compile.models.dit import DiT, find_dit
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import open_model
from lynx_compile.models.recording import Group, Recording
from lynx_compile.passes.calibrate import CALIBRATE
from lynx_compile.passes.compensate import COMPENSATE
from lynx_compile.passes.record import CAPTURE, record
from lynx_compile.passes.tune import TUNE
from lynx_compile.recipe import Model, Recipe
from lynx_compile.tools.held_out import Sampler, open_sampler
from lynx_compile.tools.study import show
from lynx_compile.tools.study.measure import HeldOut, hold_out, measure
from lynx_compile.tools.study.methods import METHODS, Workshop
from lynx_compile.tools.study.results import Run, Study, markdown

VERSION = 1  # raised with every change after which the same inputs give other figures
FLOAT32_PARAMETERS = 10**9  # of a transformer that is measured in float32 on a GPU too

log = logging.getLogger(__name__)


def study(
    recipe: Recipe,
    name: str,
    folder: Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 1,
    run_metric: bool = False,
    display: Display | None = None,
) -> Study:
    """Study ``recipe``'s model; writes ``study.json``, ``.md`` and ``.png``, and ``sheet.png``, into ``folder``.

    Args:
        name: of the model, in what is written.
        folder: also for what is needed meanwhile, in ``cache``, which may be deleted.
        methods: of ``METHODS``, in its order.
        run_metric: call the recipe's ``compare.metric``, which is somebody's code.
        display: gets what is done, yields a callable that takes (what, done, total).

    Raises:
        InputError: the recipe has no pipeline, or one of several denoisers. StageError: a stage failed.
    """
    if not isinstance(recipe.model, Model) or recipe.calibration.prompts is None:
        raise InputError(
            "A study runs the model's pipeline, and this recipe has a recording instead.",
            "Give model.source and calibration.prompts.",
        )
    with locked(folder / "cache" / "lock"):
        return _Studies(recipe, name, folder, run_metric, display or silent).run(methods, seeds)


class _Studies:
    """One study, from what an earlier run has left of it."""

    def __init__(self, recipe: Recipe, name: str, folder: Path, run_metric: bool, display: Display) -> None:
        self._recipe, self._name, self._folder = recipe, name, folder
        self._metric = recipe.compare.metric if run_metric else None
        self._display = display
        with display("open") as progress:
            self._opened = open_model(recipe, folder / "cache" / "converted", progress)
            digests = {n: checkpoint.digest(progress) for n, checkpoint in self._opened.checkpoints.items()}
        self._key = _digest(_common(recipe), digests, _device())
        self._cache = folder / "cache" / self._key[:16]
        self._sampler: Sampler | None = None
        self._study = self._measured()

    def run(self, methods: Sequence[str], seeds: int) -> Study:
        """Every method of every seed that is not there yet."""
        for seed in range(seeds):
            missing = [method for method in methods if not self._has(method, seed)]
            if missing:
                self._run_seed(seed, missing)
        assert self._study is not None, "there is a seed and a method"
        save_text(self._folder / "study.md", f"{markdown(self._study)}\n")
        show.draw_chart(self._study, self._folder / "study.png")
        show.draw_sheet(self._study, self._cache / "images", self._folder / "sheet.png")
        return self._study

    def _measured(self) -> Study | None:
        """What is there of this study; that of another in the same folder goes into the cache, to be found again."""
        path = self._folder / "study.json"
        old = Study.read(path)
        if old is not None and old.key != self._key:
            kept = self._folder / "cache" / old.key[:16] / path.name
            log.warning("%s is of other choices; it is kept as %s, for a run with those", path, kept)
            old.write(kept)
            old = Study.read(self._cache / path.name)
        return old and old.model_copy(update={"name": self._name})

    def _has(self, method: str, seed: int) -> bool:
        row = self._study.row(method) if self._study is not None else None
        return row is not None and row.key == self._row_key(method) and any(r.seed == seed for r in row.runs)

    def _row_key(self, method: str) -> str:
        """What a method's own figures depend on besides."""
        tuning = METHODS[method].tuned and self._recipe.compensation.model_dump(mode="json")
        return _digest(tuning, self._metric)[:16]

    def _run_seed(self, seed: int, methods: Sequence[str]) -> None:
        recipe = _seeded(self._recipe, seed)
        cache = self._cache / f"seed-{seed}"
        with self._display(f"seed {seed}") as progress:
            recording = self._record(recipe, cache / "recording", progress)
            calls = _calls(recording)
            component = calls.component
            dit = find_dit(self._opened.of(component), recording, calls, DTYPES[self._recipe.model.dtype])
            sampler = self._sampler_of(recipe, dit)
            held_out = hold_out(sampler, component, cache / "held-out", progress)
            workshop = Workshop(dit, recording, recipe, cache, self._key, progress)
        if self._study is None:
            self._study = self._begun(workshop, held_out)
        for method in methods:
            with self._display(method) as progress:
                self._run_method(method, seed, replace(workshop, progress=progress), held_out)

    def _run_method(self, method: str, seed: int, workshop: Workshop, held_out: HeldOut) -> None:
        made = workshop.make(METHODS[method])
        found = measure(
            held_out, made.rows, DTYPES[self._recipe.model.dtype], self._recipe.compare.states,
            self._metric, workshop.progress,
        )  # fmt: skip
        run = Run(
            seed=seed,
            layer_error=found.layer_error,
            output_error=found.output_error,
            by_step=found.by_step,
            psnr=found.psnr,
            ssim=found.ssim,
            lpips=found.lpips,
            metric=found.metric,
            solved_seconds=round(made.solved_seconds, 1),
            tuned_seconds=round(made.tuned_seconds, 1),
        )
        log.info("%s, seed %d: %s", method, seed, run)
        assert self._study is not None, "it has begun"
        minutes = self._recipe.compensation.minutes if METHODS[method].tuned else None
        self._study = self._study.with_run(method, self._row_key(method), minutes, run)
        if seed == 0 and found.images is not None:
            show.save_strip(found.images, self._cache / "images" / f"{method}.png")
        self._study.write(self._folder / "study.json")

    def _record(self, recipe: Recipe, folder: Path, progress: Progress) -> Recording:
        rows = prompts.read(Path(recipe.calibration.prompts or ""))
        return record(recipe, self._opened, rows, folder, progress)

    def _sampler_of(self, recipe: Recipe, dit: DiT) -> Sampler:
        """The pipeline, opened once, with the noise of this seed."""
        if self._sampler is None:
            self._sampler = open_sampler(recipe, self._folder / "cache" / "converted", _dtype(dit))
            assert self._sampler is not None, "the recipe has a pipeline"
        return replace(self._sampler, recipe=recipe)

    def _begun(self, workshop: Workshop, held_out: HeldOut) -> Study:
        """Without rows."""
        dit, sizes = workshop.dit, {}
        for group in dit.groups:
            for linear in group.linears:
                sizes[linear.path] = linear.in_channels * linear.out_channels * group.tokens
        return Study(
            name=self._name,
            key=self._key,
            device=_device(),
            dtype=str(next(held_out.module.parameters()).dtype).removeprefix("torch."),
            date=datetime.now(UTC).date().isoformat(),
            linears=len(workshop.linears),
            share=round(sum(sizes[path] for path in workshop.linears) / sum(sizes.values()), 4),
            prompts=self._recipe.calibration.samples,
            calls=len(dit.calls.calls),
            batch=self._recipe.calibration.batch,
            samples=self._recipe.compare.samples,
            held_out=held_out.sampler.held_out,
            timesteps=held_out.timesteps,
            rows=(),
        )


def with_choices(
    recipe: Recipe,
    *,
    minutes: float | None = None,
    samples: int | None = None,
    batch: int | None = None,
    prompts_calibrated: int | None = None,
    states: int | None = None,
) -> Recipe:
    """The recipe with a study's own choices, of those that are given.

    Args:
        minutes: of tuning. samples: prompts to measure on. batch: prompts to a call of the module.
        prompts_calibrated: prompts to calibrate on. states: calls kept of each run of these.
    """
    given: dict[str, dict[str, object]] = {
        "compensation": {"minutes": minutes, "tune": "auto" if recipe.compensation.tune == "off" else None},
        "compare": {"samples": samples},
        "calibration": {"batch": batch, "samples": prompts_calibrated, "states_per_prompt": states},
    }
    changes = {
        section: getattr(recipe, section).model_copy(
            update={key: value for key, value in values.items() if value is not None}
        )
        for section, values in given.items()
    }
    return recipe.model_copy(update=changes)


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    """Other noise for calibration and for what is measured; both move by twice the seed, so that they never meet."""
    calibration = recipe.calibration.model_copy(update={"seed": recipe.calibration.seed + 2 * seed})
    compare = recipe.compare.model_copy(update={"seed": recipe.compare.seed + 2 * seed})
    return recipe.model_copy(update={"calibration": calibration, "compare": compare})


def _calls(recording: Recording) -> Group:
    """The calls that are calibrated on: those of the graph that is called most.

    Raises:
        InputError: the pipeline has several denoisers.
    """
    ways = recording.ways()
    components = sorted({way.component for way in ways})
    if len(components) > 1:
        raise InputError(
            f"The pipeline has {len(components)} denoisers ({', '.join(components)}), and a study is of one.",
            "Name it in model.components.",
        )
    return max(ways, key=lambda way: way.calls_made)


def _dtype(dit: DiT) -> torch.dtype:
    """What is measured in: float32, but on a GPU for a large model that of the recipe."""
    parameters = sum(parameter.numel() for parameter in dit.module.parameters())
    large = torch.cuda.is_available() and parameters > FLOAT32_PARAMETERS
    return dit.dtype if large else torch.float32


def _device() -> str:
    """The GPU, or the processor and what of it torch takes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s' * (threads > 1)}"


def _common(recipe: Recipe) -> list[object]:
    """What every figure depends on, wherever its files lie."""
    versions = [VERSION, *(stage.number for stage in (CAPTURE, CALIBRATE, COMPENSATE, TUNE))]
    packages = [__version__, torch.__version__, diffusers.__version__]
    files = [Path(name) for name in (recipe.calibration.prompts, recipe.compare.prompts) if name]
    sections = (
        recipe.model.model_dump(mode="json", exclude={"source", "revision"}),
        recipe.calibration.model_dump(mode="json", exclude={"prompts"}),
        recipe.sparsity.model_dump(mode="json", include={"include", "exclude", "ridge", "rank"}),
        recipe.compare.model_dump(mode="json", include={"samples", "seed", "states"}),
    )
    return [versions, packages, recipe.call, [file_digest(path) for path in files], *sections]


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
