# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile bench``: the plugin's sparse linear against cuBLAS, for the linears of real models, on this GPU.

Everything is timed with CUDA events over buffers that together exceed the L2 cache; dense and sparse take turns,
so that each ratio compares neighbours in time. Before it is timed, every sparse result is compared with the
definition (``sparsity.sparse_linear``) in float64. Without a GPU it predicts from a roofline instead, and says so.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lynx_compile.errors import StageError
from lynx_compile.files import save_text
from lynx_compile.kernels import LIBRARY, SparseLinear, load_library
from lynx_compile.sparsity import expand_low_rank, padded_width, sparse_linear

CHECKED_ROWS = 64
TOLERANCE = 2**-7  # relative error of a bf16 result: rounding of y, and of T / s
BUFFER_BYTES = 2**28  # more than any L2
# H100: dense bf16 rate and memory bandwidth measured with torch, the GEMM's gain over dense with 128x256x64 tiles.
ROOFLINE_FLOPS, ROOFLINE_BYTES, ROOFLINE_GAIN = 650e12, 3.0e12, 1.4


@dataclass(frozen=True)
class Shape:
    """A linear: tokens M, input channels K, output channels N (of linears that are merged into one node)."""

    model: str
    linear: str
    tokens: int
    channels: int
    out_channels: int


