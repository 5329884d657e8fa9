# SPDX-License-Identifier: Apache-2.0
"""What the rewriter writes of FP8 is what the kernels read: rounding pass on the CPU, behind it CUTLASS's stand-in."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from lynx_compile.recipe import NodeOperand
from tests.passes.test_rewrite_fp8 import OPERANDS

from .fp8_nodes import assert_equal, by_function, by_kernels, feed_of, nodes_of
from .test_fp8_emulation import library

__all__ = ["library"]  # the fixture

pytestmark = pytest.mark.slow  # g++


@pytest.mark.parametrize("operand", OPERANDS)
def test_nodes_of_a_file_run_alike_by_function_and_by_kernels(
    library: ctypes.CDLL,
    operand: NodeOperand,
    tmp_path: Path,
) -> None:
    library.lynx_emulate(90, 0)
    seen = set()
    for node, tensors in nodes_of(operand, tmp_path):
        torch.manual_seed(1)
        feed = feed_of(node, tensors)
        assert_equal(node, by_kernels(library, node, feed), by_function(node, feed))
        seen.add(node.op_type)
    assert len(seen) == 4
