# SPDX-License-Identifier: Apache-2.0
"""What FP8 nodes of a rewritten graph hold: weights packed from what ``compensate`` rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lynx_compile.files.tensors import TensorSpec
from lynx_compile.models.place import device_type
from lynx_compile.ops.fp8 import E4M3, ROW_STEP, STEP, pack_dense, pack_kept, pack_positions, to_words
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.passes.compensate import stored_weight

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
        part: str, kind: torch.dtype, shape: tuple[int, ...], read: Callable[[], torch.Tensor]
    ) -> TensorSpec:
        return TensorSpec(f"{name}.{part}", kind, shape, read)

    def weight() -> torch.Tensor:
        stored = stored_weight(file, "weight").to(device_type())  # where packing takes no time
        return stored.view(torch.uint8)[rows].view(E4M3)  # torch indexes no e4m3

    if sparse:
        padded = -(-out_channels // ROW_STEP) * ROW_STEP
        packed = [
            spec("values", torch.int32, (padded, width // 2 // WORD), lambda: _values(weight())),
            spec(
                "metadata",
                torch.int32,
                (width // STEP, padded, 4),
                lambda: pack_positions(keep_mask(weight())),
            ),
        ]
    else:
        shape = (out_channels, width // WORD)
        packed = [spec("weight", torch.int32, shape, lambda: to_words(pack_dense(weight())))]
    return [
        *packed,
        spec(
            "weight_scale", torch.float32, (out_channels,), lambda: stored_weight(file, "weight_scale")[rows]
        ),
        spec("bias", dtype, (out_channels,), lambda: stored_weight(file, "bias")[rows].to(dtype)),
    ]


def _values(weight: torch.Tensor) -> torch.Tensor:
    return to_words(pack_kept(weight, keep_mask(weight)))
