# SPDX-License-Identifier: Apache-2.0
"""What ``lynx-compile study`` found, as it is kept: ``study.json``, and its means in a ``summary.json``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.strict import Kept, Strict
from lynx_compile.tools.comparison import Comparison, output_error
from lynx_compile.tools.study.methods import METHODS

FORMAT_VERSION: Literal[1] = 1
QUOTED = ("output_error", "layer_error", "psnr", "ssim")


class Run(Strict):
    """A method of one seed: of the calibration, of its tuning, and of the noise that it is measured on.

    Errors are |y - y_dense| / |y_dense| on the dense model's own calls for that noise: ``layer_error`` the mean over
    the linears, ``output_error`` of the model's output over all calls, ``by_step`` of each denoising step's. ``psnr``
    in dB and ``ssim`` are means over images against the dense model's of the same noise; None where the pipeline
    draws none. ``metric``: the recipe's own. Seconds: of the closed form, and of tuning.
    """

    seed: int
    layer_error: float
    output_error: float
    by_step: tuple[float, ...]
    psnr: float | None
    ssim: float | None
    lpips: float | None
    metric: dict[str, float] | None
    solved_seconds: float
    tuned_seconds: float


class Row(Strict):
    """A method. ``minutes``: of tuning, where it is tuned. ``key``: of what its runs depend on."""

    method: str
    key: str
    minutes: float | None
    runs: tuple[Run, ...]

    def mean(self, name: str) -> float | None:
        """Over the seeds; None where one does not have it."""
        found = self._values(name)
        return statistics.fmean(found) if found else None

    def spread(self, name: str) -> float | None:
        """Standard deviation over the seeds, of a sample; None for fewer than two."""
        found = self._values(name)
        return statistics.stdev(found) if len(found) > 1 else None

    def by_step(self) -> list[float]:
        """Output error of every step, mean over the seeds."""
        return [statistics.fmean(errors) for errors in zip(*(run.by_step for run in self.runs), strict=True)]

    def metric(self) -> dict[str, float]:
        """The recipe's own numbers, means over the seeds."""
        found = [run.metric for run in self.runs if run.metric is not None]
        names = found[0] if len(found) == len(self.runs) and found else {}
        return {name: statistics.fmean(values[name] for values in found) for name in names}

    def _values(self, name: str) -> list[float]:
        values = [getattr(run, name) for run in self.runs]
        return [] if None in values else values


class Study(Kept):
    """All rows, in the order of ``METHODS``, and what they have in common.

    ``name``: of the model. ``device``: what ran it; ``dtype``: what the module computed in. ``linears``: so many are
    compressed, ``share`` of the multiplications of all. ``prompts`` and ``calls``: of the calibration; ``batch``:
    prompts to a call. ``samples``: prompts that errors and images are of, ``held_out``: whether calibration saw none
    of them; ``timesteps``: of the steps.
    """

    format_version: Literal[1] = FORMAT_VERSION
    name: str
    key: str
    device: str
    dtype: str
    date: str
    linears: int
    share: float
    prompts: int
    calls: int
    batch: int
    samples: int
    held_out: bool
    timesteps: tuple[float, ...]
    rows: tuple[Row, ...]

    def row(self, method: str) -> Row | None:
        return next((row for row in self.rows if row.method == method), None)

    def with_run(self, method: str, key: str, minutes: float | None, run: Run) -> Study:
        """The same with one more run; runs of another key of that method are forgotten."""
        old = self.row(method)
        others = () if old is None or old.key != key else old.runs
        runs = sorted([*(r for r in others if r.seed != run.seed), run], key=lambda r: r.seed)
        rows = {row.method: row for row in self.rows}
        rows[method] = Row(method=method, key=key, minutes=minutes, runs=tuple(runs))
        ordered = tuple(rows[name] for name in METHODS if name in rows)
        return self.model_copy(update={"rows": ordered})

    @classmethod
    def read(cls, path: Path) -> Study | None:
        """As ``Kept.read_kept``."""
        return cls.read_kept(path, FORMAT_VERSION, "Delete it, or give another folder.")


