# SPDX-License-Identifier: Apache-2.0
"""What FP8 nodes of a rewritten graph hold: weights packed from what ``compensate`` rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lynx_compile.files.tensors import TensorSpec
from lynx_compile.ops.fp8 import E4M3, ROW_STEP, STEP, pack_dense, pack_kept, pack_positions, to_words
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.passes.compensate import SparseLinearWeights, load_weights

WORD = 4  # values


def fp8_tensors(
    name: str, rows: list[int], in_channels: int, file: Path, dtype: torch.dtype, *, sparse: bool
) -> list[TensorSpec]:
    """The inputs of node ``name`` behind x, in their order; read from ``file`` only when they are written.

    Args:
        rows: of the weights in ``file``, in the node's order. sparse: whether the weight is 2:4.
        dtype: of the bias.
    """
    out_channels, width = len(rows), -(-in_channels // STEP) * STEP

    def spec(
        part: str, kind: torch.dtype, shape: tuple[int, ...], read: Callable[..., torch.Tensor]
    ) -> TensorSpec:
        return TensorSpec(f"{name}.{part}", kind, shape, lambda: read(load_weights(file)))

    if sparse:
        padded = -(-out_channels // ROW_STEP) * ROW_STEP
        weight = [
            spec(
                "values",
                torch.int32,
                (padded, width // 2 // WORD),
                lambda solved: _values(_weight(solved, rows)),
            ),
            spec(
                "metadata",
                torch.int32,
                (width // STEP, padded, 4),
                lambda solved: pack_positions(keep_mask(_weight(solved, rows))),
            ),
        ]
    else:
        shape = (out_channels, width // WORD)
        weight = [
            spec("weight", torch.int32, shape, lambda solved: to_words(pack_dense(_weight(solved, rows))))
        ]
    return [
        *weight,
        spec("weight_scale", torch.float32, (out_channels,), lambda solved: solved.weight_scale[rows]),
        spec("bias", dtype, (out_channels,), lambda solved: solved.bias[rows].to(dtype)),
    ]


def _weight(solved: SparseLinearWeights, rows: list[int]) -> torch.Tensor:
    return solved.weight.view(torch.uint8)[rows].view(E4M3)  # torch indexes no e4m3


def _values(weight: torch.Tensor) -> torch.Tensor:
    return to_words(pack_kept(weight, keep_mask(weight)))
