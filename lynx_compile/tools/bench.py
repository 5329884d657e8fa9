# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile bench``: the plugin's sparse linears against cuBLAS, for the linears of real models, on this GPU.

Both operands are measured: pruned activations (pruning pass and GEMM) and sparse weights (a GEMM alone). Where a model
makes x by a norm or an activation right before the linear, the fused form is measured against that kernel and cuBLAS.

Everything is a CUDA graph, timed with CUDA events over buffers that together exceed the L2 cache; dense and sparse
take turns of a few milliseconds, so that each ratio compares neighbours in time, at one clock. A GPU at its power
limit gives each kernel the clock that its own power allows when it runs for longer: the steady ratios are of turns of
a quarter second, of which the second half counts. Before it is timed, every sparse result is compared with the
definition (``sparsity.sparse_linear``) in float64. Without a GPU it predicts from a roofline instead, and says so.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional

from lynx_compile.engine import trt
from lynx_compile.errors import StageError
from lynx_compile.files.atomic import save_text
from lynx_compile.ops.sparse_linear import (
    GELU_TANH,
    Gated,
    Gelu,
    Norm,
    expand_low_rank,
    keep_mask,
    sparse_linear,
)
from lynx_compile.ops.sparse_weight_linear import pack_weight
from lynx_compile.passes.speed_table import ROOFLINE, roofline
from lynx_compile.tools.timing import captured, file_name, quantiles, take_long_turns, take_turns
from lynx_compile.torch_ops.bindings import (
    DTYPES,
    LIBRARY,
    SparseLinear,
    SparseWeightLinear,
    load_library,
)

CHECKED_ROWS = 64
# Relative error of a bf16 result: rounding of y, and of T / s. A fused producer is rounded once where torch rounds
# several times, so that some close calls of the selection go the other way.
TOLERANCE = {"pruned activations": 2**-7, "sparse weight": 2**-7, "fused producer": 2**-4}
BUFFER_BYTES = 2**28  # more than any L2
CUSPARSELT_ALGORITHMS = 32  # more than there are; torch 2.11 cannot say how many


@dataclass(frozen=True)
class Shape:
    """A linear: tokens M, input channels K, output channels N (of linears that are merged into one node).

    ``producer``: what the model makes x of right before: a LayerNorm or RMSNorm with modulation, GELU, or SiLU times
    a gate.
    """

    model: str
    linear: str
    tokens: int
    channels: int
    out_channels: int
    producer: Literal["layer norm", "rms norm", "gelu", "gated"] | None = None


# 1024x1024 pixels: 4096 image tokens, and 512 text tokens where the two are one sequence.
SHAPES = (
    Shape("FLUX.1-dev", "double: to_q,k,v", 4096, 3072, 9216, "layer norm"),
    Shape("FLUX.1-dev", "double: to_out", 4096, 3072, 3072),
    Shape("FLUX.1-dev", "double: ff up", 4096, 3072, 12288, "layer norm"),
    Shape("FLUX.1-dev", "double: ff down", 4096, 12288, 3072, "gelu"),
    Shape("FLUX.1-dev", "double: text to_q,k,v", 512, 3072, 9216, "layer norm"),
    Shape("FLUX.1-dev", "single: to_q,k,v + mlp", 4608, 3072, 21504, "layer norm"),
    Shape("FLUX.1-dev", "single: proj_out", 4608, 15360, 3072),
    Shape("Qwen-Image", "to_q,k,v", 4096, 3072, 9216, "layer norm"),
    Shape("Qwen-Image", "to_out", 4096, 3072, 3072),
    Shape("Qwen-Image", "mlp up", 4096, 3072, 12288, "layer norm"),
    Shape("Qwen-Image", "mlp down", 4096, 12288, 3072, "gelu"),
    Shape("Z-Image", "to_q,k,v", 4608, 3840, 11520, "rms norm"),
    Shape("Z-Image", "to_out", 4608, 3840, 3840),
    Shape("Z-Image", "w1,w3", 4608, 3840, 20480, "rms norm"),
    Shape("Z-Image", "w2", 4608, 10240, 3840, "gated"),
    Shape("square", "4096x4096x3072", 4096, 3072, 4096),
    Shape("square", "4096x4096x12288", 4096, 12288, 4096),
    Shape("square", "8192x8192x12288", 8192, 12288, 8192),
)


