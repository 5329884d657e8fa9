# SPDX-License-Identifier: Apache-2.0
"""The emulation of the FP8 GEMMs by mma catches faults, as test_mutations.py has it for the pruning pass."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from lynx_compile.torch_ops.fp8_bindings import OPERANDS

from .native import PLUGINS
from .test_fp8_emulation import GATED, check_mma, emulated
from .test_mutations import BARRIER, Fault, spoilt_files

KERNELS = PLUGINS / "kernels"
WARP_BARRIER = r"sync_warp\(\);"

FAULTS = [
    Fault("strips of another width", "place of a block", r"(\w+) % wide\)", r"\1 % kStrip)"),
    Fault("rows read behind the last", "last row of an operand", r"\? (\w+) : \w+ - 1", r"? \1 : \1"),
    Fault("metadata of another stage", "stage of metadata", r"(\w+) % (\w+) \*", r"0 * \1 % \2 *"),
    Fault(
        "matrices of A in another order",
        "fragment of A",
        "% 16, lane / 16",
        "/ 16 * 8 + lane % 8, lane / 8 % 2",
    ),
    Fault("metadata of another row", "row of metadata", r"lane % 2 \*", "lane / 2 % 2 *"),
    Fault("metadata of other channels", "row of metadata", "% 4 / 2", "% 2"),
    Fault("B of another step", "step of B", r"\(step \*", "(0 * step *"),
    Fault("a stage is not waited for", "end of a stage", r"<(\w+) - 1>", r"<\1>"),
    Fault("no barrier between stages", "end of a stage", BARRIER, ""),
    Fault("B of other columns", "columns of B", r"\((\w+) \+ 1\) % Sh", r"\1 % Sh"),
    Fault("GELU from another channel on", "activation of a warp", ">=", ">"),
    Fault("gate of the next value", "gate of a value", r"\(i \+ 2\)", "(i + 3)"),
    Fault("pairs left apart", "place of a pair", r"kGated \? .* : ", ""),
    Fault("pairs not moved to the front", "channel of pairs", r" / 2 :", " :"),
    Fault("tokens of other rows", "token of a sum", r"\+ 8 \* i", "+ i"),
    Fault("scale of another channel", "terms of a sum", r"scale\[(\w+)\]\[\w+\]", r"scale[\1][0]"),
    Fault("bias of another channel", "terms of a sum", r"bias\[(\w+)\]\[\w+\]", r"bias[\1][0]"),
    Fault("rows written behind y", "bounds of y", r"m < [\w.]+ && ", ""),
    Fault("columns written behind those of y", "bounds of y", r" && n < [\w.]+", ""),
    Fault("tokens stored before they are there", "staged tokens", WARP_BARRIER, ""),
    Fault("tokens overwritten before they are stored", "tokens behind", WARP_BARRIER, ""),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_has_its_place(fault: Fault) -> None:
    assert len(spoilt_files(fault, KERNELS)) == 1


def _right(folder: Path, fault: Fault | None) -> bool:
    """Whether all operands' GEMMs of the largest tile in bf16 give what they should."""
    kernels = Path(shutil.copytree(KERNELS, folder / "kernels"))
    for file, spoilt in spoilt_files(fault, kernels) if fault else []:
        file.write_text(spoilt)
    options = ("-DLYNX_FP8_MMA_BF16", "-DLYNX_FP8_ONE_TILE")
    library: ctypes.CDLL = emulated(folder / "emulated.so", *options, kernels=kernels)
    for operand in OPERANDS:
        try:
            gelu = {"activation": 1, "activation_from": 192}
            check_mma(library, torch.bfloat16, operand, 0, (150, 720, 328), gelu)
            check_mma(library, torch.bfloat16, operand, 0, (150, 208, 336), GATED)
        except AssertionError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.nightly
def test_kernels_pass(tmp_path: Path) -> None:
    assert _right(tmp_path, None)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(tmp_path: Path, fault: Fault) -> None:
    assert not _right(tmp_path, fault)
