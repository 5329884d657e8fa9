# SPDX-License-Identifier: Apache-2.0
"""The transformers that whole models are measured on: at full size, by their public ``config.json``, random weights.

One call is a denoising step for a picture of 1024x1024 pixels and a batch of one, where a recipe asks for no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lynx_compile.errors import InputError
from lynx_compile.recipe import Sparsity
from lynx_compile.tools.step_model import StepModel, turn_in_real_numbers, with_random_weights

RANDOM = "random weights"
PATCH = 16  # pixels to a token, and to two latent rows or columns


@dataclass(frozen=True)
class Size:
    """Of a call: ``rows`` and ``columns`` of image tokens, ``text`` tokens, ``batch``."""

    rows: int = 64
    columns: int = 64
    text: int = 512
    batch: int = 1

    @classmethod
    def of_call(cls, call: Mapping[str, Any], batch: int) -> Size:
        """By the arguments of a pipeline's call."""
        rows, columns = (int(call.get(name) or 1024) // PATCH for name in ("height", "width"))
        return cls(rows, columns, int(call.get("max_sequence_length") or 512), batch)

    @property
    def words(self) -> str:
        return (
            f"{self.columns * PATCH}x{self.rows * PATCH} pixels, {self.text} text tokens, batch {self.batch}"
        )


@dataclass(frozen=True)
class _Draw:
    """Inputs of a call on a device."""

    device: str
    size: Size
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *size: int) -> torch.Tensor:
        drawn = torch.randn(*size, generator=self.generator, device=self.device)
        return drawn.to(self.dtype)

    def full(self, value: float) -> torch.Tensor:
        return torch.full((self.size.batch,), value, device=self.device, dtype=self.dtype)

    def image(self, channels: int) -> torch.Tensor:
        return self.normal(self.size.batch, self.size.rows * self.size.columns, channels)

    def text(self, channels: int) -> torch.Tensor:
        return self.normal(self.size.batch, self.size.text, channels)

    def positions(self, axes: int) -> torch.Tensor:
        """Of the image tokens: row and column on axes 1 and 2."""
        ids = torch.zeros(self.size.rows, self.size.columns, axes, device=self.device)
        ids[..., 1] = torch.arange(self.size.rows, device=self.device)[:, None]
        ids[..., 2] = torch.arange(self.size.columns, device=self.device)
        return ids.flatten(0, 1)


Config = dict[str, Any]


def _flux(config: Config, draw: _Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.image(config.get("in_channels", 64)),
        "encoder_hidden_states": draw.text(config.get("joint_attention_dim", 4096)),
        "pooled_projections": draw.normal(draw.size.batch, config.get("pooled_projection_dim", 768)),
        "timestep": draw.full(0.5),
        "guidance": draw.full(3.5),
        "img_ids": draw.positions(3),
        "txt_ids": torch.zeros(draw.size.text, 3, device=draw.device),
    }


def _flux2(config: Config, draw: _Draw) -> dict[str, Any]:
    text = torch.zeros(draw.size.text, 4, device=draw.device)
    text[:, 3] = torch.arange(draw.size.text, device=text.device)
    return {
        "hidden_states": draw.image(config.get("in_channels", 128)),
        "encoder_hidden_states": draw.text(config["joint_attention_dim"]),
        "timestep": draw.full(0.5),
        "img_ids": draw.positions(4),
        "txt_ids": text,
    }


def _qwen_image(config: Config, draw: _Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.image(config.get("in_channels", 64)),
        "encoder_hidden_states": draw.text(config.get("joint_attention_dim", 3584)),
        "timestep": draw.full(0.5),
        "img_shapes": [[(1, draw.size.rows, draw.size.columns)]] * draw.size.batch,
    }


def _z_image(config: Config, draw: _Draw) -> dict[str, Any]:
    size, batch = draw.size, range(draw.size.batch)
    channels = config.get("in_channels", 16)
    return {
        "x": [draw.normal(channels, 1, 2 * size.rows, 2 * size.columns) for _ in batch],
        "t": draw.full(0.5),
        "cap_feats": [draw.normal(size.text, config.get("cap_feat_dim", 2560)) for _ in batch],
    }


@dataclass(frozen=True)
class FullSize:
    """``class_name``: of diffusers. ``config``: what differs from its defaults. ``call``: arguments of a step.

    ``sources``: hub ids of checkpoints of this size.
    """

    name: str
    class_name: str
    config: Config
    call: Callable[[Config, _Draw], dict[str, Any]]
    sources: tuple[str, ...] = ()
    size: Size = field(default_factory=Size)


MODELS = (
    FullSize(
        "flux1_dev", "FluxTransformer2DModel", {"guidance_embeds": True}, _flux,
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev"),
    ),
    FullSize(
        "qwen_image", "QwenImageTransformer2DModel", {}, _qwen_image, ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512")
    ),
    FullSize(
        "z_image", "ZImageTransformer2DModel", {}, _z_image, ("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image")
    ),
    FullSize(  # klein of 9 B parameters
        "flux2_klein", "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
         "guidance_embeds": False},
        _flux2,
        ("black-forest-labs/FLUX.2-klein-9B", "black-forest-labs/FLUX.2-klein-base-9B"),
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
    raise InputError(f"There is no model {name!r} to measure.", f"Give one of {names}, or a recipe (YAML).")


def of_source(source: str) -> FullSize | None:
    """That of a checkpoint on the hub; None where its size is not known."""
    return next((model for model in MODELS if source in model.sources), None)


def step_model(
    model: FullSize,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    sparsity: Sparsity | None = None,
    gpus: tuple[str, ...] = ("sm90",),
) -> StepModel:
    """The model with random weights, under ``name`` in the results."""
    return StepModel(
        name=name or model.name,
        class_name=model.class_name,
        weights=RANDOM,
        size=model.size.words,
        dtype=dtype,
        sparsity=sparsity or Sparsity(),
        gpus=gpus,
        build=partial(_build, model, dtype),
        step=partial(_step, model, dtype),
    )


def _build(model: FullSize, dtype: torch.dtype, device: str) -> nn.Module:
    """The transformer, made on ``device`` itself."""
    import diffusers  # seconds, and only here

    turn_in_real_numbers()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module: nn.Module = getattr(diffusers, model.class_name)(**model.config)
    finally:
        torch.set_default_dtype(default)
    return with_random_weights(module, device)


def step(model: FullSize, device: str, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Arguments of one step, ``return_dict`` left out."""
    generator = torch.Generator(device).manual_seed(seed)
    return model.call(model.config, _Draw(device, model.size, dtype, generator))


def _step(model: FullSize, dtype: torch.dtype, device: str) -> dict[str, Any]:
    return step(model, device, dtype=dtype)
