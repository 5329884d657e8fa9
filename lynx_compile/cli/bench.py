# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile bench``: measures linears, blocks or whole models on the GPU that is here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lynx_compile.cli.console import Quiet, interruptible, note, out, speak
from lynx_compile.errors import InputError
from lynx_compile.files.outputs import Outputs

if TYPE_CHECKING:
    from lynx_compile.tools.bench import Bench, Shape
    from lynx_compile.tools.bench_fp8 import Fp8Bench


def bench(
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the JSON and the picture.")
    ] = Path(),
    fp8: Annotated[
        bool | None,
        typer.Option(
            "--fp8/--no-fp8", help="All forms, FP8 too, or 16 bits alone; FP8 too where the GPU runs it."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Rank of the low-rank branch, 0, 16, ... 128; 16 bits alone.", show_default="64"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median is shown.")] = 30,
    plugin: Annotated[Path | None, typer.Option(help="Another build of liblynx_plugin.so.")] = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Measure FLUX.1-dev's blocks instead of single linears.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure a step of a whole model: a recipe's (YAML), flux1_dev, qwen_image, z_image or flux2_klein."
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --model: do not read a recipe's checkpoint.")
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="With --model: an engine, whose plan to measure instead of the fastest one."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure sparse linears on this GPU.

    Against cuBLAS, and other ways to run them. By default the linears of FLUX.1-dev, Qwen-Image and Z-Image, and where
    the GPU runs FP8 those of FLUX.2-dev and Wan 2.2 too, in all forms that it has kernels for; with --blocks
    FLUX.1-dev's blocks, with --model a step of a whole model. Without a GPU a roofline is shown, as such.

    \b
    Writes, into the folder of -o:
      GPU-....json and .png   what was measured; give the JSON as sparsity.costs of a recipe
      summary.json            geometric means, where FP8 was measured

    \b
    Examples:
      lynx-compile bench -o out
      lynx-compile bench -o out --model flux.yaml --random-weights
    """
    speak(quiet=quiet)
    if rank is not None and rank not in range(0, 129, 16):
        raise InputError(f"--rank is {rank}.", "Give a multiple of 16 from 0 to 128.")
    if not model and (random_weights or plan is not None):
        option = "--random-weights" if random_weights else "--plan"
        raise InputError(f"{option} is for --model, and that is missing.", "Give both.")
    if model and blocks:
        raise InputError("--model and --blocks are two benchmarks.", "Give one of them.")
    if rank is not None and fp8:
        raise InputError("--rank is for 16 bits alone, and --fp8 is given.", "Leave one of them out.")
    try:  # said before minutes of measuring
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}).", "Check the folder and its permissions."
        ) from None
    with interruptible("nothing was written."):
        from lynx_compile.engine import trt
        from lynx_compile.passes.select import FP8_GPUS
        from lynx_compile.tools import bench as linears
        from lynx_compile.torch_ops import bindings as kernels

        if model:
            _bench_models(folder, min(rounds, 10), model, plugin, random_weights, plan)
            return
        if blocks:
            _bench_blocks(folder, rounds, plugin or kernels.LIBRARY)
            return
        if fp8 or (fp8 is None and rank is None and trt.gpu() in FP8_GPUS):
            _bench_fp8(folder, rounds, plugin or kernels.LIBRARY)
            return
        measured = linears.bench(
            rank=64 if rank is None else rank,
            rounds=rounds,
            library=plugin or kernels.LIBRARY,
            progress=_show_shape,
        )
    if not measured.measured:
        out.print("There is no GPU here, so nothing was measured: what follows is a roofline prediction.")
    Console(highlight=False, width=max(out.width, 190)).print(
        _bench_table(measured)
    )  # 80 would cut the names
    means = ", ".join(f"{name} {value:.2f}x" for name, value in measured.geometric_means.items())
    out.print(f"geometric means over the models' linears: {means}")
    for path in linears.save(measured, folder):
        out.print(f"wrote {escape(str(path))}")


def _show_shape(shape: Shape) -> None:
    note(f"{shape.model}: {shape.linear}")


def _bench_fp8(folder: Path, rounds: int, library: Path) -> None:
    from lynx_compile.tools import bench_fp8

    measured = bench_fp8.bench_fp8(rounds=rounds, library=library, progress=_show_shape)
    Console(highlight=False, width=max(out.width, 190)).print(_fp8_table(measured))
    for name, value in measured.summary.items():
        out.print(f"{name:<45} {value:.3f}")
    path, summary = bench_fp8.save(measured, folder)
    out.print(escape(bench_fp8.markdown(json.loads(summary.read_text()))))
    out.print(f"wrote {escape(str(path))} and {escape(str(summary))}")


FP8_COLUMNS = {
    "torch FP8": "torch_fp8",
    "cuSPARSELt": "cusparselt_bf16",
    "and FP8": "cusparselt_fp8",
    "2:4 weights": "bf16_weight",
    "2:4 activ.": "bf16_activation",
    **{
        f"{form}: {part}": f"fp8_{name}.{part.lower()}"
        for form, name in (("dense FP8", "dense"), ("FP8 2:4 w.", "weight"), ("FP8 2:4 a.", "activation"))
        for part in ("GEMM", "all", "fused")
    },
}


def _fp8_table(measured: Fp8Bench) -> Table:
    """Times as fast as cuBLAS bf16 (fused: as the producer's kernel and cuBLAS), in turns; behind a stroke, steady."""
    table = Table(
        title=f"{measured.device}; times as fast as cuBLAS bf16, in turns / steady", title_justify="left"
    )
    for heading in ("model", "linear", "M x K -> N"):
        table.add_column(heading, no_wrap=True)
    for heading in ("cuBLAS us", *FP8_COLUMNS):
        table.add_column(heading, justify="right")
    for r in measured.results:
        s = r.shape
        ratios = [
            f"{r.ratios[name]:.2f}" + (f" / {r.steady[name]:.2f}" if name in r.steady else "")
            if name in r.ratios
            else "-"
            for name in FP8_COLUMNS.values()
        ]
        table.add_row(
            s.model, s.linear, f"{s.tokens} x {s.channels} -> {s.out_channels}",
            f"{r.microseconds['cublas_bf16']:.0f}", *ratios,
        )  # fmt: skip
    return table


def _bench_blocks(folder: Path, rounds: int, library: Path) -> None:
    from lynx_compile.tools import bench_blocks

    measured = bench_blocks.bench_blocks(rounds=rounds, library=library)
    for r in measured.results:
        out.print(
            f"FLUX.1-dev, {r.block} block: dense {r.dense.median:.0f} us (its linears {r.linear_share:.0%}), "
            f"sparse {r.sparse.median:.0f} us, {r.ratio.median:.2f}x ({r.ratio.low:.2f}-{r.ratio.high:.2f}), "
            f"{r.steady_ratio:.2f}x steady, error {r.error:.1e}"
        )
    out.print(f"wrote {escape(str(bench_blocks.save(measured, folder)))}")


def _bench_models(
    folder: Path,
    rounds: int,
    names: Sequence[str],
    library: Path | None,
    random_weights: bool,
    engine: Path | None,
) -> None:
    from lynx_compile.engine.manifest import Manifest
    from lynx_compile.tools import bench_model, model_results, models_to_bench
    from lynx_compile.torch_ops import operators

    if library is not None:
        operators.use_library(library)
    plan = bench_model.plan_of(Manifest.read(Outputs.find(engine).manifest)) if engine else None
    with models_to_bench.models(names, folder, random_weights=random_weights, log=note) as models:
        models_to_bench.require_gpu(models, plan, note)
        for model in models:
            settings = bench_model.Settings(rounds=rounds)
            result = bench_model.bench_model(model, plan=plan, settings=settings, log=note)
            for form in result.forms:
                out.print(escape(model_results.line(result, form)))
            for path in model_results.save(result, folder):
                out.print(f"wrote {escape(str(path))}")


def _bench_table(measured: Bench) -> Table:
    table = Table(title=f"{measured.device}, {measured.dtype}; microseconds, medians", title_justify="left")
    for heading in ("model", "linear", "M x K -> N"):
        table.add_column(heading, no_wrap=True)
    for heading in ("cuBLAS", "prune", "GEMM", "all", "weight", "cuSPARSELt"):
        table.add_column(heading, justify="right")
    for heading in ("GEMM alone", "all: ratio", "weight: ratio", "steady", "fused", "fused: weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in measured.results:
        s = r.shape
        times = (r.dense, r.prune, r.gemm, r.whole, r.weight, r.cusparselt)
        table.add_row(
            s.model, s.linear, f"{s.tokens} x {s.channels} -> {s.out_channels}",
            *(f"{t.median:.0f}" if t else "-" for t in times),
            f"{r.gemm_ratio.median:.2f}x",
            *(f"{t.median:.2f}x ({t.low:.2f}-{t.high:.2f})" for t in (r.ratio, r.weight_ratio)),
            f"{r.steady_ratio:.2f}x {r.steady_weight_ratio:.2f}x" if r.steady_ratio else "-",
            *(f"{t.median:.2f}x" if t else "-" for t in (r.fused_ratio, r.fused_weight_ratio)),
        )  # fmt: skip
    return table
