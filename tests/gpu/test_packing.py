# SPDX-License-Identifier: Apache-2.0
"""Weights that ``rewrite`` packs on the GPU have the bytes that a CPU packs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lynx_compile.ops.fp8 import pack_dense, pack_kept, pack_positions, round_rows, to_words
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.ops.sparse_weight_linear import pack_metadata, pack_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "packed",
    [
        lambda w: to_words(pack_kept(round_rows(w).values, keep_mask(round_rows(w).values))),
        lambda w: pack_positions(keep_mask(round_rows(w).values)),
        lambda w: to_words(pack_dense(round_rows(w).values)),
        lambda w: pack_values(w.bfloat16(), keep_mask(w)),
        lambda w: pack_metadata(keep_mask(w), 80),
        lambda w: pack_metadata(keep_mask(w), 90),
    ],
    ids=["fp8 values", "fp8 metadata", "fp8 dense", "values", "metadata 80", "metadata 90"],
)
def test_packed_on_a_gpu_and_on_a_cpu(packed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(192, 320)
    assert torch.equal(packed(weight.cuda()).cpu(), packed(weight))
