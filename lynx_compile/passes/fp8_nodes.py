# SPDX-License-Identifier: Apache-2.0
"""What FP8 nodes of a rewritten graph hold: weights packed from what ``compensate`` rounded."""

from __future__ import annotations

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

    def weight() -> torch.Tensor:
        stored = stored_weight(file, "weight").to(device_type())  # where packing takes no time
        return stored.view(torch.uint8)[rows].view(E4M3)  # torch indexes no e4m3

    def values() -> torch.Tensor:
        kept = weight()
        return to_words(pack_kept(kept, keep_mask(kept)))

    def metadata() -> torch.Tensor:
        return pack_positions(keep_mask(weight()))

    def dense() -> torch.Tensor:
        return to_words(pack_dense(weight()))

    if sparse:
        padded = -(-out_channels // ROW_STEP) * ROW_STEP
        packed = [
            TensorSpec(f"{name}.values", torch.int32, (padded, width // 2 // WORD), values),
            TensorSpec(f"{name}.metadata", torch.int32, (width // STEP, padded, 4), metadata),
        ]
    else:
        packed = [TensorSpec(f"{name}.weight", torch.int32, (out_channels, width // WORD), dense)]
    return [
        *packed,
        TensorSpec(
            f"{name}.weight_scale",
            torch.float32,
            (out_channels,),
            lambda: stored_weight(file, "weight_scale")[rows],
        ),
        TensorSpec(
            f"{name}.bias", dtype, (out_channels,), lambda: stored_weight(file, "bias")[rows].to(dtype)
        ),
    ]
