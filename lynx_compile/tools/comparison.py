# SPDX-License-Identifier: Apache-2.0
"""The result of ``compare``: how far the Lynx model is from the dense one, and which limits it misses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    ``missed``: the limits that were not kept, one sentence each.
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
