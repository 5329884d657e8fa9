# SPDX-License-Identifier: Apache-2.0
"""What 2:4 weight sparsity means here: the definition that every other implementation is tested against.

The op ``LynxSparseWeightLinear`` (domain ``lynx``, version 1)::

    y = act(x W^T + bias)

W [N, K] has 2 of every 4 neighbouring input channels; act is as in ``sparse_linear``. It may be gated: then rows of W
come in runs of 16 from activation_from on, and act(row i) * (row i + 8), i < 8, is one output channel.

W comes compressed, as the tensor cores read it: ``values`` [Np, K / 2], the kept values in channel order, Np being N
in whole steps of 64 with zero rows at the end; and ``metadata``, int32 [K / 64, Np / 64, 128], which says where they
stand. Of a block of 16 channels, group q has bits 4 q to 4 q + 3: ``lo | hi << 2``, the two kept positions, lo < hi.
One word holds the blocks of rows m (lower half, m % 16 < 8) and m + 8. The words' order is the GPU's
(``metadata_layout``): 80 for ``mma.sp``, 90 for Hopper's ``wgmma.sp`` with atoms 64 channels wide.

The ONNX function (``functions``) and the addresses in ``plugins/kernels/sparse24.h`` say the same.
"""

from __future__ import annotations

from typing import Literal

import torch

from lynx_compile.ops.sparse_linear import GATED_RUN, GROUP, KEPT, activate, keep_mask

MetadataLayout = Literal[80, 90]
STEP = 64  # K and the rows of ``values`` come in whole steps of it
BLOCK = 16  # channels
NIBBLES = (1, 16, 256, 4096)  # weights of the groups' nibbles in a block's 16 bits


def sparse_weight_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor,
    *,
    metadata_layout: MetadataLayout,
    activation: int = 0,
    activation_from: int = 0,
    gated: bool = False,
) -> torch.Tensor:
    """``LynxSparseWeightLinear`` in torch, any floating dtype, on any device; accumulates in float32 or better.

    Args:
        x: [..., K]. values: [Np, K / 2]. metadata: int32 [K / 64, Np / 64, 128]. bias: [N].
        activation: 0 none, or one of ``ACTIVATIONS``, for the rows of W from ``activation_from`` on.
        gated: whether the activated rows have gates: an output channel for two.

    Returns:
        y [..., N] in x's dtype, where gated [..., activation_from + (N - activation_from) / 2].
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = unpack_weight(values, metadata, metadata_layout)[: len(bias)]
    product = x.to(accumulate) @ weight.to(accumulate).T
    return activate(product + bias.to(accumulate), activation, activation_from, gated).to(x.dtype)


def pack_weight(
    weight: torch.Tensor, keep: torch.Tensor, layout: MetadataLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` and ``metadata`` of W [N, K], any dtype; keep: bool [N, K], exactly 2 of every 4."""
    return pack_values(weight, keep), pack_metadata(keep, layout)


