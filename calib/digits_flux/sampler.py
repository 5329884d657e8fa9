# SPDX-License-Identifier: Apache-2.0
"""Draw digits from any model of this shape, dense, sparse or an engine: same code, same seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image

from calib.digits_flux import digits

Velocity = Callable[..., torch.Tensor]
MODEL = digits.HERE / "model"
LINE = 0.4  # brightness of the lines of a contact sheet


def sample(
    transformer: Velocity,
    labels: torch.Tensor,
    seed: int,
    steps: int,
    conditioning: Mapping[str, torch.Tensor] | None = None,
    batch: int = 100,
) -> torch.Tensor:
    """Draw one image per label.

    Args:
        transformer: called with keyword tensors hidden_states [b, 64, 4], timestep [b] in [0, 1],
            encoder_hidden_states [b, 8, 64], pooled_projections [b, 64], img_ids [64, 3], txt_ids [8, 3], all
            float32 on the CPU; returns the velocity [b, 64, 4]. ``dense`` makes one of a diffusers model.
        labels: digits [n], int64.
        seed: the noise of image i depends on ``seed`` and i alone.
        steps: denoising steps.
        conditioning: a row per class, as ``digits.load_conditioning`` returns; that one by default.
        batch: images per call of ``transformer``; changes nothing but speed and rounding. An engine of fixed
            batch wants len(labels) to be a multiple of it.

    Returns:
        Images [n, 16, 16] float32, in [0, 1] up to the model's overshoot; not clipped.
    """
    prompts = digits.load_conditioning() if conditioning is None else conditioning
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL / "scheduler")
    own = {name: rows[labels] for name, rows in prompts.items()}
    return in_batches(
        transformer, scheduler, noise(seed, len(labels)), own, position_ids(prompts), steps, batch
    )


def in_batches(
    transformer: Velocity,
    scheduler: Any,
    latents: torch.Tensor,
    own: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
    steps: int,
    batch: int,
) -> torch.Tensor:
    """Images [n, 16, 16] of packed ``latents`` [n, 64, 4], ``batch`` a call; ``own``: inputs with a row per image."""
    denoised = []
    with torch.inference_mode():
        for rows in torch.split(torch.arange(len(latents)), batch):
            inputs = {name: value[rows] for name, value in own.items()} | dict(shared)
            denoised.append(denoise(transformer, scheduler, latents[rows], inputs, steps))
    return digits.unpack(torch.cat(denoised))


def denoise(
    transformer: Velocity,
    scheduler: Any,
    latents: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """The loop of diffusers' ``FluxPipeline`` on packed latents [batch, image tokens, channels], no dynamic shift."""
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / steps, steps).tolist(), device=latents.device)
    for timestep in scheduler.timesteps:
        # The pipeline hands the transformer t in [0, 1]; the scheduler counts in thousandths.
        fraction = (timestep / scheduler.config.num_train_timesteps).float().expand(latents.shape[0])
        velocity = transformer(hidden_states=latents, timestep=fraction, **conditioning)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def noise(seed: int, count: int) -> torch.Tensor:
    """Gaussian latents [count, 64, 4] float32, each image from a generator of its own."""
    shape = (digits.SIDE**2, digits.PATCH**2)
    drawn = [np.random.default_rng([seed, i]).standard_normal(shape, np.float32) for i in range(count)]
    return torch.from_numpy(np.stack(drawn))


def position_ids(prompts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """RoPE positions of the image and text tokens, as FLUX numbers them."""
    text_tokens = prompts["encoder_hidden_states"].shape[1]
    return {"img_ids": image_ids(digits.SIDE, digits.SIDE), "txt_ids": torch.zeros(text_tokens, 3)}


def image_ids(rows: int, columns: int) -> torch.Tensor:
    """Position ids of an image's patches for RoPE: [rows * columns, 3] float32, (0, row, column)."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3)


def load_model(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """The trained transformer; its weights are stored as fp16."""
    folder = MODEL / "transformer"
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False).eval()


def dense(model: FluxTransformer2DModel) -> Velocity:
    """``model`` as ``sample`` calls it: inputs cast to its dtype, the velocity back to float32."""

    def velocity(**inputs: torch.Tensor) -> torch.Tensor:
        kept = {k: inputs.pop(k) for k in ("timestep", "img_ids", "txt_ids")}  # cast inside the model
        cast = {k: v.to(model.dtype) for k, v in inputs.items()}
        output: torch.Tensor = model(**cast, **kept, return_dict=False)[0]
        return output.float()

    return velocity


def contact_sheet(images: torch.Tensor, columns: int, path: Path, magnify: int = 4) -> None:
    """Write images [n, 16, 16] as one grey PNG, ``columns`` a row, each pixel ``magnify`` pixels wide."""
    rows = -(-len(images) // columns)
    cell = digits.SIZE + 1  # a grey line below and to the right of each image
    sheet = torch.full((rows * columns, cell, cell), LINE)
    sheet[: len(images), : digits.SIZE, : digits.SIZE] = images.clamp(0, 1)
    grid = sheet.reshape(rows, columns, cell, cell).transpose(1, 2).flatten(2).flatten(0, 1)
    picture = Image.fromarray((grid * 255).round().to(torch.uint8).numpy())
    picture.resize((picture.width * magnify, picture.height * magnify), Image.Resampling.NEAREST).save(path)
