# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile bench`` where the GPU runs the FP8 kernels: every form of a linear beside cuBLAS, torch, cuSPARSELt.

Beside each other, for the linears of real models: cuBLAS in bf16; torch's row-wise FP8; cuSPARSELt in bf16 and FP8, the
fastest of all its algorithms; this project's 2:4 weights and activations (rank 0) in bf16; and its FP8 linears with 2:4
weights, dense, and with 2:4 activations, each as the GEMM alone and with the rounding pass, and where a model makes x
by a norm, GELU or a gate right before, with that fused into the pass (against that kernel and cuBLAS). Everything else
is as in ``bench``. What ``save`` writes is a cost table for every form.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lynx_compile.engine import trt
from lynx_compile.errors import InputError, StageError
from lynx_compile.files.atomic import save_text
from lynx_compile.ops.fp8 import Rounded, round_rows
from lynx_compile.ops.sparse_linear import X_FIRST, Gated, Gelu, Norm, expand_low_rank, keep_mask
from lynx_compile.passes.select import FP8_GPUS
from lynx_compile.tools.bench import BUFFER_BYTES, SHAPES, Shape, sparse_weight_of
from lynx_compile.tools.summary import add
from lynx_compile.tools.timing import captured, file_name, take_long_turns, take_turns
from lynx_compile.torch_ops.bindings import LIBRARY, SparseLinear, load_library
from lynx_compile.torch_ops.fp8_bindings import (
    OPERANDS,
    Fp8Linear,
    Operand,
    load_fp8_library,
    tile_count,
)

CHECKED_ROWS = 64
# Relative error against float64 on the rounded operands: y's own rounding to bf16, and the tensor cores' sums. A fused
# producer rounds x once where torch rounds several times, which e4m3 makes visible.
TOLERANCE, FUSED_TOLERANCE = 2.0**-7, 2.0**-4
ALGORITHMS = 40  # of cuSPARSELt: more than there are
NAMES: dict[Operand, str] = {
    "sparse weight": "fp8_weight",
    "dense": "fp8_dense",
    "sparse activation": "fp8_activation",
}
IN_16_BITS = ("bf16_weight", "bf16_activation")

FP8_SHAPES = (
    *(shape for shape in SHAPES if shape.model != "square"),
    Shape("FLUX.2-dev", "double: to_q,k,v", 4096, 6144, 18432, "layer norm"),
    Shape("FLUX.2-dev", "double: to_out", 4096, 6144, 6144),
    Shape("FLUX.2-dev", "double: ff in", 4096, 6144, 36864, "layer norm"),
    Shape("FLUX.2-dev", "double: ff out", 4096, 18432, 6144, "gated"),
    Shape("FLUX.2-dev", "single: to_q,k,v + mlp", 4608, 6144, 55296, "layer norm"),
    Shape("FLUX.2-dev", "single: to_out", 4608, 24576, 6144),
    Shape("Wan 2.2", "to_q,k,v", 32760, 5120, 15360, "layer norm"),  # 81 frames of 832x480
    Shape("Wan 2.2", "to_out", 32760, 5120, 5120),
    Shape("Wan 2.2", "ffn up", 32760, 5120, 13824, "layer norm"),
    Shape("Wan 2.2", "ffn down", 32760, 13824, 5120, "gelu"),
)


@dataclass(frozen=True)
class Fp8Result:
    """One linear: microseconds by work, ratios over cuBLAS bf16 in the same rounds and steady, errors by operand."""

    shape: Shape
    microseconds: dict[str, float]
    ratios: dict[str, float]
    steady: dict[str, float]
    errors: dict[str, float]
    tiles: dict[str, int]  # the fastest configurations