def pack_values(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """``values`` alone."""
    a, b, c, d = weight.unflatten(-1, (-1, GROUP)).unbind(-1)
    first, second, third, fourth = keep.unflatten(-1, (-1, GROUP)).unbind(-1)
    low = torch.where(first, a, torch.where(second, b, c))
    high = torch.where(fourth, d, torch.where(third, c, b))
    kept = torch.stack((low, high), -1).flatten(-2)
    return torch.nn.functional.pad(kept, (0, 0, 0, -len(weight) % STEP))


def pack_metadata(keep: torch.Tensor, layout: MetadataLayout) -> torch.Tensor:
    """``metadata`` alone."""
    padding, channels = -len(keep) % STEP, keep.shape[1]
    empty = keep_mask(torch.zeros(padding, channels, device=keep.device))  # the first two of every group
    nibbles = kept_positions(torch.cat((keep, empty))).unflatten(-1, (-1, BLOCK // GROUP))
    blocks = sum(part.long() * weight for part, weight in zip(nibbles.unbind(-1), NIBBLES, strict=True))
    assert isinstance(blocks, torch.Tensor), "[Np, K / 16]"
    return _lay_out(blocks, layout)


def kept_positions(keep: torch.Tensor) -> torch.Tensor:
    """A nibble, ``lo | hi << 2``, for every group of keep [N, K], in bytes: uint8 [N, K / 4]."""
    first, second, third, fourth = keep.unflatten(-1, (-1, GROUP)).unbind(-1)
    low = (~first).byte() + ~(first | second)
    high = 1 + (third | fourth).byte() + fourth
    return low + GROUP * high


def gated_order(rows: int, x: int, gate: int, channels: int) -> list[int]:
    """The order of ``rows`` rows that a gated op wants: those left alone, then in turns 8 to activate and 8 gates.

    x, gate: the first of the ``channels`` rows to activate, and of those that multiply them.
    """
    turn = GATED_RUN // 2
    pairs = {*range(x, x + channels), *range(gate, gate + channels)}
    behind = [
        start + first + row
        for first in range(0, channels, turn)
        for start in (x, gate)
        for row in range(turn)
    ]
    return [row for row in range(rows) if row not in pairs] + behind


def unpack_weight(values: torch.Tensor, metadata: torch.Tensor, layout: MetadataLayout) -> torch.Tensor:
    """W [Np, K] out of the op's inputs; undoes ``pack_weight``, but for its padding."""
    blocks = _take_out(metadata, layout)  # [Np, K / 16]
    nibbles = (blocks[..., None] // torch.tensor(NIBBLES, device=blocks.device) % 16).flatten(-2)
    positions = torch.stack((nibbles % GROUP, nibbles // GROUP), -1)  # [Np, K / 4, 2]
    weight = values.new_zeros(*nibbles.shape, GROUP)
    return weight.scatter(-1, positions, values.unflatten(-1, (-1, KEPT))).flatten(-2)


def relaid(metadata: torch.Tensor, layout: MetadataLayout, wanted: MetadataLayout) -> torch.Tensor:
    """``metadata`` that lie in one layout, in another."""
    return _lay_out(_take_out(metadata, layout), wanted)


def _lay_out(blocks: torch.Tensor, layout: MetadataLayout) -> torch.Tensor:
    """The metadata of 16-channel blocks [Np, K / 16] as words in the layout's order: int32 [K / 64, Np / 64, 128]."""
    rows, width = blocks.shape
    low, high = blocks.reshape(-1, 2, 8, width).unbind(1)  # rows m and m + 8: [Np / 16, 8, K / 16]
    words = low + high * 2**16
    words = torch.where(words < 2**31, words, words - 2**32).int()
    if layout == 80:  # [Np / 32, (m / 16) % 2, m % 8, K / 32, block % 2]
        words = words.reshape(-1, 2, 8, width // 2, 2).permute(3, 0, 2, 1, 4)
    else:  # [Np / 64, (m / 16) % 4, m % 8, K / 64, (k / 32) % 2, (k / 16) % 2]
        words = words.reshape(-1, 4, 8, width // 4, 2, 2).permute(3, 0, 1, 5, 2, 4)
    return words.reshape(width * BLOCK // STEP, rows // STEP, 2 * STEP)


def _take_out(metadata: torch.Tensor, layout: MetadataLayout) -> torch.Tensor:
    """Undoes ``_lay_out``: int64 [Np, K / 16]."""
    steps, row_steps, _ = metadata.shape
    rows, width = row_steps * STEP, steps * STEP // BLOCK
    if layout == 80:
        words = metadata.reshape(width // 2, rows // 32, 8, 2, 2).permute(1, 3, 2, 0, 4)
    else:
        words = metadata.reshape(width // 4, rows // 64, 4, 2, 8, 2).permute(1, 2, 4, 0, 5, 3)
    words = words.reshape(rows // 16, 8, width).long()
    return torch.stack((words % 2**16, words // 2**16 % 2**16), 1).reshape(rows, width)