@dataclass(frozen=True)
class Timing:
    """Median and 10th to 90th percentile of one measurement, in microseconds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as dense: median over the rounds, 10th and 90th percentile. Above 1: sparse is faster."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One linear measured (or predicted): times in microseconds, ratios against cuBLAS in the same round.

    ``whole``: the op with pruned activations, everything included; ``prune`` and ``gemm`` are its parts.
    ``weight``: the op with a sparse weight. ``fused_dense``: the producer of x as a kernel of its own, and cuBLAS;
    ``fused`` and ``fused_weight``: what takes their place (the second has the producer's kernel too); None without a
    producer. ``cusparselt``: its GEMM with a 2:4 weight, None where torch has none or it refuses. ``tile`` and
    ``weight_tile``: the fastest configurations. ``error``: the largest relative one, against float64; None where
    predicted. ``steady_ratio`` and ``steady_weight_ratio``: ``ratio`` and ``weight_ratio`` in long turns.
    ``cusparselt_ratio`` and ``steady_cusparselt_ratio``: the same of ``cusparselt``.
    """

    shape: Shape
    rank: int
    dense: Timing
    prune: Timing
    gemm: Timing
    whole: Timing
    weight: Timing
    fused_dense: Timing | None
    fused: Timing | None
    fused_weight: Timing | None
    cusparselt: Timing | None
    ratio: Ratio
    gemm_ratio: Ratio
    weight_ratio: Ratio
    steady_ratio: float | None
    steady_weight_ratio: float | None
    cusparselt_ratio: Ratio | None
    steady_cusparselt_ratio: float | None
    fused_ratio: Ratio | None
    fused_weight_ratio: Ratio | None
    tile: int | None
    weight_tile: int | None
    error: float | None

    @property
    def best(self) -> float:
        """The faster operand's ratio; 1 where both are slower than dense, which is what stays then."""
        return max(1.0, self.ratio.median, self.weight_ratio.median)


@dataclass(frozen=True)
class Bench:
    """All results of one machine, and what it was. ``measured`` is false for a roofline prediction.

    ``architecture``: of the GPU, such as sm90.
    """

    device: str
    torch: str
    dtype: str
    measured: bool
    results: tuple[Result, ...]
    architecture: str | None = None

    @property
    def geometric_means(self) -> dict[str, float]:
        """Of the ratios of the models' linears (the square shapes are left out)."""
        of_models = [result for result in self.results if result.shape.model != "square"]
        ratios: dict[str, list[float | None]] = {
            "activations": [r.ratio.median for r in of_models],
            "weights": [r.weight_ratio.median for r in of_models],
            "best of both, or dense": [r.best for r in of_models],
            "GEMM alone": [r.gemm_ratio.median for r in of_models],
            "activations, steady": [r.steady_ratio for r in of_models],
            "weights, steady": [r.steady_weight_ratio for r in of_models],
            "cuSPARSELt": [r.cusparselt_ratio.median if r.cusparselt_ratio else None for r in of_models],
            "cuSPARSELt, steady": [r.steady_cusparselt_ratio for r in of_models],
        }
        known = {name: [value for value in values if value is not None] for name, values in ratios.items()}
        return {name: statistics.geometric_mean(values) for name, values in known.items() if values}


def bench(
    shapes: Sequence[Shape] = SHAPES,
    *,
    rank: int = 64,
    rounds: int = 30,
    library: Path = LIBRARY,
    progress: Callable[[Shape], None] = lambda shape: None,
) -> Bench:
    """Measure every shape in bf16 on the current GPU, or predict where there is none.

    Raises:
        InputError: the plugin library cannot be used. StageError: a result is wrong; nothing is timed then.
    """
    if not torch.cuda.is_available():
        return Bench(ROOFLINE, torch.__version__, "bf16", False, tuple(_predict(s, rank) for s in shapes))
    kernels = load_library(library)
    results = []
    for shape in shapes:
        progress(shape)
        results.append(_Problem(shape, rank, kernels).measure(rounds))
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    return Bench(device, torch.__version__, "bf16", True, tuple(results), trt.gpu())


