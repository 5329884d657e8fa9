# SPDX-License-Identifier: Apache-2.0
"""test_fp8_emulation catches faults: each deliberate one, put into a copy of the rounding pass, must fail it.

``make nightly`` compiles them: some seconds of g++ a fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import test_fp8_emulation
from .native import require_gxx
from .test_fp8_emulation import EMULATED, emulated
from .test_mutations import KERNELS, Fault

# Of its tests: bf16 with few channels, one row of many; values out of the ordinary; every producer once.
QUICK = "(definition and bfloat16 and (70-192 or 5-4112)) or (zeros and bfloat16) or (producers and 208)"

FAULTS = [
    Fault("sums before all warps have given theirs", "barrier of a token's sum", r"__syncthreads\(\);", ""),
    Fault("largest before all warps have given theirs", "barrier of the largest", r"__syncthreads\(\);", ""),
    Fault("largest of the first warp forgotten", "largest of the warps", "= 0;", "= 1;"),
    Fault("channels of the next token read", "channels of x", r"&& (\w+) < \w+\.\w+", r"&& \1 >= 0"),
    Fault("gain of another token", "gain of a token", r"/ ([\w.]+) \*", r"% \1 *"),
    Fault("largest value for largest magnitude", "magnitudes", "0x7fff7fffu", "0x7fffffffu"),
    Fault("pairs of values exchanged", "four values", r"(\w+) \| (\w+) <<", r"\2 | \1 <<"),
    Fault("tokens of half the length", "place of a token", r"[\w.]+x_stride", "args.channels"),
    Fault("gate of the first token", "gate of a token", r"(\w) \+ \w+,", r"\1,"),
    Fault("gate from the first half", "half of the gate", r"\+= [\w.]+", "+= 0"),
    Fault("inverse for the scale", "scale of a token", r"\.scale;", ".inverse;"),
    Fault("metadata of another token", "metadata of a token", r"\((\w+), (\w+),", r"(\1 ^ 1, \2,"),
    Fault("padding rows left as they are", "rows that pad", r"\? [\w.]+ :", "? args.rows :"),
    Fault("RMSNorm for LayerNorm", "mean", r"= [\w.]+ \? 0.0f :", "= true ? 0.0f :"),
    Fault("a token of zeros divides by zero", "least scale", r"\? (\w+) : \w+", r"? \1 : \1"),
    Fault("an infinity is a number", "finite", r"!\((\w+) < .*?\)\)\)", r"!(\1 == \1))"),
    Fault("metadata in the order of blocks", "place of metadata", r"\+ (\w+) % (\w+);", r"+ (\1 ^ 1) % \2;"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_has_its_place(fault: Fault) -> None:
    """A fault whose mark is gone would test nothing."""
    found = [fault.put_into(file.read_text()) for file in sorted(KERNELS.iterdir())]
    assert sum(text is not None for text in found) == 1


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What pytest says of the emulated pass, by fault; "" is no fault."""
    require_gxx()
    folder = tmp_path_factory.mktemp("mutations")

    def verdict(indexed: tuple[int, Fault | None]) -> tuple[str, str]:
        index, fault = indexed
        kernels = KERNELS if fault is None else _spoilt_kernels(fault, folder / str(index))
        return ("" if fault is None else fault.name), _run(_compiled(kernels, folder / f"{index}.so"))

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(verdict, enumerate([None, *FAULTS])))


@pytest.mark.slow
@pytest.mark.nightly
def test_the_pass_as_it_is_passes(verdicts: dict[str, str]) -> None:
    assert " passed" in verdicts[""] and " failed" not in verdicts[""]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(verdicts: dict[str, str], fault: Fault) -> None:
    assert " failed" in verdicts[fault.name] or "Fatal Python error" in verdicts[fault.name]


def _spoilt_kernels(fault: Fault, folder: Path) -> Path:
    """A copy of plugins/kernels with the fault."""
    kernels = Path(shutil.copytree(KERNELS, folder / "kernels"))
    for file in kernels.iterdir():
        if spoilt := fault.put_into(file.read_text()):
            file.write_text(spoilt)
    return kernels


def _compiled(kernels: Path, output: Path) -> Path:
    emulated(output, "-DLYNX_FP8_WGMMA_BF16", kernels=kernels)
    return output


def _run(library: Path) -> str:
    """In a process of its own, which a fault may end."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", QUICK]
    done = subprocess.run(
        [*command, str(test_fp8_emulation.__file__)],
        env=os.environ | {EMULATED: str(library)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout + done.stderr
