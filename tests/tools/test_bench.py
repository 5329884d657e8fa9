# SPDX-License-Identifier: Apache-2.0
"""What ``lynx-compile bench`` does without a GPU, and how the kernels are called. tests/gpu measures for real."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lynx_compile import cli
from lynx_compile.cli.bench import _fp8_table
from lynx_compile.engine import trt
from lynx_compile.errors import InputError
from lynx_compile.passes import speed_table as costs
from lynx_compile.tools import bench, bench_fp8, timing
from lynx_compile.torch_ops import bindings as kernels
from tests.plugins.native import compile_cpp

BENCH = Path(__file__).parents[2] / "engines" / "bench"
SMALL = bench.Shape("FLUX.1-dev", "to_out", 4096, 3072, 3072)


def test_without_a_gpu_it_predicts_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "bench", "-o", str(tmp_path), "--rank", "16"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "nothing was measured" in shown and "single: to_q,k,v + mlp" in shown
    saved = json.loads((tmp_path / "roofline-of-an-h100-rank16.json").read_text())
    assert not saved["measured"] and len(saved["results"]) == len(bench.SHAPES)
    assert (tmp_path / "roofline-of-an-h100-rank16.png").read_bytes().startswith(b"\x89PNG")


def test_prediction_grows_with_the_rank_and_counts_every_byte() -> None:
    plain, ranked = bench._predict(SMALL, 0), bench._predict(SMALL, 64)
    assert plain.gemm.median < ranked.gemm.median and plain.ratio.median > ranked.ratio.median
    assert plain.whole.median == pytest.approx(plain.prune.median + plain.gemm.median)
    assert plain.prune.median == pytest.approx(4096 * 3072 * 3.125 / costs.ROOFLINE_BYTES * 1e6)


def test_geometric_mean_leaves_the_square_shapes_out() -> None:
    square = bench._predict(bench.Shape("square", "x", 64, 64, 64), 0)
    one = bench._predict(SMALL, 0)
    both = bench.Bench("gpu", "2", "bf16", True, (one, square))
    assert both.geometric_means["activations"] == pytest.approx(one.ratio.median)
    assert both.geometric_means["weights"] == pytest.approx(one.weight_ratio.median)
    assert square.ratio.median != one.ratio.median


def test_the_better_operand_counts_and_dense_where_neither_pays() -> None:
    one = bench._predict(SMALL, 64)
    assert one.best == one.weight_ratio.median > one.ratio.median
    slow = bench.Ratio(0.8, 0.7, 0.9)
    assert dataclasses.replace(one, ratio=slow, weight_ratio=slow).best == 1


def stored_fp8() -> bench_fp8.Fp8Bench:
    values = json.loads((BENCH / "nvidia-h200-fp8.json").read_text())
    results = [bench_fp8.Fp8Result(**r | {"shape": bench.Shape(**r["shape"])}) for r in values["results"]]
    return bench_fp8.Fp8Bench(values["device"], values["torch"], values["date"], tuple(results))


def test_the_summary_is_of_the_stored_results() -> None:
    """What README and docs show comes from the file of the same run, by the code that is here."""
    summary = json.loads((BENCH / "summary.json").read_text())
    measured = stored_fp8().summary
    assert {name: round(value, 3) for name, value in measured.items()} == {
        name: summary[name] for name in measured
    }
    assert measured.keys() >= {
        "linears.bf16_weight.all", "linears.fp8_dense.gemm", "linears.fp8_weight.gemm", "linears.fp8_weight.all",
        "linears.fp8_activation.all", "linears.torch_fp8", "linears.cusparselt_fp8",
    }  # fmt: skip


def test_readme_and_docs_show_the_summary() -> None:
    summary = json.loads((BENCH / "summary.json").read_text())
    table = bench_fp8.markdown(summary)
    assert table in (BENCH.parents[1] / "docs" / "benchmarks.md").read_text()
    assert bench_fp8.short(summary) in (BENCH.parents[1] / "README.md").read_text()
    assert f"**{summary['linears.fp8_weight.all']:.2f}x**" in table and table.count("**") == 4
    errors = {
        "2:4 activations, bf16": "activation", "2:4 weights, bf16": "weight", "dense FP8": "fp8_dense",
        "2:4 activations in FP8": "activation_fp8", "2:4 weights in FP8": "weight_fp8",
    }  # fmt: skip
    for shown in (table, bench_fp8.short(summary)):
        cells = [line.replace("*", "").strip("| ").split(" | ") for line in shown.splitlines()]
        ends = {row[0]: row[-1] for row in cells}
        for name, method in errors.items():
            assert ends[name] == f"{summary[f'quality.digits_flux.{method}.output_error']:.3f}"
    slower = bench_fp8.markdown(summary | {"linears.fp8_dense.all": 9.0})
    assert "| **dense FP8** |" in slower and "**9.00x**" in slower


def test_the_page_shows_every_stored_result() -> None:
    """Of linears in 16 bits, of whole models, of blocks and of two GPUs."""
    page = (BENCH.parents[1] / "docs" / "benchmarks.md").read_text()
    gpus = (BENCH.parents[1] / "docs" / "several-gpus.md").read_text()

    def stored(name: str) -> Any:
        return json.loads((BENCH / f"nvidia-h100-80gb-hbm3-{name}.json").read_text())

    with_rank, without = stored("rank64"), stored("rank0")
    for r, r0 in zip(with_rank["results"], without["results"], strict=True):
        s = r["shape"]
        ratios = (
            r["weight_ratio"]["median"], r["steady_weight_ratio"], r["ratio"]["median"], r["steady_ratio"],
            r0["ratio"]["median"], r0["steady_ratio"], r["cusparselt_ratio"]["median"], r["steady_cusparselt_ratio"],
        )  # fmt: skip
        weight, *others = (f"{ratio:.2f}x" for ratio in ratios)
        size = f"{s['tokens']} x {s['channels']} → {s['out_channels']}"
        cells = s["model"], s["linear"], size, f"{r['dense']['median']:.0f}", f"**{weight}**", *others
        assert s["model"] == "square" or f"| {' | '.join(cells)} |" in page
    means = {**with_rank["geometric_means"], "rank 0": without["geometric_means"]["activations"]}
    assert f"| **{means['weights']:.2f}x** |" in page and f"| {means['activations']:.2f}x |" in page
    assert f"| {means['rank 0']:.2f}x |" in page
    models = [row for row in (BENCH / "nvidia-h200-model.md").read_text().splitlines() if row.startswith("|")]
    assert len(models) > 24 and "\n".join(models) in page
    for block in stored("blocks")["results"]:
        assert f"{block['block']} block {block['ratio']['median']:.2f}x" in page
    for form in stored("x2-parallel")["forms"].values():
        assert f"| {' | '.join(f'{ms:.1f}' for ms in form['graph_ms'])} |" in gpus


def test_the_readme_and_flux_page_show_the_measured_step() -> None:
    forms = json.loads((BENCH / "nvidia-h200-model.json").read_text())["flux1_dev"]["forms"]
    dense, fast = forms["bf16_dense"], forms["fp8_weight"]
    pages = [(BENCH.parents[1] / page).read_text() for page in ("README.md", "docs/flux1-dev.md")]
    gain = f"{fast['ratio']:.2f}x"
    assert (
        f"{gain} for FLUX.1-dev with random weights, {fast['ms']:.0f} ms against {dense['ms']:.0f}"
        in pages[0]
    )
    assert f"{fast['ms']:.1f} ms a step against {dense['ms']:.1f} in bf16: {gain}" in pages[1]
    for page in pages:
        assert f"{fast['peak_gib']:.1f} GiB" in page and f"{dense['peak_gib']:.1f}" in page


def test_fp8_stands_beside_the_others_in_one_table() -> None:
    measured = stored_fp8()
    first = measured.results[0]
    console = Console(width=300, file=io.StringIO())
    console.print(_fp8_table(measured))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    row = next(line for line in shown.splitlines() if "FLUX.1-dev" in line and "to_q,k,v" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    ratios, steady = first.ratios, first.steady
    assert cells[:4] == [
        "FLUX.1-dev",
        "double: to_q,k,v",
        "4096 x 3072 -> 9216",
        f"{first.microseconds['cublas_bf16']:.0f}",
    ]
    assert cells[4] == f"{ratios['torch_fp8']:.2f} / {steady['torch_fp8']:.2f}"
    assert cells[8] == f"{ratios['bf16_activation']:.2f} / {steady['bf16_activation']:.2f}"
    assert cells[12] == f"{ratios['fp8_weight.gemm']:.2f} / {steady['fp8_weight.gemm']:.2f}"
    assert cells[13:15] == [f"{ratios['fp8_weight.all']:.2f}", f"{ratios['fp8_weight.fused']:.2f}"]
    assert len([line for line in shown.splitlines() if "->" in line]) == 1 + len(measured.results)


def test_fp8_is_measured_only_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "bench", "--fp8", "-o", str(tmp_path)])
    monkeypatch.setattr(trt, "gpu", lambda: "sm86")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert (
        "The FP8 kernels run on sm89, sm90, sm120, and here is sm86. Leave out --fp8."
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_hopper_measures_all_forms_unless_a_rank_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command: what it writes is the cost table of every form."""
    ran: list[str] = []
    monkeypatch.setattr(trt, "gpu", lambda: "sm90")
    monkeypatch.setattr(bench_fp8, "bench_fp8", lambda **_: ran.append("all") or stored_fp8())
    monkeypatch.setattr(
        bench,
        "bench",
        lambda **k: (
            ran.append(f"rank {k['rank']}")
            or bench.Bench("g", "2", "bf16", False, (bench._predict(SMALL, 0),))
        ),
    )
    for options in ([], ["--rank", "0"], ["--no-fp8"]):
        monkeypatch.setattr(sys, "argv", ["lynx-compile", "bench", "-o", str(tmp_path), *options])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
    assert ran == ["all", "rank 0", "rank 64"]
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "linears.fp8_weight.gemm" in shown and bench_fp8.markdown(summary) in shown
    table = costs.CostTable.load(tmp_path / "nvidia-h200-fp8.json")
    assert table.gain(4096, 3072, 9216, costs.Form("weight", fp8=True), 0)
    assert summary["linears.fp8_weight.gemm"] == round(stored_fp8().mean("fp8_weight.gemm"), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank=8"], "multiple of 16"),
        (["--rank=144"], "multiple of 16"),
        (["--rank=-16"], "multiple of 16"),
        (["--plan", "x.engine"], "--plan is for --model"),
        (["--random-weights"], "--random-weights is for --model"),
        (["--model", "z_image", "--blocks"], "two benchmarks"),
        (["--rank=16", "--fp8"], "--rank is for 16 bits alone"),
        (["-o", "/proc/out"], "/proc/out cannot be written"),
    ],
)
def test_wrong_options_are_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "bench", *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_library_that_is_missing_or_another(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        kernels.load_library(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(InputError, match="cannot be used"):
        kernels.load_library(tmp_path / "text.so")
    libc = Path(
        subprocess.run(["g++", "-print-file-name=libm.so.6"], capture_output=True, text=True).stdout.strip()
    )
    with pytest.raises(InputError, match="cannot be used"):
        kernels.load_library(libc)


def test_tensors_are_checked_before_their_addresses_are_used() -> None:
    weight, down, bias = (
        torch.zeros(32, 64).bfloat16(),
        torch.zeros(1, 64).bfloat16(),
        torch.zeros(32).bfloat16(),
    )
    library = ctypes.CDLL(None)  # must not be reached
    with pytest.raises(InputError, match="not a contiguous CUDA tensor"):
        kernels.SparseLinear(library, weight, down, bias, rows=4)
    with pytest.raises(InputError, match=r"should be torch.bfloat16 \[32, 128\]"):
        kernels.SparseLinear(library, weight, down, bias, rows=4, rank=16)
    with pytest.raises(InputError, match="Use bf16 or fp16"):
        kernels.SparseLinear(library, weight.float(), down.float(), bias.float(), rows=4)


def test_library_of_another_interface_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "other.cpp"
    names = (
        "workspace_bytes", "weight_workspace_bytes", "holds", "tile_count", "metadata_layout", "sparse_linear",
        "prune", "pruned_gemm", "sparse_weight_linear",
    )  # fmt: skip
    source.write_text(
        "".join(f'extern "C" int lynx_{name}() {{ return 0; }}\n' for name in names)
        + 'extern "C" int lynx_abi() { return 1; }\n'
    )
    other = compile_cpp(source, tmp_path / "other.so", "-shared", "-fPIC")
    with pytest.raises(InputError, match=r"of another version: its interface is 1, and \d+ is due"):
        kernels.load_library(other)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_every_work_follows_every_other_equally_often(count: int) -> None:
    """In a fixed order, a work would always run in the state that its one neighbour leaves."""
    names = [str(i) for i in range(count)]
    rounds = list(itertools.islice(timing.orders(names), 2 * count))
    assert all(sorted(order) == names for order in rounds)
    neighbours = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert set(neighbours) == set(itertools.permutations(names, 2))
    assert set(neighbours.values()) == {2}


def test_rounds_are_timed_in_those_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None: ...

        def elapsed_time(self, stop: Event) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran: list[str] = []
    works = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    times = timing.take_turns(works, 4, 1)
    assert all(len(of_one) == 4 for of_one in times.values())
    rounds = [
        ran[3 + 4 * i : 7 + 4 * i] for i in range(4)
    ]  # behind a first call of each; one untimed ahead of each
    assert [order[1:] for order in rounds] == list(itertools.islice(timing.orders(list(works)), 4))
    assert [order[0] for order in rounds] == [order[-1] for order in rounds]


@pytest.mark.parametrize(
    ("name", "structure"),
    [("LynxSparseLinear", kernels._Call), ("LynxSparseWeightLinear", kernels._WeightCall)],
)
def test_structure_is_that_of_the_c_interface(
    tmp_path: Path, name: str, structure: type[ctypes.Structure]
) -> None:
    """Offsets of every field, by the compiler."""
    fields = [field for field, *_ in structure._fields_]
    source = tmp_path / "offsets.cpp"
    source.write_text(
        '#include "c_api.h"\n#include <cstddef>\n#include <cstdio>\nint main() {\n'
        + "".join(f'  std::printf("%zu ", offsetof({name}, {field}));\n' for field in fields)
        + f'  std::printf("%zu", sizeof({name}));\n}}\n'
    )
    program = compile_cpp(source, tmp_path / "offsets")
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert [int(value) for value in found] == [
        *(getattr(structure, field).offset for field in fields),
        ctypes.sizeof(structure),
    ]
