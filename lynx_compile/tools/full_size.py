# SPDX-License-Identifier: Apache-2.0
"""The transformers that whole models are measured on: at full size, by their public ``config.json``, random weights.

One call is a denoising step for a picture of 1024x1024 pixels and a batch of one. Qwen-Image turns its queries and keys
in real numbers here, in every form alike: torch's compiler has no complex ones and would leave them to kernels of their
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lynx_compile.errors import InputError

TEXT_TOKENS = 512
LATENT = 128  # rows and columns of the latent picture; its patches are 2 x 2
SIDE = LATENT // 2  # rows and columns of image tokens


@dataclass(frozen=True)
class FullSize:
    """``class_name``: of diffusers. ``config``: what differs from its defaults. ``call``: arguments of a step."""

    name: str
    class_name: str
    config: dict[str, Any]
    call: Callable[[dict[str, Any], Callable[..., torch.Tensor]], dict[str, Any]]


def _flux(config: dict[str, Any], normal: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": normal(1, SIDE**2, config.get("in_channels", 64)),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, config.get("joint_attention_dim", 4096)),
        "pooled_projections": normal(1, config.get("pooled_projection_dim", 768)),
        "timestep": _timestep(normal),
        "guidance": torch.full_like(_timestep(normal), 3.5),
        "img_ids": _positions(normal, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=_device(normal)),
    }


def _flux2(config: dict[str, Any], normal: Callable[..., torch.Tensor]) -> dict[str, Any]:
    text = torch.zeros(TEXT_TOKENS, 4, device=_device(normal))
    text[:, 3] = torch.arange(TEXT_TOKENS, device=text.device)
    return {
        "hidden_states": normal(1, SIDE**2, config.get("in_channels", 128)),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, config["joint_attention_dim"]),
        "timestep": _timestep(normal),
        "img_ids": _positions(normal, 4),
        "txt_ids": text,
    }


def _qwen_image(config: dict[str, Any], normal: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": normal(1, SIDE**2, config.get("in_channels", 64)),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, config.get("joint_attention_dim", 3584)),
        "timestep": _timestep(normal),
        "img_shapes": [[(1, SIDE, SIDE)]],
    }


def _z_image(config: dict[str, Any], normal: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "x": [normal(config.get("in_channels", 16), 1, LATENT, LATENT)],
        "t": _timestep(normal),
        "cap_feats": [normal(TEXT_TOKENS, config.get("cap_feat_dim", 2560))],
    }


MODELS = (
    FullSize("flux1_dev", "FluxTransformer2DModel", {"guidance_embeds": True}, _flux),
    FullSize("qwen_image", "QwenImageTransformer2DModel", {}, _qwen_image),
    FullSize("z_image", "ZImageTransformer2DModel", {}, _z_image),
    FullSize(  # klein of 9 B parameters
        "flux2_klein", "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
         "guidance_embeds": False},
        _flux2,
    ),
)  # fmt: skip


def find(name: str) -> FullSize:
    """The model of that name.

    Raises:
        InputError: there is none.
    """
    for model in MODELS:
        if model.name == name:
            return model
    names = ", ".join(model.name for model in MODELS)
    raise InputError(f"There is no model {name!r} to measure.", f"Give one of {names}.")


def build(model: FullSize, device: str) -> nn.Module:
    """The transformer in bf16 with random weights, made on ``device`` itself."""
    import diffusers  # seconds, and only here

    _turn_in_real_numbers()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            module: nn.Module = getattr(diffusers, model.class_name)(**model.config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02, generator=generator)
    return module.eval().requires_grad_(False)


def step(model: FullSize, device: str) -> dict[str, Any]:
    """Arguments of one step, ``return_dict`` left out."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).bfloat16()

    return model.call(model.config, normal)


def _turn_in_real_numbers() -> None:
    """Have diffusers' Qwen-Image do so."""
    from diffusers.models.transformers import transformer_qwenimage

    transformer_qwenimage.apply_rotary_emb_qwen = turned  # type: ignore[assignment]


def turned(x: torch.Tensor, freqs_cis: torch.Tensor, use_real: bool = True) -> torch.Tensor:
    """x [B, tokens, heads, D], each pair of channels as a complex number times freqs_cis [tokens, D / 2]."""
    assert not use_real, "it is called with complex frequencies"
    cos, sin = torch.view_as_real(freqs_cis)[:, None].unbind(-1)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return pairs.flatten(3).type_as(x)


def _timestep(normal: Callable[..., torch.Tensor]) -> torch.Tensor:
    return torch.full_like(normal(1), 0.5)


def _device(normal: Callable[..., torch.Tensor]) -> torch.device:
    return normal(1).device


def _positions(normal: Callable[..., torch.Tensor], axes: int) -> torch.Tensor:
    """Of the image tokens: row and column on axes 1 and 2."""
    device = _device(normal)
    ids = torch.zeros(SIDE, SIDE, axes, device=device)
    ids[..., 1] = torch.arange(SIDE, device=device)[:, None]
    ids[..., 2] = torch.arange(SIDE, device=device)
    return ids.flatten(0, 1)
