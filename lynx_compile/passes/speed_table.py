# SPDX-License-Identifier: Apache-2.0
"""How many times as fast as dense a sparse linear is: by what ``lynx-compile bench`` measured, or by a roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lynx_compile.errors import InputError
from lynx_compile.ops.sparse_linear import padded_width
from lynx_compile.recipe import Operand

# H100: dense bf16 rate and memory bandwidth measured with torch, the GEMM's gain over dense with 128x256x64 tiles.
ROOFLINE_FLOPS, ROOFLINE_BYTES, ROOFLINE_GAIN = 650e12, 3.0e12, 1.4
ROOFLINE = "roofline of an H100"
# GPUs that run the kernels only as code compiled for older ones (mma.sp, by way of PTX): the roofline is not theirs.
UNKNOWN_SPEED = ("sm100", "sm103", "sm110")
REACH = 4  # beyond the measured range by more than this factor, a table says nothing


@dataclass(frozen=True)
class Roofline:
    """Microseconds of one linear: dense at cuBLAS's rate, sparse GEMMs so much faster, pruning at memory speed.

    ``whole``: pruned activations, both kernels. ``weight``: a sparse weight.
    """

    dense: float
    prune: float
    gemm: float
    weight: float

    @property
    def whole(self) -> float:
        return self.prune + self.gemm

    def gain(self, operand: Operand) -> float:
        return self.dense / (self.weight if operand == "weight" else self.whole)


def roofline(tokens: int, channels: int, out_channels: int, rank: int) -> Roofline:
    """The prediction for an H100, where nothing was measured; ``rank`` counts for pruned activations."""
    dense = 2e6 * tokens * channels * out_channels / ROOFLINE_FLOPS
    weight = dense / ROOFLINE_GAIN
    return Roofline(
        dense=dense,
        prune=1e6 * tokens * channels * (2 + 1 + 1 / 8) / ROOFLINE_BYTES,
        gemm=weight * padded_width(channels, rank) / channels,
        weight=weight,
    )


class _Read(BaseModel):
    """What is needed of ``bench.Bench``, as ``bench.save`` writes it; the rest is for people."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


Size = Annotated[int, Field(ge=1)]


class _Shape(_Read):
    tokens: Size
    channels: Size
    out_channels: Size


class _Ratio(_Read):
    median: Annotated[float, Field(gt=0)]


class _Result(_Read):
    shape: _Shape
    rank: Annotated[int, Field(ge=0)]
    ratio: _Ratio
    weight_ratio: _Ratio

    def gain(self, operand: Operand, rank: int) -> float:
        """As measured. A rank above the measured one costs what the roofline says, a lower one gains nothing."""
        if operand == "weight":
            return self.weight_ratio.median
        sizes = (self.shape.tokens, self.shape.channels, self.shape.out_channels)
        wanted, measured = (roofline(*sizes, r).gain(operand) for r in (rank, self.rank))
        return self.ratio.median * min(1.0, wanted / measured)


class _Bench(_Read):
    architecture: str | None = None
    results: Annotated[tuple[_Result, ...], Field(min_length=1)]


@dataclass(frozen=True)
class CostTable:
    """The measured linears of one GPU. ``name``: the file's. ``architecture``: such as sm90, where the file tells."""

    name: str
    results: tuple[_Result, ...]
    architecture: str | None = None

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Read the JSON of ``lynx-compile bench``.

        Raises:
            InputError: the file is missing, is no JSON, or lacks what is needed.
        """
        try:
            if path.stat().st_size > 16 << 20:
                raise InputError(f"{path} is larger than 16 MiB.", "Give the JSON of 'lynx-compile bench'.")
            found = _Bench.model_validate_json(path.read_bytes())
            return cls(path.name, found.results, found.architecture)
        except FileNotFoundError:
            raise InputError(
                f"The cost table {path} does not exist.",
                "Correct sparsity.costs, or measure one with 'lynx-compile bench'.",
            ) from None
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}).", "Check the path and its permissions."
            ) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = f"'{'.'.join(map(str, first['loc']))}' is wrong: " if first["loc"] else ""
            raise InputError(
                f"{path} is no cost table ({where}{first['msg']}).",
                "Give the JSON of this version's 'lynx-compile bench'.",
            ) from None

    def gain(
        self, tokens: int, channels: int, out_channels: int, operand: Operand, rank: int
    ) -> float | None:
        """How many times as fast as dense, for a whole node (N of all its linears); None where too little is known.

        What was measured comes back as it is; of a shape that was measured twice, the lower figure. In between, the
        logarithm of the gain is the mean of those of the neighbours, weighted by one over their distance, in
        the logarithms of the three sizes; a neighbour is a measured shape that no nearer one hides. Along a line
        of measured shapes this is linear interpolation. Outside of the measured range of one of the sizes
        it is the neighbours' lowest gain, and None further out than ``REACH`` times.
        """
        here = _logarithms(tokens, channels, out_channels)
        gains: dict[tuple[float, ...], float] = {}
        for result in self.results:
            at = _logarithms(result.shape.tokens, result.shape.channels, result.shape.out_channels)
            gains[at] = min(gains.get(at, math.inf), result.gain(operand, rank))
        if here in gains:
            return gains[here]
        outside = max(max(min(sizes) - h, h - max(sizes)) for h, *sizes in zip(here, *gains, strict=True))
        if outside > math.log(REACH):
            return None
        neighbours = _neighbours(here, list(gains))
        if outside > 0:
            return min(gains[at] for at in neighbours)
        weights = {at: 1 / math.dist(here, at) for at in neighbours}
        logarithm = sum(weight * math.log(gains[at]) for at, weight in weights.items())
        return math.exp(logarithm / sum(weights.values()))


def _logarithms(*sizes: int) -> tuple[float, ...]:
    return tuple(math.log(size) for size in sizes)


def _neighbours(here: tuple[float, ...], points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The points that are not behind a nearer one, seen from ``here``."""
    found: list[tuple[float, ...]] = []
    for point in sorted(points, key=lambda point: math.dist(here, point)):
        if not any(_hides(near, point, here) for near in found):
            found.append(point)
    return found


def _hides(near: tuple[float, ...], far: tuple[float, ...], here: tuple[float, ...]) -> bool:
    """Whether ``far`` is on the other side of the plane through ``near`` that faces ``here``."""
    return sum((n - h) * (f - n) for n, f, h in zip(near, far, here, strict=True)) >= 0
