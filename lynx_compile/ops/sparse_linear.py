# SPDX-License-Identifier: Apache-2.0
"""What 2:4 activation sparsity means here: the definition that every other implementation is tested against.

The op ``LynxSparseLinear`` (domain ``lynx``, version 1), for a token x of K channels::

    keep  = per group of 4 channels of x, the 2 with the largest |x_k|; ties keep the lower index
    x~    = x where kept, 0 elsewhere
    s     = 1, or with norm_scale sqrt(|x|^2 / (|x~|^2 + 1e-8))        (RT-Lynx, section 3: norm compensation)
    y     = act(s * (x~ W'^T) + (x A^T) B^T + b')
    act   = from output channel activation_from on: nothing, or one of ``ACTIVATIONS``

is computed as one product, ``y = act(s * ([x~ | T / s] [W' | B]^T) + b')`` with ``T = x A^T``, so that the low-rank
branch rides in the sparse GEMM (``expand_low_rank``). The ONNX function (``functions``) and the CUDA code
(``plugins/kernels/sparse24.h``) say the same.

Three more ops make their x themselves (``produce``), so that it is never written: ``LynxNormSparseLinear``,
``LynxGeluSparseLinear`` and ``LynxGatedSparseLinear``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

GROUP = 4
KEPT = 2
NORM_EPSILON = 1e-8
WIDTH_MULTIPLE = 64  # the sparse GEMM wants its K in whole steps of 64
GATED_RUN = 16  # output channels that a gated activation makes 8 of: those to activate, then their gates

GELU_TANH, GELU_ERF, SILU = 1, 2, 3  # the ops' activation; 0 is none
ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    GELU_TANH: partial(torch.nn.functional.gelu, approximate="tanh"),
    GELU_ERF: torch.nn.functional.gelu,
    SILU: torch.nn.functional.silu,
}
APART, X_FIRST, GATE_FIRST = 0, 1, 2  # where x and its gate lie: in tensors of their own, or in halves of one


@dataclass(frozen=True)
class Norm:
    """Producer: norm(x) * gain + shift. gain, shift: [..., K], each row for as many consecutive tokens."""

    gain: torch.Tensor
    shift: torch.Tensor
    rms: bool = False
    epsilon: float = 1e-6


@dataclass(frozen=True)
class Gelu:
    """Producer: gelu(x)."""

    activation: int = GELU_TANH


@dataclass(frozen=True)
class Gated:
    """Producer: activation(x) * gate. gate: x's shape.

    Of ``X_FIRST`` both have 2 K channels, and x is the first half of its own, the gate the second half of its own; of
    ``GATE_FIRST`` it is the other way round. As a rule both are then one tensor.
    """

    gate: torch.Tensor
    activation: int = SILU
    halves: int = APART


def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_down: torch.Tensor,
    bias: torch.Tensor,
    *,
    rank: int = 0,
    norm_scale: bool = False,
    activation: int = 0,
    activation_from: int = 0,
) -> torch.Tensor:
    """``LynxSparseLinear`` in torch, any floating dtype, on any device; accumulates in float32 or better.

    Args:
        x: [..., K].
        weight: [N, padded_width(K, rank)], as ``expand_low_rank`` makes it.
        lora_down: A [max(rank, 1), K]; not read when ``rank`` is 0.
        bias: [N].
        rank: r of the low-rank branch.
        norm_scale: whether s is the norm scale (else 1).
        activation: 0 none, or a GELU, for the output channels from ``activation_from`` on.

    Returns:
        y [..., N] in x's dtype.
    """
    channels = x.shape[-1]
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    keep = keep_mask(x)
    kept = torch.where(keep, x, torch.zeros_like(x)).to(accumulate)
    scale = norm_scale_of(x, keep) if norm_scale else torch.ones_like(kept[..., :1], dtype=torch.float32)
    scale = scale.to(accumulate)
    product = kept @ weight[:, :channels].to(accumulate).T
    if rank:
        low = x.to(accumulate) @ lora_down.to(accumulate).T
        low = torch.where(scale > 0, low / scale, torch.zeros_like(low)).to(x.dtype)
        product = product + low.to(accumulate) @ collapse_low_rank(weight, channels, rank).to(accumulate).T
    return activate(scale * product + bias.to(accumulate), activation, activation_from).to(x.dtype)


def produce(x: torch.Tensor, producer: Norm | Gelu | Gated) -> torch.Tensor:
    """What an op with a fused producer prunes, [..., K]: in float32 or better, rounded once to x's dtype.

    x: [..., K], or [..., 2 K] where it is but a half.

    LayerNorm and RMSNorm go over the channels and have no weights of their own; the variance is that of a population.
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if isinstance(producer, Gelu):
        return ACTIVATIONS[producer.activation](wide).to(x.dtype)
    if isinstance(producer, Gated):
        gate = producer.gate.to(wide.dtype)
        if producer.halves:
            x_half = producer.halves - X_FIRST
            wide, gate = wide.chunk(2, -1)[x_half], gate.chunk(2, -1)[1 - x_half]
        return (ACTIVATIONS[producer.activation](wide) * gate).to(x.dtype)
    centred = wide if producer.rms else wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + producer.epsilon).sqrt()
    gain, shift = (t.to(wide.dtype).reshape(-1, 1, x.shape[-1]) for t in (producer.gain, producer.shift))
    return (normed.reshape(len(gain), -1, x.shape[-1]) * gain + shift).reshape(x.shape).to(x.dtype)