@dataclass(frozen=True)
class Fp8Bench:
    """All results of one GPU."""

    device: str
    torch: str
    date: str
    results: tuple[Fp8Result, ...]
    architecture: str | None = None

    def has(self, name: str) -> bool:
        return any(name in result.ratios for result in self.results)

    def mean(self, name: str, *, steady: bool = False) -> float:
        """Geometric mean of a work's ratios over the linears that have it."""
        found = [r.steady if steady else r.ratios for r in self.results]
        return statistics.geometric_mean([ratios[name] for ratios in found if name in ratios])

    @property
    def summary(self) -> dict[str, float]:
        """Flat keys to geometric means: of the GEMM alone, and with the pass over x, fused where it can be."""
        means = {f"linears.{name}.all": self.mean(name) for name in IN_16_BITS if self.has(name)}
        for name in NAMES.values():
            means[f"linears.{name}.gemm"] = self.mean(f"{name}.gemm")
            means[f"linears.{name}.unfused"] = self.mean(f"{name}.all")
            included = [r.ratios.get(f"{name}.fused", r.ratios[f"{name}.all"]) for r in self.results]
            means[f"linears.{name}.all"] = statistics.geometric_mean(included)
            means[f"linears.{name}.gemm.steady"] = self.mean(f"{name}.gemm", steady=True)
        for name in ("torch_fp8", "cusparselt_bf16", "cusparselt_fp8"):
            if self.has(name):
                means[f"linears.{name}"] = self.mean(name)
                means[f"linears.{name}.steady"] = self.mean(name, steady=True)
        same = [r for r in self.results if "cusparselt_fp8" in r.ratios]
        over = [r.ratios["fp8_weight.gemm"] / r.ratios["cusparselt_fp8"] for r in same]
        if over:
            means["linears.fp8_weight_over_cusparselt_fp8"] = statistics.geometric_mean(over)
        return means


def bench_fp8(
    shapes: Sequence[Shape] = FP8_SHAPES,
    *,
    rounds: int = 20,
    library: Path = LIBRARY,
    progress: Callable[[Shape], None] = lambda shape: None,
) -> Fp8Bench:
    """Measure every shape in bf16 on the current GPU.

    Raises:
        InputError: the GPU does not run the FP8 kernels, or the plugin library cannot be used.
        StageError: a result is wrong; nothing is timed then.
    """
    if (gpu := trt.gpu()) not in FP8_GPUS:
        raise InputError(
            f"The FP8 kernels run on {', '.join(FP8_GPUS)}, and here is {gpu or 'no GPU'}.",
            "Leave out --fp8.",
        )
    kernels, fp8 = load_library(library), load_fp8_library(library)
    results = []
    for shape in shapes:
        progress(shape)
        results.append(_Problem(shape, kernels, fp8).measure(rounds))
        torch.cuda.empty_cache()
    today = datetime.date.today().isoformat()
    return Fp8Bench(torch.cuda.get_device_name(), torch.__version__, today, tuple(results), gpu)


