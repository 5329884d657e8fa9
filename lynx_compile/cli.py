# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile RECIPE.yaml -o OUT.engine``, and ``bench``, ``inspect``, ``compare``, ``study``: parses and shows.

Exit codes: 0 done, 1 ``compare`` missed a threshold, 2 bad recipe or input, 3 a stage failed, 130 interrupted,
143 ended by SIGTERM.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from lynx_compile import __version__, parallel
from lynx_compile.errors import InputError, LynxError, is_out_of_memory, out_of_memory
from lynx_compile.files.outputs import Outputs

if TYPE_CHECKING:
    from lynx_compile.engine.manifest import Stage
    from lynx_compile.tools.bench import Bench, Shape
    from lynx_compile.tools.bench_fp8 import Fp8Bench
    from lynx_compile.tools.comparison import Comparison
    from lynx_compile.tools.inspection import Inspection

SHOWN_LINEARS = 20


class Runner(StrEnum):
    """What runs the models that ``compare`` compares."""

    auto = "auto"
    torch = "torch"
    onnx = "onnx"


app, bench_app, check_app, inspect_app, compare_app, study_app = (
    typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False) for _ in range(6)
)
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the console script; errors end in one line and their exit code."""
    _speak_utf8()
    try:
        # A recipe without a command compiles, so these are no subcommands.
        commands = {
            "bench": bench_app,
            "inspect": inspect_app,
            "check": check_app,
            "compare": compare_app,
            "study": study_app,
        }
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if command := commands.get(name):
            command(sys.argv[2:], prog_name=f"lynx-compile {name}")
        app(standalone_mode=True)
    except Exception as error:
        shown = out_of_memory(None, error) if is_out_of_memory(error) else error
        if not isinstance(shown, LynxError):
            raise
        err.print(f"[bold red]error:[/] {escape(str(shown))}")
        sys.exit(shown.exit_code)


def _speak_utf8() -> None:
    """Names of files may hold any character, whatever the locale.

    An ASCII locale would have them fail in the middle of the work, in the file system's calls and when they are shown;
    Python decides on it when it starts. What is no UTF-8 at all is shown escaped.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and not sys.flags.utf8_mode:
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": ""}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _version(show: bool) -> None:
    if show:
        out.print(f"lynx-compile {__version__}")
        raise typer.Exit


@contextmanager
def _interruptible(left: str) -> Iterator[None]:
    """Ctrl-C or SIGTERM inside ends the command with exit code 130 or 143 and a word on what it ``left``.

    The signal itself is remembered, since not every KeyboardInterrupt comes out as one: torch's C++ turns one
    that strikes it into a ValueError, and diffusers that into a damaged checkpoint.
    """
    received: int | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        raise KeyboardInterrupt

    # Not where the caller has it ignored, as a shell's & does.
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in defaults}
    taken = [number for number, default in defaults.items() if before[number] is default]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    except BaseException as error:
        if received is None and not isinstance(error, KeyboardInterrupt):
            raise
        err.print(f"[bold red]interrupted:[/] {left}")
        raise typer.Exit(128 + (received or signal.SIGINT)) from None
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def _joined() -> Iterator[None]:
    """Where torchrun has started several processes, they work together and the first one alone speaks.

    The others end at once when they are told to: they hold nothing. And none of their exit codes says anything, lest
    torchrun ends the first process before that has said what was wrong.
    """
    speaks = True
    try:
        with parallel.joined():
            if not (speaks := parallel.is_first()):
                out.quiet = err.quiet = True
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
            yield
    except Exception:
        if speaks:
            raise
        raise typer.Exit from None


