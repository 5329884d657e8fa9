# SPDX-License-Identifier: Apache-2.0
"""How many times as fast as dense a sparse linear is: by what ``lynx-compile bench`` measured, or by a roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from lynx_compile.engine.manifest import form_in_words
from lynx_compile.errors import InputError
from lynx_compile.ops.sparse_linear import padded_width
from lynx_compile.recipe import NodeOperand

# H100: dense bf16 rate and memory bandwidth measured with torch, the GEMM's gain over dense with 128x256x64 tiles.
ROOFLINE_FLOPS, ROOFLINE_BYTES, ROOFLINE_GAIN = 650e12, 3.0e12, 1.4
# FP8: gains of the GEMMs over dense bf16, from engines/bench/summary.json (linears.fp8_*.gemm), and bytes that the
# rounding pass reads and writes per value of x.
ROOFLINE_FP8_GAINS: dict[NodeOperand, float] = {"none": 1.92, "weight": 2.46, "activation": 2.45}
ROOFLINE_FP8_PASS: dict[NodeOperand, float] = {
    "none": 2 + 1,
    "weight": 2 + 1,
    "activation": 2 + 1 / 2 + 1 / 8,
}
ROOFLINE = "roofline of an H100"
# GPUs that run the kernels only as code compiled for older ones (mma.sp, by way of PTX): the roofline is not theirs.
UNKNOWN_SPEED = ("sm100", "sm103", "sm110")
REACH = 4  # beyond the measured range by more than this factor, a table says nothing


@dataclass(frozen=True)
class Form:
    """What a node is: which operand is 2:4, if one is, and whether it multiplies in FP8."""

    operand: NodeOperand
    fp8: bool = False

    @property
    def words(self) -> str:
        return form_in_words(self.operand, self.fp8)


DENSE = Form("none")
DENSE_FP8 = Form("none", fp8=True)


@dataclass(frozen=True)
class Roofline:
    """Microseconds of one linear: dense at cuBLAS's rate, our GEMMs so much faster, passes over x at memory speed.

    ``whole``: pruned activations, both kernels. ``weight``: a sparse weight. ``fp8``: pass and GEMM, by operand.
    """

    dense: float
    prune: float
    gemm: float
    weight: float
    fp8: Mapping[NodeOperand, float]

    @property
    def whole(self) -> float:
        return self.prune + self.gemm

    def gain(self, form: Form) -> float:
        in_16_bits = {"none": self.dense, "weight": self.weight, "activation": self.whole}
        return self.dense / (self.fp8 if form.fp8 else in_16_bits)[form.operand]


def roofline(tokens: int, channels: int, out_channels: int, rank: int) -> Roofline:
    """The prediction for an H100, where nothing was measured; ``rank`` counts for pruned activations in 16 bits."""
    dense = 2e6 * tokens * channels * out_channels / ROOFLINE_FLOPS
    weight = dense / ROOFLINE_GAIN
    read = 1e6 * tokens * channels / ROOFLINE_BYTES
    return Roofline(
        dense=dense,
        prune=read * (2 + 1 + 1 / 8),
        gemm=weight * padded_width(channels, rank) / channels,
        weight=weight,
        fp8={
            operand: dense / gain + read * ROOFLINE_FP8_PASS[operand]
            for operand, gain in ROOFLINE_FP8_GAINS.items()
        },
    )


class _Read(BaseModel):
    """What is needed of the files that ``lynx-compile bench`` writes; the rest is for people."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


Size = Annotated[int, Field(ge=1)]


class _Shape(_Read):
    tokens: Size
    channels: Size
    out_channels: Size


Gain = Annotated[float, Field(gt=0)]


class _Ratio(_Read):
    median: Gain


