# SPDX-License-Identifier: Apache-2.0
"""What the rewriter writes of FP8 is what the kernels read, on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lynx_compile.recipe import NodeOperand
from lynx_compile.torch_ops.bindings import LIBRARY
from lynx_compile.torch_ops.fp8_bindings import load_fp8_library
from tests.passes.test_rewrite_fp8 import OPERANDS
from tests.plugins.fp8_nodes import assert_equal, by_function, by_kernels, feed_of, nodes_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FP8 kernels"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="needs the plugin library: make plugin"),
]


@pytest.mark.parametrize("operand", OPERANDS)
def test_nodes_of_a_file_run_alike_by_function_and_by_kernels(operand: NodeOperand, tmp_path: Path) -> None:
    library = load_fp8_library()
    if not library.lynx_fp8_runs(1):
        pytest.skip("needs a GPU with FP8 kernels, and a library with them for fp16")
    for node, tensors in nodes_of(operand, tmp_path):
        torch.manual_seed(1)
        feed = feed_of(node, tensors)
        on_gpu = {name: value.cuda() for name, value in feed.items()}
        y = by_kernels(library, node, on_gpu, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        assert_equal(node, y, by_function(node, feed))