def sparse_weight_of(
    kernels: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor, tokens: int, gelu_from: int | None = None
) -> SparseWeightLinear:
    """The op with ``weight`` [N, K] pruned by magnitude, packed for this GPU; a tanh GELU from a channel on."""
    layout = kernels.lynx_metadata_layout(DTYPES[weight.dtype])
    values, metadata = pack_weight(weight, keep_mask(weight), layout)
    gelu = gelu_from is not None and gelu_from < len(bias)
    return SparseWeightLinear(
        kernels, values, metadata, bias, rows=tokens, metadata_layout=layout,
        activation=GELU_TANH if gelu else 0, activation_from=(gelu_from or 0) if gelu else 0,
    )  # fmt: skip


class _Problem:
    """Random operands of one shape, in as many copies as it takes to outgrow the L2 cache."""

    def __init__(self, shape: Shape, rank: int, kernels: ctypes.CDLL) -> None:
        self.shape, self.rank, self.kernels = shape, rank, kernels
        self.tiles = range(kernels.lynx_tile_count(DTYPES[torch.bfloat16]))
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*size: int, deviation: float = 1.0) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device="cuda").mul_(deviation).bfloat16()

        m, k, n = shape.tokens, shape.channels, shape.out_channels
        copies = 2 + BUFFER_BYTES // (2 * (m * k + n * k + m * n))
        deviation = k**-0.5
        self.bias = normal(n)
        self.lora_down = normal(max(rank, 1), k, deviation=deviation)
        lora_up = normal(n, rank, deviation=0.1)
        self.gain, self.shift = 1 + normal(1, k, deviation=0.2), normal(1, k, deviation=0.2)
        self.gate = normal(m, k)
        self.x = [normal(m, k) for _ in range(copies)]
        self.weight = [normal(n, k, deviation=deviation) for _ in range(copies)]
        expanded = [expand_low_rank(weight, lora_up) for weight in self.weight]
        self.pruned = [self._sparse_linear(weight, None) for weight in expanded]
        self.fused = [self._sparse_linear(weight, self._producer()) for weight in expanded if shape.producer]
        self.sparse_weight = [sparse_weight_of(kernels, weight, self.bias, m) for weight in self.weight]
        self.y = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]

    def _sparse_linear(self, weight: torch.Tensor, producer: Norm | Gelu | Gated | None) -> SparseLinear:
        return SparseLinear(
            self.kernels, weight, self.lora_down, self.bias,
            rows=self.shape.tokens, rank=self.rank, norm_scale=True, producer=producer,
        )  # fmt: skip

    def _producer(self) -> Norm | Gelu | Gated:
        if self.shape.producer == "gelu":
            return Gelu()
        if self.shape.producer == "gated":
            return Gated(self.gate)
        return Norm(self.gain, self.shift, rms=self.shape.producer == "rms norm")

    def _produce(self, x: torch.Tensor) -> torch.Tensor:
        """The producer in torch: one kernel, but for the gate's two."""
        channels = (self.shape.channels,)
        if self.shape.producer == "gelu":
            return functional.gelu(x, approximate="tanh")
        if self.shape.producer == "gated":
            return functional.silu(x) * self.gate.to(x.dtype)
        gain, shift = self.gain[0].to(x.dtype), self.shift[0].to(x.dtype)
        if self.shape.producer == "rms norm":
            return functional.rms_norm(x, channels, gain, 1e-6) + shift
        return functional.layer_norm(x, channels, gain, shift, 1e-6)

    def measure(self, rounds: int) -> Result:
        error = self._check()
        works: dict[str, Callable[[int], object]] = {
            "dense": lambda i: self._dense(i, self.x[i]),
            "whole": lambda i: self.pruned[i](self.x[i]),
            "weight": lambda i: self.sparse_weight[i](self.x[i]),
            "prune": lambda i: self.pruned[i].prune(self.x[i]),
            "gemm": lambda i: self.pruned[i].gemm(self.x[i]),
        }
        if self.shape.producer:
            works["fused_dense"] = lambda i: self._dense(i, self._produce(self.x[i]))
            works["fused"] = lambda i: self.fused[i](self.x[i])
            works["fused_weight"] = lambda i: self.sparse_weight[i](self._produce(self.x[i]))
        for tile in self.tiles:
            works[f"tile {tile}"] = lambda i, tile=tile: self.pruned[i].gemm(self.x[i], tile)  # type: ignore[misc]
            works[f"weight tile {tile}"] = lambda i, tile=tile: self.sparse_weight[i](self.x[i], tile)  # type: ignore[misc]
        copies = len(self.x)
        graphs = {name: self._captured(work) for name, work in works.items()}
        cusparselt = self._cusparselt()
        if cusparselt is not None:
            graphs["cusparselt"] = cusparselt
        times = take_turns(graphs, rounds, copies)
        alone = ("dense", "whole", "weight", "cusparselt")
        steady = take_long_turns({name: graphs[name] for name in alone if name in graphs}, copies)

        def timing(name: str) -> Timing | None:
            return _timing(times[name]) if name in times else None

        def ratio(name: str, dense: str = "dense") -> Ratio:
            return Ratio(*quantiles([d / s for d, s in zip(times[dense], times[name], strict=True)]))

        def fastest(prefix: str) -> int:
            return min(self.tiles, key=lambda tile: statistics.median(times[f"{prefix} {tile}"]))

        return Result(
            shape=self.shape,
            rank=self.rank,
            **{name: _timing(times[name]) for name in ("dense", "prune", "gemm", "whole", "weight")},
            fused_dense=timing("fused_dense"),
            fused=timing("fused"),
            fused_weight=timing("fused_weight"),
            cusparselt=timing("cusparselt"),
            ratio=ratio("whole"),
            gemm_ratio=ratio("gemm"),
            weight_ratio=ratio("weight"),
            steady_ratio=steady["dense"] / steady["whole"],
            steady_weight_ratio=steady["dense"] / steady["weight"],
            cusparselt_ratio=ratio("cusparselt") if cusparselt else None,
            steady_cusparselt_ratio=steady["dense"] / steady["cusparselt"] if cusparselt else None,
            fused_ratio=ratio("fused", "fused_dense") if self.shape.producer else None,
            fused_weight_ratio=ratio("fused_weight", "fused_dense") if self.shape.producer else None,
            tile=fastest("tile"),
            weight_tile=fastest("weight tile"),
            error=error,
        )

    def _dense(self, i: int, x: torch.Tensor) -> None:
        torch.addmm(self.bias, x, self.weight[i].T, out=self.y[i])

    def _captured(self, work: Callable[[int], object]) -> Callable[[], None]:
        """``work`` on every copy of the operands, as one graph."""

        def run() -> None:
            for i in range(len(self.x)):
                work(i)

        return captured(run)

    def _cusparselt(self) -> Callable[[], None] | None:
        """cuSPARSELt through torch: 2:4 weight, compressed by cuSPARSELt itself, the fastest of its algorithms.

        None where it is not there, or none of them takes this shape.
        """
        try:
            pruned = [w.unflatten(1, (-1, 4)).clone() for w in self.weight]
            for w in pruned:
                w[..., 2:] = 0
            compressed = [torch._cslt_compress(w.flatten(1)) for w in pruned]
            del pruned
        except (RuntimeError, AttributeError, NotImplementedError):
            return None

        def product(algorithm: int) -> Callable[[int], object]:
            return lambda i: torch._cslt_sparse_mm(
                compressed[i], self.x[i].T, self.bias, transpose_result=True, alg_id=algorithm
            )

        graphs = {}
        for algorithm in range(CUSPARSELT_ALGORITHMS):
            try:
                graphs[f"{algorithm}"] = self._captured(product(algorithm))
            except RuntimeError:
                continue  # there is no such algorithm, or it does not take this shape
        if not graphs:
            return None
        times = take_turns(graphs, 3, len(self.x))
        return graphs[min(graphs, key=lambda algorithm: statistics.median(times[algorithm]))]

    def _check(self) -> float:
        """Relative error of some rows of every op against float64; the largest.

        Raises:
            StageError: it exceeds what rounding explains.
        """
        x = self.x[0]
        rows = torch.linspace(0, len(x) - 1, CHECKED_ROWS, device="cuda").long()
        wanted = self._definition(self.pruned[0], x[rows].double())
        errors = {"pruned activations": _error(self.pruned[0](x)[rows], wanted)}
        weight = self.weight[0].double() * keep_mask(self.weight[0])
        wanted = functional.linear(x[rows].double(), weight, self.bias.double())
        errors["sparse weight"] = _error(self.sparse_weight[0](x)[rows], wanted)
        if self.shape.producer:
            gate, self.gate = self.gate, self.gate[rows]
            produced = self._produce(x[rows].double()).bfloat16()
            self.gate = gate
            wanted = self._definition(self.fused[0], produced.double())
            errors["fused producer"] = _error(self.fused[0](x)[rows], wanted)
        for what, error in errors.items():
            if not error < TOLERANCE[what]:
                raise StageError(
                    "bench",
                    f"{self.shape.model} {self.shape.linear}, {what}: the result is off by {error:.2e} of its norm.",
                    "Do not use this build on this GPU; please report it with the GPU's name.",
                )
        return max(errors["pruned activations"], errors["sparse weight"])

    def _definition(self, op: SparseLinear, x: torch.Tensor) -> torch.Tensor:
        weight, lora_down, bias = (tensor.double() for tensor in op.tensors)
        return sparse_linear(x, weight, lora_down, bias, rank=self.rank, norm_scale=True)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _timing(times: Sequence[float]) -> Timing:
    return Timing(*quantiles(times))