def activate(y: torch.Tensor, activation: int, activation_from: int, gated: bool = False) -> torch.Tensor:
    """y [..., N] with its channels from ``activation_from`` on activated; 0 leaves them as they are.

    gated: of each run of 16 of them 8 remain, the first 8 activated, times the other 8.
    """
    if not activation:
        return y
    plain, behind = y.tensor_split((activation_from,), -1)
    if not gated:
        return torch.cat((plain, ACTIVATIONS[activation](behind)), -1)
    activated, gate = behind.unflatten(-1, (-1, 2, GATED_RUN // 2)).unbind(-2)
    return torch.cat((plain, (ACTIVATIONS[activation](activated) * gate).flatten(-2)), -1)


def keep_mask(z: torch.Tensor, saliency: torch.Tensor | None = None) -> torch.Tensor:
    """Which channels of z [..., K] are kept: bool [..., K], exactly 2 of every 4.

    Scores are compared in float32 by their bits, so that a NaN outranks everything and is never hidden.
    """
    score = z.float().abs()
    if saliency is not None:
        score = (score * saliency.float()).abs()
    bits = score.view(torch.int32).unflatten(-1, (-1, GROUP))  # sign bit clear: integers order like floats
    a, b, c, d = bits.unbind(-1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d  # who goes before whom
    kept = (_most(ab, ac, ad), _most(~ab, bc, bd), _most(~ac, ~bc, cd), _most(~ad, ~bd, ~cd))
    return torch.stack(kept, -1).flatten(-2)


def _most(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> torch.Tensor:
    """Where at least two of three are true."""
    return first & second | third & (first | second)


def norm_scale_of(z: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Per-token norm scale s: float32 [..., 1]; sums in float64, ratio and root in float32."""
    squares = z.double().square()
    kept = torch.where(keep, squares, 0.0).sum(-1, keepdim=True)
    return scale_of_norms(squares.sum(-1, keepdim=True).float(), kept.float())


def scale_of_norms(whole: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """s from squared norms of the token and of what is kept of it, float32, each operation rounded exactly."""
    ratio = whole / (kept + NORM_EPSILON)
    return torch.sqrt(ratio.double()).float()  # torch's float32 root is a unit off at times


def padded_width(channels: int, rank: int) -> int:
    """Columns of the op's weight input: K + 2 r rounded up to whole GEMM steps."""
    return -(-(channels + 2 * rank) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def expand_low_rank(weight: torch.Tensor, lora_up: torch.Tensor) -> torch.Tensor:
    """The op's weight input from W' [N, K] and B [N, r]: [N, padded_width(K, r)].

    B's columns stand pairwise at positions 0 and 1 of groups of 4, where the compressed operand holds T / s
    under the fixed metadata nibble of a group that keeps its first two.
    """
    out_channels, channels = weight.shape
    rank = lora_up.shape[1]
    wide = weight.new_zeros(out_channels, padded_width(channels, rank))
    wide[:, :channels] = weight
    pairs = wide[:, channels : channels + 2 * rank].unflatten(-1, (rank // KEPT, GROUP))
    pairs[..., :KEPT] = lora_up.unflatten(-1, (rank // KEPT, KEPT))
    return wide


def collapse_low_rank(weight: torch.Tensor, channels: int, rank: int) -> torch.Tensor:
    """B [N, r] out of the op's weight input; undoes ``expand_low_rank``."""
    pairs = weight[:, channels : channels + 2 * rank].unflatten(-1, (rank // KEPT, GROUP))
    return pairs[..., :KEPT].flatten(-2)
