# SPDX-License-Identifier: Apache-2.0
"""The result of ``compare``: how far the Lynx model is from the dense one, and which limits it misses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lynx_compile.engine.manifest import Budget
from lynx_compile.files.strict import Kept, Strict
from lynx_compile.recipe import Compare
from lynx_compile.solve.moments import relative_error

FORMAT_VERSION = 1
SHEET_COLUMNS = 8  # images of the contact sheet, at most


class LinearError(Strict):
    """The error of one sparse linear on the dense model's own inputs (``moments.relative_error``).

    ``error``: over all states; ``worst``: of one state. ``expected``: by calibration.
    """

    linear: str
    layer: str
    error: float
    worst: float
    expected: float


class StepError(Strict):
    """The model's output in one denoising step, on the dense model's trajectory; errors as of a linear.

    ``step`` counts from 0; ``timestep`` falls from 1 to 0.
    """

    step: int
    timestep: float
    error: float
    worst: float


class Images(Strict):
    """Images drawn by both models from the same noise. PSNR in dB (200 where there is no difference), the peak is the
    dense image's largest value; ``lpips``: mean, None where the package lpips is not installed. ``sheet``: a PNG of the
    first ``SHEET_COLUMNS``, a column each: the dense model's above the other's, and their difference below.
    """

    psnr: tuple[float, ...]
    lpips: float | None
    sheet: str

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)


class EngineRun(Strict):
    """An engine on a GPU against the dense model in float32: output error by step, and median time of a step."""

    kind: Literal["dense", "lynx"]
    steps: tuple[StepError, ...]
    milliseconds: float


@dataclass(frozen=True)
class Squares:
    """Sums over a tensor: of (y - y_dense)^2, and of y_dense^2."""

    lost: float
    dense: float

    @property
    def error(self) -> float:
        return relative_error(self.lost, self.dense)


class Comparison(Kept):
    """Everything that was compared, and why the rest was not.

    ``linears``: worst first. ``metric``: the recipe's own numbers. ``not_measured``: {what: reason}.
    ``missed``: the limits that were not kept, one sentence each. ``over_budget``: a sentence where the compilation's
    budget does not hold here.
    """

    format_version: Literal[1]
    engine_sha256: str
    samples: int
    steps: int
    seed: int
    states: int
    linears: tuple[LinearError, ...]
    output: tuple[StepError, ...]
    images: Images | None
    metric: dict[str, float] | None
    engines: tuple[EngineRun, ...]
    limits: Compare
    not_measured: dict[str, str]
    missed: tuple[str, ...]
    over_budget: str | None = None

    @classmethod
    def read(cls, path: Path) -> Comparison | None:
        """As ``Kept.read_kept``."""
        return cls.read_kept(path, FORMAT_VERSION, "Delete it, or run compare again.")


def missed(
    limits: Compare,
    linears: tuple[LinearError, ...],
    output: tuple[StepError, ...],
    images: Images | None,
    metric: dict[str, float] | None,
) -> tuple[str, ...]:
    """Every limit that is not kept; one whose number was not measured is not kept either."""
    on_linears = {f"error of {x.linear}": x.error for x in linears}
    on_output = {f"output error in step {x.step}": x.error for x in output}
    psnr = None if images is None else {"mean PSNR": images.mean_psnr}
    lpips = None if images is None or images.lpips is None else {"mean LPIPS": images.lpips}
    found = [
        *_above(limits.max_layer_error, on_linears, "max_layer_error"),
        *_above(limits.max_output_error, on_output, "max_output_error"),
        *_below(limits.min_psnr, psnr, "min_psnr"),
        *_above(limits.max_lpips, lpips, "max_lpips"),
    ]
    for names, check, key in (
        (limits.min_metric, _below, "min_metric"),
        (limits.max_metric, _above, "max_metric"),
    ):
        for name, limit in names.items():
            value = (metric or {}).get(name)
            found += check(limit, None if value is None else {name: value}, f"{key}.{name}")
    return tuple(found)


def output_error(steps: Sequence[StepError]) -> float:
    """Over all denoising steps alike: the root mean square."""
    return math.sqrt(statistics.fmean(step.error**2 for step in steps))


def over_budget(budget: Budget | None, output: Sequence[StepError], images: Images | None) -> str | None:
    """How far what was compared is over the budget, and which one to ask for instead; None where it holds.

    The compilation measured it on prompts of the calibration's, and without the kernels where no GPU ran them, so that
    here it can come out above the limit.
    """
    if budget is None:
        return None
    key, limit = f"budget.{budget.limit}", budget.value
    again = "For these prompts, compile with --set"
    if budget.limit == "max_output_error":
        found = output_error(output)
        if found > limit:
            less = limit * limit / found
            return f"the output errs by {found:.4f}, and {key} is {limit:g}. {again} {key}={less:.3g}."
    if budget.limit == "min_psnr" and images is not None and images.mean_psnr < limit:
        found = images.mean_psnr
        return f"mean PSNR is {found:.1f} dB, and {key} is {limit:g}. {again} {key}={2 * limit - found:.1f}."
    return None


def _above(limit: float | None, values: dict[str, float] | None, key: str) -> list[str]:
    return _outside(limit, values, key, 1)


def _below(limit: float | None, values: dict[str, float] | None, key: str) -> list[str]:
    return _outside(limit, values, key, -1)


def _outside(limit: float | None, values: dict[str, float] | None, key: str, sign: int) -> list[str]:
    if limit is None:
        return []
    if values is None:
        return [f"compare.{key} is {limit:g}, but it was not measured"]
    return [
        f"{what} is {value:.4g}, compare.{key} is {limit:g}"
        for what, value in values.items()
        if not sign * value <= sign * limit
    ]
