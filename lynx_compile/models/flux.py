# SPDX-License-Identifier: Apache-2.0
"""FLUX (``diffusers.FluxTransformer2DModel``): its inputs and its denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from lynx_compile.engine.arguments import Structure
from lynx_compile.engine.manifest import Call
from lynx_compile.models.calls import call_of

MODEL = FluxTransformer2DModel
PACKING = 2  # a token packs 2 x 2 latents
Velocity = Callable[..., torch.Tensor]


def example_inputs(
    config: Mapping[str, Any], batch: int, rows: int, columns: int, text_length: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random inputs for an image of ``rows`` x ``columns`` tokens, keyed as ``forward`` names them."""
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, rows * columns, config["in_channels"], generator=random)
    text = torch.randn(batch, text_length, config["joint_attention_dim"], generator=random)
    pooled = torch.randn(batch, config["pooled_projection_dim"], generator=random)
    inputs = {
        "hidden_states": latents.to(dtype),
        "encoder_hidden_states": text.to(dtype),
        "pooled_projections": pooled.to(dtype),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image_ids(rows, columns),
        "txt_ids": torch.zeros(text_length, 3),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def call(inputs: Mapping[str, torch.Tensor]) -> Call:
    """How a pipeline calls the transformer; its one result is called velocity in the graph."""
    output = f"{Transformer2DModelOutput.__module__}:{Transformer2DModelOutput.__qualname__}"
    result: Structure = {"dataclass": output, "fields": [["sample", {"tensor": "velocity"}]]}
    return call_of(f"{MODEL.__module__}:{MODEL.__qualname__}", MODEL.forward, inputs, result)


def denoise(
    transformer: Velocity,
    scheduler: Any,
    latents: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Run the flow-matching loop of diffusers' ``FluxPipeline`` on packed latents.

    Args:
        transformer: called with keyword tensors, returns the velocity [batch, tokens, channels].
        scheduler: the checkpoint's own ``FlowMatchEulerDiscreteScheduler``; dynamic shifting is honoured.
        latents: noise [batch, image tokens, channels].
        conditioning: every other input of the transformer but ``hidden_states`` and ``timestep``.
        steps: number of denoising steps.

    Returns:
        The denoised latents, same shape and dtype as ``latents``.
    """
    sigmas = torch.linspace(1.0, 1.0 / steps, steps).tolist()
    shift = (
        {"mu": resolution_shift(scheduler, latents.shape[1])} if scheduler.config.use_dynamic_shifting else {}
    )
    scheduler.set_timesteps(sigmas=sigmas, device=latents.device, **shift)
    for timestep in scheduler.timesteps:
        # The pipeline hands the transformer t in [0, 1]; the scheduler counts in thousandths.
        fraction = (timestep / scheduler.config.num_train_timesteps).float().expand(latents.shape[0])
        velocity = transformer(hidden_states=latents, timestep=fraction, **conditioning)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def unpack(latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tokens of 2 x 2 latents back in their places: [n, rows * columns, 4 C] to [n, C, 2 rows, 2 columns]."""
    patches = latents.unflatten(1, (rows, columns)).unflatten(3, (-1, PACKING, PACKING))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def resolution_shift(scheduler: Any, image_tokens: int) -> float:
    """Timestep shift ``mu`` for an image of so many tokens: linear between the scheduler's two anchors."""
    c = scheduler.config
    slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    return float(c.base_shift + slope * (image_tokens - c.base_image_seq_len))


def image_ids(rows: int, columns: int) -> torch.Tensor:
    """Position ids of an image's latent patches for RoPE: [rows * columns, 3], float32, (0, row, column)."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3)


def encode_prompts(
    source: str, revision: str | None, prompts: list[str], text_length: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Run the checkpoint's own text encoders (CLIP and T5): one row per prompt of the transformer's two inputs."""
    from diffusers import FluxPipeline  # pulls in transformers, which nothing else here needs

    pipeline = FluxPipeline.from_pretrained(
        source, revision=revision, transformer=None, vae=None, torch_dtype=dtype, use_safetensors=True
    )
    if torch.cuda.is_available():
        pipeline = pipeline.to("cuda")
    text, pooled = [], []
    with torch.inference_mode():
        for prompt in prompts:  # one at a time: the T5 encoder is larger than its activations should be
            rows = pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=text_length)
            text.append(rows[0].cpu())
            pooled.append(rows[1].cpu())
    return {"encoder_hidden_states": torch.cat(text), "pooled_projections": torch.cat(pooled)}