def _predict(shape: Shape, rank: int) -> Result:
    """What ``costs.roofline`` says, in the place of measurements."""
    times = roofline(shape.tokens, shape.channels, shape.out_channels, rank)

    def same(value: float) -> Timing:
        return Timing(value, value, value)

    def ratio(sparse: float) -> Ratio:
        return Ratio(*[times.dense / sparse] * 3)

    return Result(
        shape=shape,
        rank=rank,
        dense=same(times.dense),
        prune=same(times.prune),
        gemm=same(times.gemm),
        whole=same(times.whole),
        weight=same(times.weight),
        fused_dense=None,
        fused=None,
        fused_weight=None,
        cusparselt=None,
        ratio=ratio(times.whole),
        gemm_ratio=ratio(times.gemm),
        weight_ratio=ratio(times.weight),
        steady_ratio=None,
        steady_weight_ratio=None,
        cusparselt_ratio=None,
        steady_cusparselt_ratio=None,
        fused_ratio=None,
        fused_weight_ratio=None,
        tile=None,
        weight_tile=None,
        error=None,
    )


def save(bench: Bench, folder: Path) -> tuple[Path, Path]:
    """Write ``DEVICE-rankR.json`` and ``.png`` into ``folder``; returns their paths."""
    path = folder / f"{file_name(bench.device)}-rank{bench.results[0].rank}.json"
    save_text(path, json.dumps(asdict(bench) | {"geometric_means": bench.geometric_means}, indent=1) + "\n")
    picture = path.with_suffix(".png")
    _draw(bench, picture)
    return path, picture


def _draw(bench: Bench, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{r.shape.model}  {r.shape.linear}" for r in bench.results]
    at = range(len(names))
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.6), layout="constrained")
    for offset, label, color, ratios in (
        (-0.2, "sparse weight", "#2a6fb0", [r.weight_ratio for r in bench.results]),
        (
            0.2,
            f"pruned activations, rank {bench.results[0].rank}",
            "#e0a33b",
            [r.ratio for r in bench.results],
        ),
    ):
        axes.barh(
            [i + offset for i in at], [r.median for r in ratios], 0.38, label=label, color=color,
            xerr=[[max(0.0, r.median - r.low) for r in ratios], [max(0.0, r.high - r.median) for r in ratios]],
            error_kw={"linewidth": 0.8},
        )  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(list(at), names)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as cuBLAS bf16" + ("" if bench.measured else " (predicted, not measured)"))
    axes.set_title(f"{bench.device}: everything included", loc="left")
    axes.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)