class _Result(_Read):
    """Of ``bench``: both operands in 16 bits."""

    shape: _Shape
    rank: Annotated[int, Field(ge=0)]
    ratio: _Ratio
    weight_ratio: _Ratio

    def gain(self, form: Form, rank: int) -> float | None:
        """As measured. A rank above the measured one costs what the roofline says, a lower one gains nothing."""
        if form == Form("weight"):
            return self.weight_ratio.median
        return (
            _at_rank(self.shape, self.ratio.median, self.rank, rank) if form == Form("activation") else None
        )


class _Fp8Result(_Read):
    """Of ``bench_fp8``: a ratio a work; ``.all`` is with the pass over x as a kernel of its own."""

    shape: _Shape
    ratios: dict[str, Gain]

    def gain(self, form: Form, rank: int) -> float | None:
        found = self.ratios.get(FP8_WORKS[form]) if form in FP8_WORKS else None
        return _at_rank(self.shape, found, 0, rank) if found and form == Form("activation") else found


FP8_WORKS = {
    Form("weight"): "bf16_weight",
    Form("activation"): "bf16_activation",  # with rank 0
    DENSE_FP8: "fp8_dense.all",
    Form("weight", fp8=True): "fp8_weight.all",
    Form("activation", fp8=True): "fp8_activation.all",
}


def _at_rank(shape: _Shape, gain: float, measured: int, wanted: int) -> float:
    """The gain of pruned activations with rank ``wanted``, from that with ``measured``."""
    sizes = (shape.tokens, shape.channels, shape.out_channels)
    slower, faster = (roofline(*sizes, rank).gain(Form("activation")) for rank in (wanted, measured))
    return gain * min(1.0, slower / faster)


_KINDS = ("kind[16 bits]", "kind[fp8]")


def _kind(result: Any) -> str:
    return _KINDS[isinstance(result, dict) and "ratios" in result]


class _Bench(_Read):
    architecture: str | None = None
    results: Annotated[
        tuple[
            Annotated[
                Annotated[_Result, Tag(_KINDS[0])] | Annotated[_Fp8Result, Tag(_KINDS[1])],
                Discriminator(_kind),
            ],
            ...,
        ],
        Field(min_length=1),
    ]


@dataclass(frozen=True)
class CostTable:
    """The measured linears of one GPU. ``name``: the file's. ``architecture``: such as sm90, where the file tells."""

    name: str
    results: tuple[_Result | _Fp8Result, ...]
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
            keys = ".".join(str(key) for key in first["loc"] if key not in _KINDS)
            where = f"'{keys}' is wrong: " if keys else ""
            raise InputError(
                f"{path} is no cost table ({where}{first['msg']}).",
                "Give the JSON of this version's 'lynx-compile bench'.",
            ) from None

    def gain(self, tokens: int, channels: int, out_channels: int, form: Form, rank: int) -> float | None:
        """How many times as fast as dense, for a whole node (N of all its linears); None where too little is known.

        What was measured comes back as it is; of a shape that was measured twice, the lower figure. In between, the
        logarithm of the gain is the mean of those of the neighbours, weighted by one over their distance, in
        the logarithms of the three sizes; a neighbour is a measured shape that no nearer one hides. Along a line
        of measured shapes this is linear interpolation. Outside of the measured range of one of the sizes
        it is the neighbours' lowest gain, and None further out than ``REACH`` times.
        """
        asked = tokens, channels, out_channels, form, rank
        if asked not in self._known:  # a model's blocks are alike
            self._known[asked] = self._gain(*asked)
        return self._known[asked]

    @cached_property
    def _known(self) -> dict[tuple[int, int, int, Form, int], float | None]:
        return {}

    def _gain(self, tokens: int, channels: int, out_channels: int, form: Form, rank: int) -> float | None:
        here = _logarithms(tokens, channels, out_channels)
        gains: dict[tuple[float, ...], float] = {}
        for result in self.results:
            at = _logarithms(result.shape.tokens, result.shape.channels, result.shape.out_channels)
            gain = result.gain(form, rank)
            if gain is not None:
                gains[at] = min(gains.get(at, math.inf), gain)
        if not gains:
            return None
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