def summary(study: Study) -> dict[str, float | str]:
    """``quality.NAME.METHOD.WHAT``: means over the seeds, and ``WHAT_std`` where there are several."""
    found: dict[str, float | str] = {}
    for row in study.rows:
        for what in QUOTED:
            at = f"quality.{study.name}.{row.method}.{what}"
            for key, value in ((at, row.mean(what)), (f"{at}_std", row.spread(what))):
                if value is not None and row.method != "dense":
                    found[key] = _rounded(value)
    return found | {f"quality.{study.name}.device": study.device, f"quality.{study.name}.date": study.date}


def of_budget(name: str, engine: Path) -> dict[str, float | str]:
    """``quality.NAME.budget.output_error``, ``.psnr`` and ``.speed`` of an engine that a budget decided on.

    Error and PSNR are those of ``lynx-compile compare``, whose calls and images nothing was fitted to or chosen by. The
    speed is that of the blocks' linears together, by the recipe's costs or a roofline.

    Raises:
        InputError: no budget decided on the engine, or it was not compared.
    """
    outputs = Outputs.find(engine)
    manifest, comparison = Manifest.read(outputs.manifest), Comparison.read(outputs.comparison)
    if manifest.budget is None:
        raise InputError(
            f"No budget decided on {engine}.", "Compile with sparsity.operand: auto and a budget."
        )
    if comparison is None or comparison.engine_sha256 != manifest.engine.sha256:
        raise InputError(f"{engine} was not compared.", f"Run 'lynx-compile compare {engine}' first.")
    found: dict[str, float | None] = {
        "output_error": output_error(comparison.output),
        "psnr": None if comparison.images is None else comparison.images.mean_psnr,
        "speed": manifest.budget.speed,
    }
    return {
        f"quality.{name}.budget.{what}": _rounded(value) for what, value in found.items() if value is not None
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}")


def markdown(study: Study) -> str:
    """The rows as a Markdown table; with several seeds mean and standard deviation."""
    metric = metric_names(study)
    names = heads(metric)
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(cells(row, metric)) + " |" for row in study.rows]
    return "\n".join(lines)


def metric_names(study: Study) -> list[str]:
    """Of the recipe's own numbers, those that tell methods apart."""
    found: dict[str, set[float]] = defaultdict(set)
    for row in study.rows:
        for name, value in row.metric().items():
            found[name].add(value)
    return sorted(name for name, values in found.items() if len(values) > 1)


def heads(metric: Iterable[str]) -> list[str]:
    """Of the columns that ``cells`` fills."""
    return ["all candidate linears as", "layer error", "output error", "PSNR, dB", "SSIM", *metric, "seconds"]


def cells(row: Row, metric: Iterable[str]) -> list[str]:
    """What a table shows of a row."""
    is_dense = row.method == "dense"
    seconds = [row.mean(name) or 0.0 for name in ("solved_seconds", "tuned_seconds")]
    own = row.metric()
    return [
        METHODS[row.method].title,
        _cell(row, "layer_error", "{:.3f}", is_dense),
        _cell(row, "output_error", "{:.4f}", is_dense),
        _cell(row, "psnr", "{:.1f}", is_dense),
        _cell(row, "ssim", "{:.3f}", is_dense),
        *(f"{own[name]:.3g}" if name in own else "–" for name in metric),
        "–" if is_dense else f"{sum(seconds):.0f}",
    ]


def _cell(row: Row, name: str, form: str, is_dense: bool) -> str:
    value, spread = row.mean(name), row.spread(name)
    if is_dense or value is None:
        return "–"
    shown: Callable[[float], str] = form.format
    return shown(value) if spread is None else f"{shown(value)} ± {shown(spread)}"
