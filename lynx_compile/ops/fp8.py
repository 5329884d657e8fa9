# SPDX-License-Identifier: Apache-2.0
"""What FP8 linears mean here: the definition that every other implementation is tested against.

::

    y = act(s_x s_w (x_q W_qᵀ) + bias)

act is as in ``sparse_weight_linear``, gated or not. x_q is x [tokens, K] rounded to e4m3 (4 exponent, 3 mantissa bits,
largest 448, no infinity) with one scale a token; W_q the weight [N, K] with one scale a row. Either may be 2:4, that
is, keep 2 of every 4 neighbouring channels: a weight at compile time, activations by their magnitude
(``sparse_linear.keep_mask``), before rounding.

A token's scale is s_x = max |x| / 448, so that its largest value becomes 448. A token whose values are all below 2⁻¹⁰⁰,
zeros too, has the scale of 2⁻¹⁰⁰; of one with an infinity or a NaN the scale and all values, and so all outputs, are
NaN. In float32, step by step, since kernels repeat it bit for bit::

    inverse = 448 / max(max |x|, 2⁻¹⁰⁰)      s_x = max(max |x|, 2⁻¹⁰⁰) / 448      x_q = e4m3(x inverse)

What is 2:4 comes packed, as the tensor cores read it: ``values`` [rows, K' / 2] in channel order, and ``metadata``,
int32 [K' / 128, rows, 4]: a word has the nibbles ``lo | hi << 2`` of 8 groups, the first in its lowest bits, lo < hi
being the two kept positions. K' is K in whole steps of 128, rows in whole steps of 64; behind them are zeros, which
keep positions 0 and 1. ``plugins/kernels/fp8.h`` says the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from lynx_compile.ops.sparse_linear import GROUP, KEPT, activate, keep_mask
from lynx_compile.ops.sparse_weight_linear import kept_positions, pack_values

E4M3 = torch.float8_e4m3fn
HALVES = (torch.bfloat16, torch.float16)
LARGEST = 448.0
LEAST = 2.0**-100
STEP = 128  # channels: K' comes in whole steps of it
ROW_STEP = 64  # of what is 2:4
WORD = 32  # channels that share a word of metadata


@dataclass(frozen=True)
class Rounded:
    """``values`` [rows, K] e4m3 and ``scale`` [rows] float32: values times scale is what was rounded."""

    values: torch.Tensor
    scale: torch.Tensor

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[rows, K] in ``dtype``."""
        return self.values.to(dtype) * self.scale.to(dtype)[:, None]


def fp8_linear(
    x: torch.Tensor,
    weight: Rounded,
    bias: torch.Tensor,
    *,
    prune: bool = False,
    activation: int = 0,
    activation_from: int = 0,
    gated: bool = False,
) -> torch.Tensor:
    """The op in torch, on any device; multiplies in float64 for x in float64, else in float32.

    Args:
        x: [..., K]. weight: W_q [N, K]. bias: [N]. prune: keep 2 of 4 of x.
        activation: 0 none, or one of ``ACTIVATIONS``, for the rows of W from ``activation_from`` on.
        gated: whether the activated rows have gates: an output channel for two. Without, the activation is a GELU.

    Returns:
        y [..., N] in x's dtype, where gated [..., activation_from + (N - activation_from) / 2].
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens = x.reshape(-1, x.shape[-1])
    rounded = round_rows(tokens, keep_mask(tokens) if prune else None)
    product = rounded.values.to(accumulate) @ weight.values.to(accumulate).T
    scaled = product * rounded.scale.to(accumulate)[:, None] * weight.scale.to(accumulate)
    y = activate(scaled + bias.to(accumulate), activation, activation_from, gated)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def round_rows(tensor: torch.Tensor, keep: torch.Tensor | None = None) -> Rounded:
    """``tensor`` [rows, K] with a scale a row: x [tokens, K] or W [N, K]; what ``keep`` [rows, K] drops becomes 0."""
    values = tensor if tensor.dtype in HALVES else tensor.float()  # products with float32 are float32
    largest = values.abs().amax(-1).float()
    bounded = largest.clamp_min(LEAST)
    finite = largest.isfinite()  # false for a NaN too, which amax hands on
    nan, limit = torch.full_like(largest, float("nan")), torch.full_like(largest, LARGEST)
    scale = torch.where(
        finite, bounded / limit, nan
    )  # of two tensors: torch divides by a number through its inverse
    inverse = torch.where(finite, limit / bounded, nan)
    if keep is not None:
        values = torch.where(keep, values, 0.0)
    return Rounded(to_e4m3(values * inverse[:, None]), scale)


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest e4m3, ties to even; beyond 448 is 448, a NaN stays one."""
    return values.float().clamp(-LARGEST, LARGEST).to(E4M3)


def pack_dense(weight: torch.Tensor) -> torch.Tensor:
    """W_q [N, K] as the GEMM reads it: [N, K'], zeros behind K."""
    return _pad(weight, 0, -weight.shape[1] % STEP)


def pack(weight: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` and ``metadata`` of W_q [N, K] e4m3; keep: bool [N, K], exactly 2 of every 4."""
    return pack_kept(weight, keep), pack_positions(keep)


def pack_kept(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """``values`` alone."""
    padded = _pad(weight, -weight.shape[0] % ROW_STEP, -weight.shape[1] % STEP)
    return pack_values(padded.view(torch.uint8), _padded(keep)).view(E4M3)


def pack_positions(keep: torch.Tensor) -> torch.Tensor:
    """``metadata`` alone."""
    nibbles = kept_positions(_padded(keep))  # [Np, K' / 4]
    words = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(torch.int32)  # [Np, K' / 32]
    return words.unflatten(-1, (-1, STEP // WORD)).transpose(0, 1).contiguous()


def _padded(keep: torch.Tensor) -> torch.Tensor:
    """[Np, K']; padding keeps positions 0 and 1."""
    keep = functional.pad(keep, (0, -keep.shape[1] % STEP, 0, -keep.shape[0] % ROW_STEP))
    keep[..., ::GROUP] |= ~keep.unflatten(-1, (-1, GROUP)).any(-1)
    keep[..., 1::GROUP] |= keep.unflatten(-1, (-1, GROUP)).sum(-1) < KEPT
    return keep


def to_words(values: torch.Tensor) -> torch.Tensor:
    """e4m3 [rows, columns] as int32 [rows, columns / 4], the first of four in the lowest bits."""
    return values.contiguous().view(torch.int32)


def unpack(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """W_q [Np, K'] e4m3 out of its packed form; undoes ``pack``, but for its padding."""
    words = metadata.transpose(0, 1).flatten(1).long()  # [Np, K' / 32]
    nibbles = (words[..., None] >> 4 * torch.arange(WORD // GROUP, device=words.device) & 15).flatten(1)
    positions = torch.stack((nibbles % GROUP, nibbles // GROUP), -1)  # [Np, K' / 4, 2]
    weight = torch.zeros(*nibbles.shape, GROUP, dtype=torch.uint8, device=values.device)
    kept = values.view(torch.uint8).unflatten(-1, (-1, KEPT))
    return weight.scatter(-1, positions, kept).flatten(1).view(E4M3)


def _pad(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """With zeros at the ends; through bytes, since torch pads no e4m3."""
    return functional.pad(weight.view(torch.uint8), (0, columns, 0, rows)).view(E4M3)
