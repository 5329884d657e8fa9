# SPDX-License-Identifier: Apache-2.0
"""What ``lynx-compile bench`` does without a GPU, and how the kernels are called. tests/gpu measures for real."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lynx_compile import bench, cli, kernels
from lynx_compile.errors import InputError

from .plugins.native import compile_cpp

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
    plain, ranked = bench.predict(SMALL, 0), bench.predict(SMALL, 64)
    assert plain.gemm.median < ranked.gemm.median and plain.ratio > ranked.ratio
    assert plain.whole.median == pytest.approx(plain.prune.median + plain.gemm.median)
    assert plain.prune.median == pytest.approx(4096 * 3072 * 3.125 / bench.ROOFLINE_BYTES * 1e6)


def test_geometric_mean_leaves_the_square_shapes_out() -> None:
    square = bench.predict(bench.Shape("square", "x", 64, 64, 64), 0)
    one = bench.predict(SMALL, 0)
    both = bench.Bench("gpu", "2", "bf16", True, (one, square))
    assert both.geometric_mean == pytest.approx(one.ratio) and square.ratio != one.ratio


@pytest.mark.parametrize("rank", ["8", "144", "-16"])
def test_wrong_rank_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "bench", f"--rank={rank}"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "multiple of 16" in capsys.readouterr().err


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


def test_structure_is_that_of_the_c_interface(tmp_path: Path) -> None:
    """Offsets of every field, by the compiler."""
    fields = [name for name, *_ in kernels._Call._fields_]
    source = tmp_path / "offsets.cpp"
    source.write_text(
        '#include "c_api.h"\n#include <cstddef>\n#include <cstdio>\nint main() {\n'
        + "".join(f'  std::printf("%zu ", offsetof(LynxSparseLinear, {name}));\n' for name in fields)
        + '  std::printf("%zu", sizeof(LynxSparseLinear));\n}\n'
    )
    program = compile_cpp(source, tmp_path / "offsets")
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert [int(value) for value in found] == [
        *(getattr(kernels._Call, name).offset for name in fields),
        ctypes.sizeof(kernels._Call),
    ]
