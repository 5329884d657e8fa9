# SPDX-License-Identifier: Apache-2.0
"""A transformer of which one denoising step is measured, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lynx_compile.recipe import Sparsity


@dataclass(frozen=True)
class StepModel:
    """``name``: in the results. ``weights``: "random weights", or where they are from. ``size``: of the call, in words.

    ``build``: makes the module in ``dtype`` on a device; on meta without weights. ``step``: makes the arguments of a
    step there. ``sparsity`` and ``gpus``: what the plan goes by; the GPU that is here comes before ``gpus``.
    """

    name: str
    class_name: str
    weights: str
    size: str
    dtype: torch.dtype
    sparsity: Sparsity
    gpus: tuple[str, ...]
    build: Callable[[str], nn.Module]
    step: Callable[[str], dict[str, Any]]

    @property
    def what(self) -> str:
        """For people: what the figures are of."""
        return f"{self.size}, {self.weights}"


def with_random_weights(module: nn.Module, device: str) -> nn.Module:
    """Weights on ``device`` that keep a signal's size; what the module computed itself is moved there."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                value = (
                    torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.to(device)
                )
                if generator is not None:
                    _draw(value, name, generator, parameter.is_meta)
                part._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = (
                    torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                )
    return module.eval()


@torch.no_grad()
def _draw(value: torch.Tensor, name: str, generator: torch.Generator, empty: bool) -> None:
    if value.ndim > 1:
        value.normal_(0, value.shape[-1] ** -0.5, generator=generator)
    elif name == "bias":
        value.normal_(0, 0.02, generator=generator)
    elif empty:
        value.fill_(1)  # the scale of a norm


def turn_in_real_numbers() -> None:
    """Have diffusers' Qwen-Image turn its queries and keys so, in every form alike.

    torch's compiler has no complex numbers and would leave them to kernels of their own.
    """
    from diffusers.models.transformers import transformer_qwenimage

    transformer_qwenimage.apply_rotary_emb_qwen = turned  # type: ignore[assignment]


def turned(x: torch.Tensor, freqs_cis: torch.Tensor, use_real: bool = True) -> torch.Tensor:
    """x [B, tokens, heads, D], each pair of channels as a complex number times freqs_cis [tokens, D / 2]."""
    assert not use_real, "it is called with complex frequencies"
    cos, sin = torch.view_as_real(freqs_cis)[:, None].unbind(-1)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return pairs.flatten(3).type_as(x)