@app.command()
def compile_(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine to write.", show_default=False)],
    cache: Annotated[
        Path | None, typer.Option(help="Folder of what the stages leave. Default: beside the engine.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Run every stage again, or only what changed.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log, TensorRT's too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compile a diffusion transformer into a TensorRT engine with 2:4 sparse linears.

    Other commands: check, inspect, compare, study, bench; each has a --help. Under torchrun several GPUs share it:
    torchrun --nproc-per-node 2 -m lynx_compile RECIPE.yaml -o OUT.engine.
    """
    left = "no output was changed; the same command goes on from the last whole stage."
    with _interruptible(left), _joined():
        from lynx_compile.recipe import load_recipe

        values = load_recipe(recipe)
        if output.resolve() == recipe.resolve():
            raise InputError(f"The output {output} would take the place of the recipe.", "Give another name.")
        _configure_logging(verbose)
        from lynx_compile import pipeline  # torch takes seconds to import; a bad recipe need not wait

        manifests = pipeline.compile(values, output, cache=cache, fresh=fresh, display=_stage)
    for manifest in manifests:
        out.print(manifest.summary())


@check_app.command()
def check_(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The engine; by default beside the recipe.")
    ] = None,
) -> None:
    """Say what compiling a recipe will take of memory and disk, and whether this machine has it. Nothing is run."""
    with _interruptible("nothing was written."):
        from lynx_compile.recipe import load_recipe

        values = load_recipe(recipe)
        from lynx_compile.tools.check import check

        for line in check(values, output or recipe.with_suffix(".engine")):
            out.print(line)


@bench_app.command()
def bench_(
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
) -> None:
    """Measure the sparse linears of real models against cuBLAS on this GPU."""
    if rank is not None and rank not in range(0, 129, 16):
        raise InputError(f"--rank is {rank}.", "Give a multiple of 16 from 0 to 128.")
    with _interruptible("nothing was written."):
        from lynx_compile.engine import trt
        from lynx_compile.passes.select import FP8_GPUS
        from lynx_compile.tools import bench
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
        measured = bench.bench(
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
    for path in bench.save(measured, folder):
        out.print(f"wrote {escape(str(path))}")


def _show_shape(shape: Shape) -> None:
    err.print(f"[dim]{escape(f'{shape.model}: {shape.linear}')}")


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

    def log(text: str) -> None:
        err.print(f"[dim]{escape(text)}")

    if library is not None:
        operators.use_library(library)
    plan = bench_model.plan_of(Manifest.read(Outputs.find(engine).manifest)) if engine else None
    with models_to_bench.models(names, folder, random_weights=random_weights, log=log) as models:
        models_to_bench.require_gpu(models, plan, log)
        for model in models:
            settings = bench_model.Settings(rounds=rounds)
            result = bench_model.bench_model(model, plan=plan, settings=settings, log=log)
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


@inspect_app.command()
def inspect_(
    engine: Annotated[
        Path, typer.Argument(help="The engine, with its manifest beside it.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an engine was built from and holds: layers, plugin, inputs, weights, sizes."""
    from lynx_compile.tools.inspection import inspect

    found = inspect(engine)
    if as_json:
        print(json.dumps(found.json(), indent=1))
    else:
        _show_inspection(found)
    for problem in found.problems:
        err.print(f"[bold red]error:[/] {escape(problem)} Compile the engine again.")
    if found.problems:
        raise typer.Exit(InputError.exit_code)


def _show_inspection(found: Inspection) -> None:
    m = found.manifest
    library = {
        "same": "installed here",
        "another": "another build is installed here",
        "none": "not installed here",
    }
    weights = f"external, in {m.weights.file}" if m.weights.file else "embedded"
    layers = "" if found.plugin_layers is None else f", {found.plugin_layers} found in the engine"
    facts = {
        "engine": f"{m.engine.file}, {_size(m.engine.bytes)}, {m.dtype}, for {', '.join(m.gpus)}",
        "built by": f"lynx-compile {m.compiler} with {m.backend.name} {m.backend.version}",
        "model": f"{m.source.model}, {m.source.subfolder} ({m.source.family})",
        "plugin": f"{m.plugin.library}, {'embedded, ' if m.plugin.embedded else ''}"
        f"{library[found.installed_plugin]}, SHA-256 {m.plugin.sha256[:16]}",
        "plugin layers": f"{m.plugin_layers}{layers}",
        "weights": weights,
        **{f"input {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}" for tensor in m.inputs},
        **{f"output {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}" for tensor in m.outputs},
    }
    for name, value in facts.items():
        out.print(f"{escape(name):<30} {escape(value)}")
    wide = Console(highlight=False, width=max(out.width, 120))
    wide.print(_sparse_table(found))
    dense = Table("reason", "linears", title=f"{len(m.dense)} linears left dense", title_justify="left")
    for reason in dict.fromkeys(linear.reason for linear in m.dense):
        names = [linear.linear for linear in m.dense if linear.reason == reason]
        dense.add_row(escape(reason), escape("\n".join(names)), end_section=True)
    wide.print(dense)
    if m.stages:
        wide.print(_stages_table(m.stages))


def _sparse_table(found: Inspection) -> Table:
    sparse = found.manifest.sparse
    title = f"{sum(len(node.linears) for node in sparse)} linears in {len(sparse)} plugin layers"
    table = Table("layer", "form", title=title, title_justify="left")
    for heading in ("K -> N", "rank", "weights", "worst error"):
        table.add_column(heading, justify="right")
    for node in sparse:
        size = found.weight_bytes.get(node.layer)
        table.add_row(
            escape("\n".join(node.linears)), node.form, f"{node.in_channels} -> {node.out_channels}",
            str(node.rank), "-" if size is None else _size(size), f"{max(node.errors):.3f}",
        )  # fmt: skip
    return table


def _stages_table(stages: Sequence[Stage]) -> Table:
    table = Table("stage", title="compilation", title_justify="left")
    for heading in ("time", "most memory"):
        table.add_column(heading, justify="right")
    for stage in stages:
        peak = "-" if stage.peak_bytes is None else _size(stage.peak_bytes)
        table.add_row(stage.name, f"{stage.seconds:.1f} s{' (earlier run)' if stage.reused else ''}", peak)
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@compare_app.command()
def compare_(
    engine: Annotated[
        Path, typer.Argument(help="The engine, with what its compilation left beside it.", show_default=False)
    ],
    cache: Annotated[
        Path | None, typer.Option(help="The cache that the engine was compiled with, if not beside it.")
    ] = None,
    metric: Annotated[
        bool, typer.Option("--metric/--no-metric", help="Call the recipe's own metric, which is code.")
    ] = False,
    through: Annotated[
        Runner,
        typer.Option(
            "--with",
            help="What runs the models. auto: torch for what was compiled for torch, and on a GPU with our kernels; "
            "else ONNX Runtime in float32.",
        ),
    ] = Runner.auto,
) -> None:
    """Compare an engine's model with the dense one: linears, output, images. Exit code 1: a limit is missed."""
    _configure_logging(verbose=False)
    with _interruptible("nothing was written."):
        from lynx_compile.tools import compare

        found = compare.compare(engine, cache=cache, run_metric=metric, through=through.value, display=_stage)
    _show_comparison(found)
    written = Outputs.find(engine)
    out.print(f"wrote {escape(str(written.comparison))} and {escape(written.report.name)}")
    for sentence in found.missed:
        err.print(f"[bold red]missed:[/] {escape(sentence)}")
    if found.missed:
        raise typer.Exit(1)


def _show_comparison(found: Comparison) -> None:
    linears = Table(
        "linear", title=f"sparse linears, worst first ({found.states} states)", title_justify="left"
    )
    for heading in ("error", "worst", "expected"):
        linears.add_column(heading, justify="right")
    for x in found.linears[:SHOWN_LINEARS]:
        linears.add_row(escape(x.linear), f"{x.error:.4f}", f"{x.worst:.4f}", f"{x.expected:.4f}")
    wide = Console(highlight=False, width=max(out.width, 110))
    wide.print(linears)
    if len(found.linears) > SHOWN_LINEARS:
        out.print(f"and {len(found.linears) - SHOWN_LINEARS} more in the JSON")
    output = Table("step", title="model output on the dense trajectory", title_justify="left")
    for heading in ("timestep", "error", "worst", *(f"{engine.kind} engine" for engine in found.engines)):
        output.add_column(heading, justify="right")
    for i, step in enumerate(found.output):
        engines = (f"{engine.steps[i].error:.4f}" for engine in found.engines)
        output.add_row(
            str(step.step), f"{step.timestep:.3f}", f"{step.error:.4f}", f"{step.worst:.4f}", *engines
        )
    wide.print(output)
    for engine in found.engines:
        out.print(f"{engine.kind} engine: {engine.milliseconds:.1f} ms a step")
    if found.images is not None:
        psnr = found.images.psnr
        lpips = "" if found.images.lpips is None else f", LPIPS {found.images.lpips:.4f}"
        out.print(f"{len(psnr)} images: PSNR {found.images.mean_psnr:.1f} dB (worst {min(psnr):.1f}){lpips}")
    for name, value in (found.metric or {}).items():
        out.print(f"metric {escape(name)}: {value:.6g}")
    for what, reason in found.not_measured.items():
        out.print(f"not measured: {escape(what)} ({escape(reason)})")


@study_app.command()
def study_(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for what is found. Default: NAME.study.", show_default=False
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated names, as in study.json; all by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Do everything so many times, for a spread.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="Of tuning, each method that is tuned. Default: the recipe's.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Prompts to measure on. Default: compare.samples.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Prompts to a call. Default: calibration.batch.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to calibrate on. Default: calibration.samples.")
    ] = None,
    states: Annotated[
        int | None, typer.Option(min=1, help="Calls kept of each. Default: calibration.states_per_prompt.")
    ] = None,
    metric: Annotated[bool, typer.Option("--metric", help="Run the recipe's metric, which is code.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the model. Default: the recipe's file name.")] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Put quality.NAME.METHOD.* into this JSON file too.")
    ] = None,
    budget: Annotated[
        Path | None,
        typer.Option(
            help="With --summary: an engine of a budget, after compare.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare methods of sparsity on the recipe's model, at equal rank and tuning time."""
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes is {minutes:g}.", "Give more than 0.")
    with _interruptible("what was measured is kept; the same command goes on from there."):
        from lynx_compile.recipe import load_recipe

        values = load_recipe(recipe)
        _configure_logging(verbose=False)
        from lynx_compile.tools import summary as summary_file
        from lynx_compile.tools.study import methods as known
        from lynx_compile.tools.study import results, run, show

        name = name or recipe.stem.replace("-", "_")
        folder = folder or Path(f"{recipe.stem}.study")
        wanted = known.chosen(methods)
        values = run.with_choices(
            values, minutes=minutes, samples=samples, batch=batch, prompts_calibrated=prompts, states=states
        )
        found = run.study(
            values, name, folder, methods=wanted, seeds=seeds, run_metric=metric, display=_stage
        )
        if summary is not None:
            compiled = {} if budget is None else results.of_budget(name, budget)
            summary_file.add(results.summary(found) | compiled, summary)
    Console(highlight=False, width=max(out.width, 150)).print(show.table(found))
    out.print(f"wrote {escape(str(folder / 'study.json'))}, study.md, study.png and, of images, sheet.png")


def _configure_logging(verbose: bool) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    logger = logging.getLogger("lynx_compile")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


@contextmanager
def _stage(name: str) -> Iterator:  # type: ignore[type-arg]
    """One line per stage with a bar, how much of what, and the time."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.fields[stage]:<11}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err) as bars:
        task = bars.add_task("", total=None, stage=name)

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield show
        total = bars.tasks[0].total or 1
        bars.update(task, completed=total, total=total)