# 1024x1024 pixels: 4096 image tokens, and 512 text tokens where the two are one sequence.
SHAPES = (
    Shape("FLUX.1-dev", "double: to_q,k,v", 4096, 3072, 9216),
    Shape("FLUX.1-dev", "double: to_out", 4096, 3072, 3072),
    Shape("FLUX.1-dev", "double: ff up", 4096, 3072, 12288),
    Shape("FLUX.1-dev", "double: ff down", 4096, 12288, 3072),
    Shape("FLUX.1-dev", "double: text to_q,k,v", 512, 3072, 9216),
    Shape("FLUX.1-dev", "single: to_q,k,v + mlp", 4608, 3072, 21504),
    Shape("FLUX.1-dev", "single: proj_out", 4608, 15360, 3072),
    Shape("Qwen-Image", "to_q,k,v", 4096, 3072, 9216),
    Shape("Qwen-Image", "to_out", 4096, 3072, 3072),
    Shape("Qwen-Image", "mlp up", 4096, 3072, 12288),
    Shape("Qwen-Image", "mlp down", 4096, 12288, 3072),
    Shape("Z-Image", "to_q,k,v", 4608, 3840, 11520),
    Shape("Z-Image", "to_out", 4608, 3840, 3840),
    Shape("Z-Image", "w1,w3", 4608, 3840, 20480),
    Shape("Z-Image", "w2", 4608, 10240, 3840),
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
class Result:
    """One linear measured (or predicted): times in microseconds, ratios against cuBLAS (above 1: sparse is faster).

    ``ratio``: median over rounds of dense / sparse with everything included. ``error``: relative, against float64;
    None where predicted. ``cusparselt``: its GEMM with a 2:4 weight, None where torch has none or it refuses.
    """

    shape: Shape
    rank: int
    dense: Timing
    prune: Timing
    gemm: Timing
    whole: Timing
    cusparselt: Timing | None
    ratio: float
    ratio_low: float
    ratio_high: float
    gemm_ratio: float
    tile: int | None
    error: float | None


@dataclass(frozen=True)
class Bench:
    """All results of one machine, and what it was. ``measured`` is false for a roofline prediction."""

    device: str
    torch: str
    dtype: str
    measured: bool
    results: tuple[Result, ...]

    @property
    def geometric_mean(self) -> float:
        """Of the ratios of the models' linears (the square shapes are left out)."""
        ratios = [result.ratio for result in self.results if result.shape.model != "square"]
        return statistics.geometric_mean(ratios) if ratios else float("nan")


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
        return Bench(
            "roofline of an H100", torch.__version__, "bf16", False, tuple(predict(s, rank) for s in shapes)
        )
    kernels = load_library(library)
    results = []
    for shape in shapes:
        progress(shape)
        results.append(_Problem(shape, rank, kernels).measure(rounds))
        torch.cuda.empty_cache()
    return Bench(torch.cuda.get_device_name(), torch.__version__, "bf16", True, tuple(results))


class _Problem:
    """Random operands of one shape, in as many copies as it takes to outgrow the L2 cache."""

    def __init__(self, shape: Shape, rank: int, kernels: ctypes.CDLL) -> None:
        self.shape, self.rank = shape, rank
        self.tile_count: int = kernels.lynx_tile_count()
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*size: int, deviation: float = 1.0) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device="cuda").mul_(deviation).bfloat16()

        m, k, n = shape.tokens, shape.channels, shape.out_channels
        copies = 2 + BUFFER_BYTES // (2 * (m * k + n * k + m * n))
        deviation = k**-0.5
        self.bias = normal(n)
        self.lora_down = normal(max(rank, 1), k, deviation=deviation)
        lora_up = normal(n, rank, deviation=0.1)
        self.x = [normal(m, k) for _ in range(copies)]
        self.weight = [normal(n, k, deviation=deviation) for _ in range(copies)]
        self.sparse = [
            SparseLinear(
                kernels,
                expand_low_rank(weight, lora_up),
                self.lora_down,
                self.bias,
                rows=m,
                rank=rank,
                norm_scale=True,
            )
            for weight in self.weight
        ]
        self.y = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]

    def measure(self, rounds: int) -> Result:
        error = self._check()
        tiles = range(self.tile_count)
        works: list[Callable[[int], object]] = [self._dense, self._whole, self._prune, self._gemm]
        works += [lambda i, tile=tile: self._gemm(i, tile) for tile in tiles]  # type: ignore[misc]
        cusparselt = self._cusparselt()
        if cusparselt is not None:
            works.append(cusparselt)
        times = _take_turns(works, rounds, len(self.x))
        ratios = sorted(dense / whole for dense, whole in zip(times[0], times[1], strict=True))
        summary = [_timing(part) for part in times]
        best = min(tiles, key=lambda tile: summary[4 + tile].median)
        return Result(
            shape=self.shape,
            rank=self.rank,
            dense=summary[0],
            whole=summary[1],
            prune=summary[2],
            gemm=summary[3],
            cusparselt=summary[-1] if cusparselt is not None else None,
            ratio=statistics.median(ratios),
            ratio_low=ratios[len(ratios) // 10],
            ratio_high=ratios[-1 - len(ratios) // 10],
            gemm_ratio=statistics.median(d / g for d, g in zip(times[0], times[3], strict=True)),
            tile=best,
            error=error,
        )

    def _dense(self, i: int) -> None:
        torch.addmm(self.bias, self.x[i], self.weight[i].T, out=self.y[i])

    def _whole(self, i: int) -> None:
        self.sparse[i](self.x[i])

    def _prune(self, i: int) -> None:
        self.sparse[i].prune(self.x[i])

    def _gemm(self, i: int, tile: int = -1) -> None:
        self.sparse[i].gemm(self.x[i], tile)

    def _cusparselt(self) -> Callable[[int], object] | None:
        """cuSPARSELt through torch: 2:4 weight, compressed by cuSPARSELt itself. None where it is not there."""
        try:
            pruned = [w.unflatten(1, (-1, 4)).clone() for w in self.weight]
            for w in pruned:
                w[..., 2:] = 0
            compressed = [torch._cslt_compress(w.flatten(1)) for w in pruned]

            def run(i: int) -> torch.Tensor:
                return torch._cslt_sparse_mm(compressed[i], self.x[i].T, self.bias, transpose_result=True)

            run(0)
        except (RuntimeError, AttributeError, NotImplementedError):
            return None
        return run

    def _check(self) -> float:
        """Relative error of some rows against float64.

        Raises:
            StageError: it exceeds bf16's rounding.
        """
        x, op = self.x[0], self.sparse[0]
        y = op(x)
        rows = torch.linspace(0, len(x) - 1, CHECKED_ROWS, device="cuda").long()
        weight, lora_down, bias = (tensor.double() for tensor in op.tensors)
        wanted = sparse_linear(x[rows].double(), weight, lora_down, bias, rank=self.rank, norm_scale=True)
        error = float((y[rows].double() - wanted).norm() / wanted.norm())
        if not error < TOLERANCE:
            raise StageError(
                "bench",
                f"{self.shape.model} {self.shape.linear}: the result is off by {error:.2e} of its norm.",
                "Do not use this build on this GPU; please report it with the GPU's name.",
            )
        return error


def _take_turns(works: Sequence[Callable[[int], object]], rounds: int, copies: int) -> list[list[float]]:
    """Microseconds of each work in each round; a round runs all works one after the other on the same copies."""
    for work in works:
        for i in range(copies):
            work(i)
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in works]
        for work, (start, stop) in zip(works, events, strict=True):
            start.record()
            for i in range(copies):
                work(i)
            stop.record()
        torch.cuda.synchronize()
        for part, (start, stop) in zip(times, events, strict=True):
            part.append(1000 * start.elapsed_time(stop) / copies)
    return times


def _timing(times: Sequence[float]) -> Timing:
    ordered = sorted(times)
    return Timing(statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10])


