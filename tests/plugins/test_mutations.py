# SPDX-License-Identifier: Apache-2.0
"""plugins/tests/emulation_test catches faults: each deliberate one, put into a copy of the kernels, must fail it."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from .native import PLUGINS, require_gxx

pytestmark = pytest.mark.slow  # some seconds of g++ a fault

KERNELS = PLUGINS / "kernels"
EMULATION = PLUGINS / "tests" / "emulation"
# Without the traps for undefined behaviour that CMake adds: they would double the time.
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class Fault:
    """``right`` in ``file`` of plugins/kernels becomes ``wrong``."""

    name: str
    file: str
    right: str
    wrong: str


# A third of the kernels, so that g++ is done sooner: one element type, three of the five numbers of ranks.
FEWER = [
    ("launch_variant<Fp16, Metadata>(params", "launch_variant<Bf16, Metadata>(params"),
    ("prune_kernel<Element, Metadata, 16, kVariant>", "prune_kernel<Element, Metadata, 32, kVariant>"),
    ("prune_kernel<Element, Metadata, 64, kVariant>", "prune_kernel<Element, Metadata, kMaxRank, kVariant>"),
]

FAULTS = [
    Fault("nibble swapped", "sparse24.h", "return kept.lo | kept.hi << 2;", "return kept.hi | kept.lo << 2;"),
    Fault(
        "kept values swapped",
        "sparse24.h",
        "0x1010u + 0x0022u * kept.lo + 0x2200u * kept.hi",
        "0x1010u + 0x0022u * kept.hi + 0x2200u * kept.lo",
    ),
    Fault("third largest kept", "sparse24.h", "runner_up > best_low ? runner_up : best_low", "best_low"),
    Fault("tie to the higher index", "sparse24.h", "a01 = s0 >= s1", "a01 = s0 > s1"),
    Fault(
        "centre truncated",
        "sparse24.h",
        "uint32_t(Element::from_float(low)) | uint32_t(Element::from_float(high)) << 16",
        "float_bits(low) >> 16 | (float_bits(high) & 0xffff0000u)",
    ),
    Fault("half of the norm", "sparse24.h", "low * low + high * high", "low * low"),
    Fault("T not divided by s", "sparse24.h", "scale > 0.0f ? t / scale : 0.0f", "scale > 0.0f ? t : 0.0f"),
    Fault(
        "padding under nibble 0", "sparse24.h", "kEmptyMetadataPair = 0x44444444", "kEmptyMetadataPair = 0"
    ),
    Fault("word address of mma.sp", "sparse24.h", "((m / 8) & 2)", "((m / 16) & 2)"),
    Fault("word address of wgmma.sp", "sparse24.h", "kAtomWidth / 2 * k1", "kAtomWidth / 4 * k1"),
    Fault("atom of another tile", "prune.cu", "<Sm90Metadata<kAtomWidthSm90>>", "<Sm90Metadata<128>>"),
    Fault("rows m and m + 8 exchanged", "prune.cu", "= low | high << 16;", "= high | low << 16;"),
    Fault(
        "one row too many", "prune.cu", "if (row >= tile.rows || channel", "if (row > tile.rows || channel"
    ),
    Fault(
        "tail rows left as they are",
        "prune.cu",
        "channel >= args.channels) return clear_block(z);",
        "channel >= args.channels) return;",
    ),
    Fault("A read beyond its ranks", "prune.cu", "if (rank < args.rank && channel", "if (channel"),
    Fault("T under another rank", "prune.cu", "unsigned((rank + lane.row)", "unsigned((rank + lane.quad)"),
    Fault(
        "fragments of mma in another order",
        "prune.cu",
        "z[0][q], z[1][q], z[0][q + 1], z[1][q + 1]",
        "z[0][q], z[0][q + 1], z[1][q], z[1][q + 1]",
    ),
    Fault("scale of another row", "prune.cu", "= sums.scale[row];", "= sums.scale[row & 7];"),
    Fault(
        "extension's metadata of half the rows",
        "prune.cu",
        "if (((first_row + row) & 8) == 0) {",
        "if (((first_row + row) & 12) == 0) {",
    ),
    Fault(
        "no barrier after the norms",
        "prune.cu",
        "shared.norm[lane.warp][i * 8 + lane.row] = sum;\n  }\n  __syncthreads();",
        "shared.norm[lane.warp][i * 8 + lane.row] = sum;\n  }",
    ),
    Fault(
        "no barrier between the sums of T",
        "prune.cu",
        "sums[i] += slot[i * 32];\n    }\n    __syncthreads();",
        "sums[i] += slot[i * 32];\n    }",
    ),
    Fault(
        "gain of another token", "prune.cu", "int((tile.first_row + row) / args", "int(tile.first_row / args"
    ),
    Fault("rows of a team exchanged", "prune.cu", "lane.row + 8 * odd", "lane.row + 8 - 8 * odd"),
    Fault(
        "ranks of a team's other warp", "prune.cu", "first_rank = lane.warp %", "first_rank = 0 * lane.warp %"
    ),
    Fault(
        "part of another shared tile", "prune.cu", "(grid.whole + shared) *", "(grid.whole + shared / 2) *"
    ),
    Fault("channels beyond a part", "prune.cu", "tile.begin + args.part_channels,", "args.channels,"),
    Fault("sums of a part left out", "prune.cu", "[i] = i < parts", "[i] = i > 0 && i < parts"),
    Fault(
        "norms of other rows of a part", "prune.cu", "part.norm[row + threadIdx.x]", "part.norm[threadIdx.x]"
    ),
    Fault("norm of all values for the kept", "prune.cu", "sum_of_parts(&norm.kept", "sum_of_parts(&norm.all"),
    Fault("T of other rows of a part", "prune.cu", "part.t + row * args.rank + i", "part.t + i"),
    Fault("sums of parts overlap", "prune.cu", "kRows * (2 + args.rank)", "kRows * (1 + args.rank)"),
    Fault(
        "no barrier before a shared tile ends",
        "prune.cu",
        "stride, args.grid.parts);\n    }\n    __syncthreads();",
        "stride, args.grid.parts);\n    }",
    ),
    Fault(
        "one row too many reordered",
        "reorder.cu",
        "int(min(int64_t(block_rows), rows - first_row))",
        "block_rows",
    ),
    Fault(
        "no barrier before the rows are dealt",
        "reorder.cu",
        "__ldg(from + i);\n  __syncthreads();",
        "__ldg(from + i);",
    ),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What emulation_test prints, by fault; "" is no fault."""
    require_gxx()
    folder = tmp_path_factory.mktemp("mutations")
    _copy_kernels(folder)
    sources = [
        *(EMULATION / f"{name}.cpp" for name in ("emulation", "sparse_gemm", "prune", "reorder")),
        *(KERNELS / f"{name}.cpp" for name in ("sparse_gemm", "sparse_linear")),
        PLUGINS / "tests" / "emulation_test.cpp",
    ]

    def verdict(indexed: tuple[int, Fault]) -> tuple[str, str]:
        index, fault = indexed
        copy = _copy_kernels(folder / str(index))
        file = copy / "kernels" / fault.file
        file.write_text(file.read_text().replace(fault.right, fault.wrong))
        recompiled = EMULATION / ("reorder.cpp" if fault.file == "reorder.cu" else "prune.cpp")
        return fault.name, _run({**objects, recompiled: _compile(recompiled, copy)}, copy / "test")

    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(sources, pool.map(lambda source: _compile(source, folder), sources), strict=True))
        return {"": _run(objects, folder / "test"), **dict(pool.map(verdict, enumerate(FAULTS)))}


