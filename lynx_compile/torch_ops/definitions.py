# SPDX-License-Identifier: Apache-2.0
"""What a compiled linear means, in float64, of the very tensors that it holds: what its kernels are held to."""

from __future__ import annotations

import torch
from torch import nn

from lynx_compile.ops import fp8
from lynx_compile.ops.fp8 import Rounded
from lynx_compile.ops.sparse_linear import sparse_linear
from lynx_compile.ops.sparse_weight_linear import sparse_weight_linear
from lynx_compile.torch_ops.modules import Fp8Linear, SparseActivationLinear, SparseWeightLinear

COMPILED = (SparseWeightLinear, SparseActivationLinear, Fp8Linear)


def definition(op: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """y [..., N] of one of ``COMPILED`` for x [..., K], worked out in ``dtype``."""
    assert isinstance(op, COMPILED), type(op)
    x, epilogue = x.to(dtype), op.epilogue
    acting = {"activation": epilogue.activation, "activation_from": epilogue.first}
    gated = epilogue.gated
    if isinstance(op, SparseWeightLinear):
        return sparse_weight_linear(
            x, op.values, op.metadata, op.bias, metadata_layout=op.metadata_layout, gated=gated, **acting
        )  # fmt: skip
    if isinstance(op, SparseActivationLinear):
        return sparse_linear(
            x, op.weight, op.lora_down, op.bias, rank=op.rank, norm_scale=op.norm_scale, **acting
        )
    full = op.weight if op.metadata is None else fp8.unpack(op.weight, op.metadata)
    weight = Rounded(full[: len(op.bias), : op.in_features], op.weight_scale)
    return fp8.fp8_linear(x, weight, op.bias, prune=op.operand == "sparse activation", gated=gated, **acting)
