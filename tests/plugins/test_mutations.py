# SPDX-License-Identifier: Apache-2.0
"""plugins/tests/emulation_test catches faults: each deliberate one, put into a copy of the kernels, must fail it.

``make nightly`` compiles them: some seconds of g++ a fault.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from .native import PLUGINS, require_gxx

KERNELS = PLUGINS / "kernels"
EMULATION = PLUGINS / "tests" / "emulation"
# Without the traps for undefined behaviour that CMake adds: they would double the time.
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class Fault:
    """At the comment ``// fault: MARK`` of plugins/kernels, what matches ``right`` becomes ``wrong``.

    Behind code the comment means its line, else the three lines below it. The patterns know operators and not names,
    so that renaming breaks none of them.
    """

    name: str
    mark: str
    right: str
    wrong: str

    def put_into(self, text: str) -> str | None:
        """``text`` with the fault; None where the mark is not in it, or does not hold what it should."""
        marks = re.findall(rf"^.*// fault: {re.escape(self.mark)}$", text, re.MULTILINE)
        if len(marks) != 1:
            return None
        ahead, behind = text.split(marks[0] + "\n")
        code = marks[0].split("//")[0]
        if code.strip():
            spoilt, count = re.subn(self.right, self.wrong, code, count=1)
            return None if count == 0 else f"{ahead}{spoilt}\n{behind}"
        lines = behind.splitlines(keepends=True)
        spoilt, count = re.subn(self.right, self.wrong, "".join(lines[:3]), count=1)
        return None if count == 0 else ahead + spoilt + "".join(lines[3:])


# Three of the five numbers of ranks, so that g++ is done sooner.
FEWER = [
    ("prune_kernel<Element, Metadata, 16, kVariant>", "prune_kernel<Element, Metadata, 32, kVariant>"),
    ("prune_kernel<Element, Metadata, 64, kVariant>", "prune_kernel<Element, Metadata, kMaxRank, kVariant>"),
]
BARRIER = r"__syncthreads\(\);"

FAULTS = [
    Fault("nibble swapped", "nibble", r"(\w+\.lo) \| (\w+\.hi)", r"\2 | \1"),
    Fault("kept values swapped", "kept values", r"\.lo( \+ .*)\.hi", r".hi\1.lo"),
    Fault("third largest kept", "second largest", r"= .* : (\w+);", r"= \1;"),
    Fault(
        "produced values truncated",
        "pair",
        r"uint32_t\(Element::from_float\((\w+)\)\) \| uint32_t\(Element::from_float\((\w+)\)\) << 16",
        r"float_bits(\1) >> 16 | (float_bits(\2) & 0xffff0000u)",
    ),
    Fault("half of the norm", "squares", r" \+ (\w+) \* \1;", ";"),
    Fault("T not divided by s", "U", r"\? (\w+) / \w+", r"? \1"),
    Fault("padding under nibble 0", "padding", "= 0x44444444", "= 0"),
    Fault("word address of mma.sp", "word of mma.sp", r"/ 8\) & 2", "/ 16) & 2"),
    Fault("word address of wgmma.sp", "word of wgmma.sp", r"/ 2 \*", "/ 4 *"),
    Fault("atom of another tile", "atom", r"Sm90Metadata<\w+>", "Sm90Metadata<128>"),
    Fault("rows m and m + 8 exchanged", "rows m and m + 8", r"(\w+) \| (\w+) <<", r"\2 | \1 <<"),
    Fault("address in 32 bits", "address of a tile", r"int64_t\((\S+)\) \*", r"\1 *"),
    Fault("one row too many", "last row", ">=", ">"),
    Fault("tail rows left as they are", "last row", r"return \w+\(\w+\);", "return;"),
    Fault("A read beyond its ranks", "last rank", r"\(\w+ < [\w.]+ && ", "("),
    Fault("T under another rank", "rank of T", r"\.row\)", ".quad)"),
    Fault(
        "fragments of mma in another order",
        "fragments",
        r"(\w+\[1\]\[q\]), (\w+\[0\]\[q \+ 1\])",
        r"\2, \1",
    ),
    Fault("scale of another row", "row of the scale", r"\[row\]", "[row & 7]"),
    Fault("extension's metadata of half the rows", "rows of the extension", r"& 8\)", "& 12)"),
    Fault("no barrier after the norms", "barrier of the norms", BARRIER, ""),
    Fault("no barrier between the sums of T", "barrier of T", BARRIER, ""),
    Fault("gain of another token", "row of the gain", r"\(([\w.]+) \+ row\)", r"\1"),
    Fault("rows of a team exchanged", "row of a team", r"\+ 8 \* odd", "+ 8 - 8 * odd"),
    Fault("ranks of a team's other warp", "ranks of a team", r"= (\w+)", r"= 0 * \1"),
    Fault("part of another shared tile", "shared tile", r"\+ (\w+)\)", r"+ \1 / 2)"),
    Fault("channels beyond a part", "channels of a part", r"\w+\.\w+ \+ [\w.]+,", "args.channels,"),
    Fault("sums of a part left out", "sums of the parts", "= i <", "= i > 0 && i <"),
    Fault("norms of other rows of a part", "row of a norm", r"\[row \+ ", "["),
    Fault("norm of all values for the kept", "norm of the kept", r"&(\w+)\.kept", r"&\1.all"),
    Fault("T of other rows of a part", "row of T", r"\.t \+ row \* [\w.]+ \+ i", ".t + i"),
    Fault("sums of parts overlap", "size of a part", r"\(2 \+", "(1 +"),
    Fault("no barrier before a shared tile ends", "barrier of a shared tile", BARRIER, ""),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What emulation_test prints, by fault; "" is no fault."""
    require_gxx()
    folder = tmp_path_factory.mktemp("mutations")
    _copy_kernels(folder)
    sources = [
        *(EMULATION / f"{name}.cpp" for name in ("emulation", "sparse_gemm", "prune_bf16")),
        *(KERNELS / f"{name}.cpp" for name in ("sparse_gemm", "sparse_linear")),
        PLUGINS / "tests" / "emulation_test.cpp",
    ]

    def verdict(indexed: tuple[int, Fault]) -> tuple[str, str]:
        index, fault = indexed
        copy = _copy_kernels(folder / str(index))
        ((file, spoilt),) = spoilt_files(fault, copy / "kernels")
        file.write_text(spoilt)
        recompiled = EMULATION / "prune_bf16.cpp"
        return fault.name, _run({**objects, recompiled: _compile(recompiled, copy)}, copy / "test")

    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(sources, pool.map(lambda source: _compile(source, folder), sources), strict=True))
        return {"": _run(objects, folder / "test"), **dict(pool.map(verdict, enumerate(FAULTS)))}