@pytest.mark.parametrize(("right", "wrong"), FEWER)
def test_what_is_left_out_is_there(right: str, wrong: str) -> None:
    text = (KERNELS / "prune.cu").read_text()
    assert text.count(right) == 1 and wrong in text.replace(right, wrong)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_where_it_is_expected(fault: Fault) -> None:
    """A fault whose text is gone would test nothing."""
    assert (KERNELS / fault.file).read_text().count(fault.right) == 1


def test_kernels_pass(verdicts: dict[str, str]) -> None:
    assert "FAIL" not in verdicts[""] and verdicts[""].rstrip().endswith(" 0 failed")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(verdicts: dict[str, str], fault: Fault) -> None:
    assert "FAIL" in verdicts[fault.name]


def _copy_kernels(folder: Path) -> Path:
    """plugins/kernels in ``folder``, without what FEWER leaves out."""
    shutil.copytree(KERNELS, folder / "kernels")
    file = folder / "kernels" / "prune.cu"
    text = file.read_text()
    for right, wrong in FEWER:
        text = text.replace(right, wrong)
    file.write_text(text)
    return folder


def _compile(source: Path, root: Path) -> Path:
    """``source`` with the kernels of ``root``, where the object file goes."""
    output = root / f"{source.parent.name}_{source.stem}.o"
    includes = [f"-I{path}" for path in (root, EMULATION, PLUGINS)]
    defines = ("-DLYNX_SM80_BF16", "-DLYNX_SM80_FP16", "-DLYNX_SM90_BF16", "-DLYNX_SM90_FP16")
    command = ["g++", *OPTIONS, *defines, *includes, "-c", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return output


def _run(objects: dict[Path, Path], program: Path) -> str:
    subprocess.run(["g++", *map(str, objects.values()), "-o", str(program)], check=True)
    done = subprocess.run([program, "--quick"], capture_output=True, text=True, timeout=300)
    assert done.returncode == ("FAIL" in done.stdout), done.stdout[-4000:] + done.stderr
    return done.stdout
