# SPDX-License-Identifier: Apache-2.0
"""Linears whose weights are compiled: torch modules around ``operators``, for any number of tokens.

Their tensors follow a module from device to device, and keep their dtypes whatever it is cast to: packed weights are
bits, and what rounds them has been decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lynx_compile.ops.fp8 import STEP, round_rows
from lynx_compile.ops.sparse_weight_linear import MetadataLayout, relaid
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.epilogue import NO_EPILOGUE, Epilogue
from lynx_compile.torch_ops.fp8_bindings import Operand


class _Packed(nn.Module):
    """What all of them share: their sizes, and that a cast leaves them alone.

    ``out_features``: channels of y, fewer than the weight has rows where the epilogue has gates.
    """

    def __init__(self, in_features: int, rows: int, epilogue: Epilogue) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, epilogue.width(rows)
        self.epilogue = epilogue

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., N] for x [..., K]."""
        return self.rows(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)

    def parts(self, x: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """y's channels in parts of ``sizes``."""
        return list(self(x).split(list(sizes), -1))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """y [M, N] for x [M, K]."""
        raise NotImplementedError

    def _hold(self, **tensors: torch.Tensor | None) -> None:
        """As parameters that are not trained: diffusers' group offload with a stream leaves buffers on the GPU.

        The first is of the model's dtype, which diffusers takes for that of the whole module.
        """
        for name, tensor in tensors.items():
            held = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, held)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class SparseWeightLinear(_Packed):
    """x against a 2:4 weight in 16 bits. The tensors are those of ``ops.sparse_weight_linear``."""

    values: torch.Tensor
    metadata: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        values: torch.Tensor,
        metadata: torch.Tensor,
        bias: torch.Tensor,
        *,
        metadata_layout: MetadataLayout,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> None:
        super().__init__(2 * values.shape[1], len(bias), epilogue)
        self.metadata_layout = metadata_layout
        self._hold(bias=bias, values=values, metadata=metadata)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """On a GPU the metadata lie as its kernels read them."""
        super()._apply(fn, recurse)
        if (
            self.metadata.is_cuda
            and (layout := operators.metadata_layout(self.values.dtype)) != self.metadata_layout
        ):
            self.metadata.data = relaid(self.metadata, self.metadata_layout, layout)
            self.metadata_layout = layout
        return self

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        epilogue = self.epilogue
        y: torch.Tensor = operators.sparse_weight(
            x, self.values, self.metadata, self.bias, self.metadata_layout,
            epilogue.activation, epilogue.first, epilogue.gated,
        )  # fmt: skip
        return y


class SparseActivationLinear(_Packed):
    """Pruned x against a compensated weight in 16 bits. The tensors are those of ``ops.sparse_linear``."""

    weight: torch.Tensor
    lora_down: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        lora_down: torch.Tensor,
        bias: torch.Tensor,
        *,
        rank: int,
        norm_scale: bool,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> None:
        super().__init__(lora_down.shape[1], len(bias), epilogue)
        self.rank, self.norm_scale = rank, norm_scale
        self._hold(bias=bias, weight=weight, lora_down=lora_down)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = operators.sparse_activation(
            x, self.weight, self.lora_down, self.bias, self.rank, self.norm_scale,
            self.epilogue.gelu_from(len(self.bias)),
            "none", None, None, None, False, 0.0,
        )  # fmt: skip
        return y


class Fp8Linear(_Packed):
    """x and weight in FP8. The tensors are those that the GEMM reads (``ops.fp8``): e4m3 values and float32 scales.

    Under ``torch.compile`` the rounding of x is torch's own, which the compiler fuses with what makes x (a norm and its
    modulation, a concatenation); elsewhere it is our pass. ``fused_rounding``: no leaves it to our pass there too.
    An activation behind is the kernel's in any case: a compiler would work it out twice, for the maximum and for the
    values.
    """

    weight: torch.Tensor
    metadata: torch.Tensor | None
    weight_scale: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        metadata: torch.Tensor | None,
        weight_scale: torch.Tensor,
        bias: torch.Tensor,
        *,
        in_features: int,
        operand: Operand,
        epilogue: Epilogue = NO_EPILOGUE,
        fused_rounding: bool = True,
    ) -> None:
        super().__init__(in_features, len(bias), epilogue)
        self.operand = operand
        self.fused_rounding = fused_rounding and operand != "sparse activation" and in_features % STEP == 0
        self._hold(bias=bias, weight=weight, metadata=metadata, weight_scale=weight_scale)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        acting = self.epilogue.activation, self.epilogue.first, self.epilogue.gated
        if not (self.fused_rounding and torch.compiler.is_compiling()):
            y: torch.Tensor = operators.fp8_linear(
                x, self.weight, self.metadata, self.weight_scale, self.bias, self.operand, *acting,
                "none", None, None, False, 0.0,
            )  # fmt: skip
            return y
        rounded = round_rows(x)
        product: torch.Tensor = operators.fp8_product(
            rounded.values,
            rounded.scale,
            self.weight,
            self.metadata,
            self.weight_scale,
            self.bias,
            *acting,
        )
        return product