@pytest.mark.parametrize(("right", "wrong"), FEWER)
def test_what_is_left_out_is_there(right: str, wrong: str) -> None:
    text = (KERNELS / "prune_tokens.cuh").read_text()
    assert text.count(right) == 1 and wrong in text.replace(right, wrong)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_has_its_place(fault: Fault) -> None:
    """A fault whose mark is gone would test nothing."""
    assert len(spoilt_files(fault, KERNELS)) == 1


def test_every_mark_has_a_fault_and_pages_count_them() -> None:
    from .test_fp8_mutations import FAULTS as FP8_FAULTS  # which are made of this module's
    from .test_fp8_round_mutations import FAULTS as ROUND_FAULTS

    faults = [*FAULTS, *FP8_FAULTS, *ROUND_FAULTS]
    text = "".join(file.read_text() for file in sorted(KERNELS.iterdir()))
    assert set(re.findall("// fault: (.*)", text)) == {fault.mark for fault in faults}
    for page in ("CHANGELOG.md", "docs/status.md"):
        assert f"{len(faults)} deliberate faults" in (PLUGINS.parent / page).read_text()


@pytest.mark.slow
@pytest.mark.nightly
def test_kernels_pass(verdicts: dict[str, str]) -> None:
    assert "FAIL" not in verdicts[""] and verdicts[""].rstrip().endswith(" 0 failed")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(verdicts: dict[str, str], fault: Fault) -> None:
    assert "FAIL" in verdicts[fault.name]


def spoilt_files(fault: Fault, kernels: Path) -> list[tuple[Path, str]]:
    """The files with the fault's mark, and what it makes of them."""
    found = [(file, fault.put_into(file.read_text())) for file in sorted(kernels.iterdir())]
    return [(file, spoilt) for file, spoilt in found if spoilt is not None]


def _copy_kernels(folder: Path) -> Path:
    """plugins/kernels in ``folder``, without what FEWER leaves out, and of one element type."""
    shutil.copytree(KERNELS, folder / "kernels")
    file = folder / "kernels" / "prune_tokens.cuh"
    text = file.read_text()
    for right, wrong in FEWER:
        text = text.replace(right, wrong)
    file.write_text(text)
    (folder / "lynx_built.inc").write_text("LYNX_BUILT(MmaSp, Bf16)\nLYNX_BUILT(WgmmaSp, Bf16)\n")
    return folder


def _compile(source: Path, root: Path) -> Path:
    """``source`` with the kernels of ``root``, where the object file goes."""
    output = root / f"{source.parent.name}_{source.stem}.o"
    includes = [f"-I{path}" for path in (root, EMULATION, PLUGINS)]
    command = ["g++", *OPTIONS, *includes, "-c", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return output


def _run(objects: dict[Path, Path], program: Path) -> str:
    subprocess.run(["g++", *map(str, objects.values()), "-o", str(program)], check=True)
    done = subprocess.run([program, "--quick"], capture_output=True, text=True, timeout=300)
    assert done.returncode == ("FAIL" in done.stdout), done.stdout[-4000:] + done.stderr
    return done.stdout