def predict(shape: Shape, rank: int) -> Result:
    """Roofline: dense at cuBLAS's measured rate, the GEMM so much faster, pruning at memory speed."""
    m, k, n = shape.tokens, shape.channels, shape.out_channels
    dense = 2e6 * m * k * n / ROOFLINE_FLOPS
    gemm = 2e6 * m * padded_width(k, rank) * n / ROOFLINE_FLOPS / ROOFLINE_GAIN
    prune = 1e6 * m * k * (2 + 1 + 1 / 8) / ROOFLINE_BYTES
    ratio = dense / (gemm + prune)
    times = {
        name: Timing(value, value, value)
        for name, value in (("dense", dense), ("prune", prune), ("gemm", gemm), ("whole", gemm + prune))
    }
    return Result(
        shape, rank, **times, cusparselt=None, ratio=ratio, ratio_low=ratio, ratio_high=ratio,
        gemm_ratio=dense / gemm, tile=None, error=None,
    )  # fmt: skip


def save(bench: Bench, folder: Path) -> tuple[Path, Path]:
    """Write ``DEVICE-rankR.json`` and ``.png`` into ``folder``; returns their paths."""
    device = "-".join("".join(c if c.isalnum() else " " for c in bench.device.lower()).split())
    path = folder / f"{device}-rank{bench.results[0].rank}.json"
    save_text(path, json.dumps(asdict(bench) | {"geometric_mean": bench.geometric_mean}, indent=1) + "\n")
    picture = path.with_suffix(".png")
    _draw(bench, picture)
    return path, picture


def _draw(bench: Bench, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{r.shape.model}  {r.shape.linear}" for r in bench.results]
    at = range(len(names))
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(names) + 1.6), layout="constrained")
    axes.barh(
        [i - 0.2 for i in at],
        [r.gemm_ratio for r in bench.results],
        0.38,
        label="GEMM alone",
        color="#b9cfe4",
    )
    axes.barh(
        [i + 0.2 for i in at], [r.ratio for r in bench.results], 0.38, color="#2a6fb0", label="everything included",
        xerr=[[r.ratio - r.ratio_low for r in bench.results], [r.ratio_high - r.ratio for r in bench.results]],
        error_kw={"linewidth": 0.8},
    )  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(list(at), names)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as cuBLAS bf16" + ("" if bench.measured else " (predicted, not measured)"))
    axes.set_title(f"{bench.device}: 2:4 activations, rank {bench.results[0].rank}", loc="left")
    axes.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)