class _Problem:
    """Random operands of one shape, in as many copies as it takes to outgrow the L2 cache."""

    def __init__(self, shape: Shape, kernels: ctypes.CDLL, fp8: ctypes.CDLL) -> None:
        self.shape, self.fp8 = shape, fp8
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*size: int, deviation: float = 1.0) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device="cuda").mul_(deviation).bfloat16()

        m, k, n = shape.tokens, shape.channels, shape.out_channels
        copies = 2 + BUFFER_BYTES // (2 * (m * k + n * k + m * n))
        self.bias = normal(n)
        self.gain, self.shift = 1 + normal(1, k, deviation=0.2), normal(1, k, deviation=0.2)
        self.x = [normal(m, k) for _ in range(copies)]
        self.halves = [normal(m, 2 * k) for _ in range(copies)] if shape.producer == "gated" else []
        self.weight = [normal(n, k, deviation=k**-0.5) for _ in range(copies)]
        self.y = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        self.sparse = [sparse_weight_of(kernels, weight, self.bias, m) for weight in self.weight]
        no_down = torch.zeros(1, k, device="cuda", dtype=torch.bfloat16)
        self.pruned = [
            SparseLinear(kernels, expand_low_rank(weight, weight[:, :0]), no_down, self.bias, rows=m)
            for weight in self.weight
        ]
        self.rounded_x = [round_rows(x) for x in self.x]
        self.rounded: dict[Operand, list[Rounded]] = {
            "dense": [round_rows(weight) for weight in self.weight],
            "sparse weight": [round_rows(weight, keep_mask(weight)) for weight in self.weight],
        }
        self.rounded["sparse activation"] = self.rounded["dense"]
        self.ops = {operand: self._ops(operand, produced=False) for operand in OPERANDS}
        self.fused = {operand: self._ops(operand, produced=True) for operand in OPERANDS if shape.producer}

    def _ops(self, operand: Operand, *, produced: bool) -> list[Fp8Linear]:
        keep = [keep_mask(weight) if operand == "sparse weight" else None for weight in self.weight]
        return [
            Fp8Linear(
                self.fp8, weight, self.bias, rows=self.shape.tokens, operand=operand, keep=keep[i],
                producer=self._producer(i) if produced else None,
            )
            for i, weight in enumerate(self.rounded[operand])
        ]  # fmt: skip

    def _producer(self, i: int) -> Norm | Gelu | Gated:
        if self.shape.producer == "gelu":
            return Gelu()
        if self.shape.producer == "gated":
            return Gated(self.halves[i], halves=X_FIRST)
        return Norm(self.gain, self.shift, rms=self.shape.producer == "rms norm")

    def _source(self, i: int) -> torch.Tensor:
        """What the producer reads."""
        return self.halves[i] if self.shape.producer == "gated" else self.x[i]

    def _produce(self, x: torch.Tensor) -> torch.Tensor:
        """The producer in torch: one kernel, but for the gate's two."""
        channels = (self.shape.channels,)
        if self.shape.producer == "gelu":
            return functional.gelu(x, approximate="tanh")
        if self.shape.producer == "gated":
            gated, gate = x.chunk(2, -1)
            return functional.silu(gated) * gate
        gain, shift = self.gain[0].to(x.dtype), self.shift[0].to(x.dtype)
        if self.shape.producer == "rms norm":
            return functional.rms_norm(x, channels, gain, 1e-6) + shift
        return functional.layer_norm(x, channels, gain, shift, 1e-6)

    def measure(self, rounds: int) -> Fp8Result:
        errors = self._check()
        works: dict[str, Callable[[int], object]] = {
            "cublas_bf16": lambda i: self._dense(i, self.x[i]),
            "torch_fp8": self._torch,
            "bf16_weight": lambda i: self.sparse[i](self.x[i]),
            "bf16_activation": lambda i: self.pruned[i](self.x[i]),
        }
        if self.shape.producer:
            works["producer + cublas_bf16"] = lambda i: self._dense(i, self._produce(self._source(i)))
        graphs = {name: self._captured(work) for name, work in works.items()}
        tiles = {}
        for operand, name in NAMES.items():
            graphs |= self._ours(operand, name)
            tiles[name] = self._fastest_tile(operand)
        for name in ("cusparselt_bf16", "cusparselt_fp8"):
            library = self._cusparselt(name == "cusparselt_fp8")
            if library is not None:
                graphs[name] = library
        times = take_turns(graphs, rounds, len(self.x))
        alone = {name: graph for name, graph in graphs.items() if name.endswith(".gemm") or name in STEADY}
        steady = take_long_turns(alone, len(self.x))
        return Fp8Result(
            self.shape,
            {name: statistics.median(each) for name, each in times.items()},
            self._ratios(times),
            {name: steady["cublas_bf16"] / each for name, each in steady.items()},
            errors,
            tiles,
        )

    def _ours(self, operand: Operand, name: str) -> dict[str, Callable[[], None]]:
        ops = self.ops[operand]
        graphs = {
            f"{name}.gemm": self._captured(lambda i: ops[i].gemm(self.x[i])),
            f"{name}.pass": self._captured(lambda i: ops[i].round(self.x[i])),
            f"{name}.all": self._captured(lambda i: ops[i](self.x[i])),
        }
        if self.shape.producer:
            fused = self.fused[operand]
            graphs[f"{name}.fused"] = self._captured(lambda i: fused[i](self._source(i)))
        return graphs

    def _fastest_tile(self, operand: Operand) -> int:
        ops = self.ops[operand]
        graphs = {
            f"{tile}": self._captured(lambda i, tile=tile: ops[i].gemm(self.x[i], tile))  # type: ignore[misc]
            for tile in range(tile_count(self.fp8, torch.bfloat16, operand))
        }
        times = take_turns(graphs, 4, len(self.x))
        return int(min(graphs, key=lambda tile: statistics.median(times[tile])))

    def _ratios(self, times: Mapping[str, list[float]]) -> dict[str, float]:
        def ratio(name: str) -> float:
            over = times["producer + cublas_bf16" if name.endswith(".fused") else "cublas_bf16"]
            return statistics.median(dense / each for dense, each in zip(over, times[name], strict=True))

        return {name: ratio(name) for name in times if not name.endswith(("cublas_bf16", ".pass"))}

    def _dense(self, i: int, x: torch.Tensor) -> None:
        torch.addmm(self.bias, x, self.weight[i].T, out=self.y[i])

    def _torch(self, i: int) -> torch.Tensor:
        x, weight = self.rounded_x[i], self.rounded["dense"][i]
        return torch._scaled_mm(
            x.values, weight.values.T, scale_a=x.scale[:, None], scale_b=weight.scale[None], bias=self.bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    def _captured(self, work: Callable[[int], object]) -> Callable[[], None]:
        """``work`` on every copy of the operands, as one graph."""

        def run() -> None:
            for i in range(len(self.x)):
                work(i)

        return captured(run)

    def _cusparselt(self, fp8: bool) -> Callable[[], None] | None:
        """cuSPARSELt through torch, the fastest of its algorithms; None where it takes no such shape."""
        try:
            compressed = [self._compressed(weight, fp8) for weight in self.weight]
        except (RuntimeError, AttributeError, NotImplementedError):
            return None
        inputs = [x.values for x in self.rounded_x] if fp8 else self.x
        out_dtype = torch.bfloat16 if fp8 else None
        best: tuple[float, Callable[[], None]] | None = None
        for algorithm in range(ALGORITHMS):

            def product(i: int, algorithm: int = algorithm) -> torch.Tensor:
                return torch._cslt_sparse_mm(
                    compressed[i], inputs[i].T, self.bias, out_dtype=out_dtype, transpose_result=True, alg_id=algorithm
                )  # fmt: skip

            try:
                graph = self._captured(product)
            except RuntimeError:
                continue  # there is no such algorithm, or it does not take this shape
            time = statistics.median(take_turns({"": graph}, 4, len(self.x))[""])
            if best is None or time < best[0]:
                best = time, graph
        return best[1] if best else None

    def _compressed(self, weight: torch.Tensor, fp8: bool) -> torch.Tensor:
        pruned = weight * keep_mask(weight)
        return torch._cslt_compress(round_rows(pruned).values if fp8 else pruned)

    def _check(self) -> dict[str, float]:
        """The largest relative error of some rows of every op, in all tiles, against float64 on the rounded operands.

        Raises:
            StageError: it exceeds what rounding explains.
        """
        rows = torch.linspace(0, self.shape.tokens - 1, CHECKED_ROWS, device="cuda").long()
        errors = self._check_16_bits(rows)
        for operand, name in NAMES.items():
            op, prune = self.ops[operand][0], operand == "sparse activation"
            wanted = self._definition(self.x[0][rows], self.rounded[operand][0], prune)
            tiles = range(-1, tile_count(self.fp8, torch.bfloat16, operand))
            errors[name] = max(_error(op(self.x[0], tile)[rows], wanted) for tile in tiles)
            self._judge(name, errors[name], TOLERANCE)
            if self.shape.producer:
                source = self._source(0)
                wanted = self._definition(
                    self._produce(source[rows].double()).bfloat16(), self.rounded[operand][0], prune
                )
                error = _error(self.fused[operand][0](source)[rows], wanted)
                self._judge(f"{name}, fused", error, FUSED_TOLERANCE)
        return errors

    def _check_16_bits(self, rows: torch.Tensor) -> dict[str, float]:
        x, weight, bias = self.x[0], self.weight[0].double(), self.bias.double()
        read = x[rows].double()
        wanted = {
            "bf16_weight": functional.linear(read, weight * keep_mask(self.weight[0]), bias),
            "bf16_activation": functional.linear(read * keep_mask(x[rows]), weight, bias),
        }
        found = {"bf16_weight": self.sparse[0](x), "bf16_activation": self.pruned[0](x)}
        errors = {name: _error(found[name][rows], due) for name, due in wanted.items()}
        for name, error in errors.items():
            self._judge(name, error, TOLERANCE)
        return errors

    def _judge(self, what: str, error: float, tolerance: float) -> None:
        if not error < tolerance:
            raise StageError(
                "bench",
                f"{self.shape.model} {self.shape.linear}, {what}: the result is off by {error:.2e} of its norm.",
                "Do not use this build on this GPU; please report it with the GPU's name.",
            )

    def _definition(self, x: torch.Tensor, weight: Rounded, prune: bool) -> torch.Tensor:
        rounded = round_rows(x, keep_mask(x) if prune else None)
        product = rounded.dequantized(torch.float64) @ weight.dequantized(torch.float64).T
        return product + self.bias.double()


STEADY = ("cublas_bf16", "torch_fp8", *IN_16_BITS, "cusparselt_bf16", "cusparselt_fp8")


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def save(bench: Fp8Bench, folder: Path) -> tuple[Path, Path]:
    """Write ``DEVICE-fp8.json`` into ``folder`` and its means into ``summary.json`` beside it, over those of before."""
    path = folder / f"{file_name(bench.device)}-fp8.json"
    save_text(path, json.dumps(asdict(bench) | {"summary": bench.summary}, indent=1) + "\n")
    summary = folder / "summary.json"
    rounded = {name: round(value, 3) for name, value in bench.summary.items()}
    add({**rounded, "device": bench.device, "date": bench.date}, summary)
    return path, summary


ROWS = {
    "2:4 activations, bf16": "bf16_activation",
    "2:4 weights, bf16": "bf16_weight",
    "dense FP8": "fp8_dense",
    "2:4 activations in FP8": "fp8_activation",
    "2:4 weights in FP8": "fp8_weight",
    "*(dense FP8 by torch, row-wise)*": "torch_fp8",
    "*(2:4 weights in FP8 by cuSPARSELt)*": "cusparselt_fp8",
}
STUDIED = {  # methods of the study of digits-flux, whose errors stand beside the speeds: 2:4 is tuned
    "bf16_activation": "activation",
    "bf16_weight": "weight",
    "fp8_dense": "fp8_dense",
    "fp8_activation": "activation_fp8",
    "fp8_weight": "weight_fp8",
}


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md, from ``summary.json``; the fastest row of ours with everything included is bold.

    The errors are those that ``lynx-compile study`` wrote there of digits-flux.
    """

    def cell(key: str, unit: str, digits: int) -> str:
        return f"{summary[key]:.{digits}f}{unit}" if key in summary else "–"

    best = _best(summary)
    lines = [
        "| a linear as | GEMM alone | the same, steady | everything included | layer error | output error |",
        "|---|---|---|---|---|---|",
        "| dense, bf16 (cuBLAS) | 1.00x | 1.00x | 1.00x | 0 | 0 |",
    ]
    for words, name in ROWS.items():
        gemm = f"linears.{name}.gemm" if f"linears.{name}.gemm" in summary else f"linears.{name}"
        included = cell(f"linears.{name}.all", "x", 2)
        bold = "**" if name == best else ""
        cells = [
            f"{bold}{words}{bold}", cell(gemm, "x", 2), cell(f"{gemm}.steady", "x", 2), f"{bold}{included}{bold}",
            cell(_error_key(name, "layer_error"), "", 3), cell(_error_key(name, "output_error"), "", 3),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short(summary: Mapping[str, Any]) -> str:
    """The README's table: of each row of ours, the speed with everything included and the output error."""
    best = _best(summary)
    lines = ["| a linear as | speed | error |", "|---|---|---|", "| dense, bf16 (cuBLAS) | 1.00x | 0 |"]
    for words, name in ROWS.items():
        if (speed := summary.get(f"linears.{name}.all")) is not None:
            bold = "**" if name == best else ""
            error = summary[_error_key(name, "output_error")]
            lines.append(f"| {bold}{words}{bold} | {bold}{speed:.2f}x{bold} | {error:.3f} |")
    return "\n".join(lines)


def _error_key(name: str, what: str) -> str:
    """Of a row's error in ``summary.json``; nothing is there for what others' kernels do."""
    return f"quality.digits_flux.{STUDIED.get(name, name)}.{what}"


def _best(summary: Mapping[str, Any]) -> str:
    return max(ROWS.values(), key=lambda name: summary.get(f"linears.{name}.all", 0.0))
