# SPDX-License-Identifier: Apache-2.0
"""Draw emoji from any model of this shape, dense, sparse or an engine: same code, same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image

from calib.digits_flux.sampler import Velocity, denoise, dense, image_ids
from calib.emoji_flux import data, text

HERE = Path(__file__).parent
MODEL = HERE / "model"
WORDS = "words.safetensors"  # in the model's folder
GUIDANCE = 2.0
STEPS = 20
LINE = 0.8  # brightness of the lines of a contact sheet


def sample(
    transformer: Velocity,
    prompts: Mapping[str, torch.Tensor],
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 64,
) -> torch.Tensor:
    """Draw one image per prompt.

    Args:
        transformer: called with keyword tensors hidden_states [b, 256, 12], timestep [b] in [0, 1],
            encoder_hidden_states [b, 12, 64], pooled_projections [b, 64], img_ids [256, 3], txt_ids [12, 3], all
            float32 and where ``prompts`` are; returns the velocity [b, 256, 12].
        prompts: rows of ``encoder_hidden_states`` and ``pooled_projections``, as ``WordTable.encode`` makes them.
        seed: the noise of image i depends on ``seed`` and i alone.
        guidance: of classifier-free guidance; at 1 the model is called without it.
        batch: images per call of ``transformer``.

    Returns:
        Images [n, 3, 32, 32] float32 on the CPU, in [0, 1] up to the model's overshoot; not clipped.
    """
    device = prompts["encoder_hidden_states"].device
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    count = len(prompts["encoder_hidden_states"])
    latents = noise(seed, count).to(device)
    ids = {name: value.to(device) for name, value in position_ids().items()}
    drawn = []
    with torch.inference_mode():
        for rows in torch.split(torch.arange(count, device=device), batch):
            inputs = {k: v[rows].float() for k, v in prompts.items()} | ids
            drawn.append(
                denoise(guided(transformer, guidance), scheduler, latents[rows], inputs, steps).cpu()
            )
    return data.unpack(torch.cat(drawn))


def guided(transformer: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance against the prompt of no words, as ``FluxPipeline`` with ``true_cfg_scale``."""
    if guidance == 1:
        return transformer

    def velocity(**inputs: torch.Tensor) -> torch.Tensor:
        wanted = transformer(**inputs)
        names = ("encoder_hidden_states", "pooled_projections")
        nothing = transformer(**inputs | {name: torch.zeros_like(inputs[name]) for name in names})
        return nothing + guidance * (wanted - nothing)

    return velocity


def position_ids() -> dict[str, torch.Tensor]:
    """RoPE positions of the image and text tokens, as FLUX numbers them."""
    return {"img_ids": image_ids(data.SIDE, data.SIDE), "txt_ids": torch.zeros(text.TOKENS, 3)}


def noise(seed: int, count: int) -> torch.Tensor:
    """Gaussian latents [count, 256, 12] float32, each image from a generator of its own."""
    shape = (data.SIDE**2, data.CHANNELS * data.PATCH**2)
    drawn = [np.random.default_rng([seed, i]).standard_normal(shape, np.float32) for i in range(count)]
    return torch.from_numpy(np.stack(drawn))


def load_model(folder: Path = MODEL, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """The trained transformer; its weights are stored as fp16."""
    return FluxTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False
    ).eval()


def draw(
    folder: Path, texts: Sequence[str], seed: int, guidance: float = GUIDANCE, steps: int = STEPS
) -> torch.Tensor:
    """Images [n, 3, 32, 32] of ``texts`` by the dense model in ``folder``, on a GPU where there is one."""
    model, prompts = opened(folder, texts)
    return sample(dense(model), prompts, seed, steps, guidance)


def opened(folder: Path, texts: Sequence[str]) -> tuple[FluxTransformer2DModel, dict[str, torch.Tensor]]:
    """The transformer in ``folder``, and ``texts`` as its word table encodes them, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = text.WordTable.load(folder / WORDS).to(device).encode(texts)
    return load_model(folder).to(device), prompts


def contact_sheet(images: torch.Tensor, columns: int, path: Path, magnify: int = 3) -> None:
    """Write images [n, 3, 32, 32] as one PNG, ``columns`` a row, each pixel ``magnify`` pixels wide."""
    rows = -(-len(images) // columns)
    cell = data.SIZE + 1  # a grey line below and to the right of each image
    sheet = torch.full((rows * columns, data.CHANNELS, cell, cell), LINE)
    sheet[: len(images), :, : data.SIZE, : data.SIZE] = images.clamp(0, 1)
    grid = sheet.reshape(rows, columns, data.CHANNELS, cell, cell).permute(0, 3, 1, 4, 2)
    pixels = (grid.reshape(rows * cell, columns * cell, data.CHANNELS) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.resize((picture.width * magnify, picture.height * magnify), Image.Resampling.NEAREST).save(path)
