# SPDX-License-Identifier: Apache-2.0
"""Draw digits with the Qwen-Image-class model, from the same noise as ``calib.digits_flux``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from safetensors.torch import save_file

from calib.digits_flux import digits
from calib.digits_flux.sampler import Velocity, in_batches, noise

HERE = Path(__file__).parent
MODEL = HERE / "model"
CONDITIONING = HERE / "conditioning.safetensors"
IMAGE_SHAPE = (1, digits.SIDE, digits.SIDE)  # frames, rows and columns of tokens


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
            encoder_hidden_states [b, 8, 64], all float32 on the CPU; returns the velocity [b, 64, 4]. ``dense`` makes
            one of a diffusers model.
        labels: digits [n], int64.
        seed: the noise of image i depends on ``seed`` and i alone.
        conditioning: a row per class, as ``load_conditioning`` returns; that one by default.

    Returns:
        Images [n, 16, 16] float32, in [0, 1] up to the model's overshoot; not clipped.
    """
    prompts = load_conditioning() if conditioning is None else conditioning
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    own = {name: rows[labels] for name, rows in prompts.items()}
    return in_batches(transformer, scheduler, noise(seed, len(labels)), own, {}, steps, batch)


def load_conditioning() -> dict[str, torch.Tensor]:
    """A row per digit of ``encoder_hidden_states`` [10, 8, 64]: those of digits-flux. There is no pooled vector."""
    name = "encoder_hidden_states"
    return {name: digits.load_conditioning()[name]}


def save_conditioning() -> None:
    """Write ``load_conditioning``'s rows under the names of ``QwenImagePipeline``'s arguments; no token is masked."""
    rows = load_conditioning()["encoder_hidden_states"]
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    save_file({"prompt_embeds": rows, "prompt_embeds_mask": mask}, CONDITIONING)


def load_model(folder: Path = MODEL, dtype: torch.dtype = torch.float32) -> QwenImageTransformer2DModel:
    """The trained transformer; its weights are stored as fp16."""
    return QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False
    ).eval()


def dense(model: QwenImageTransformer2DModel) -> Velocity:
    """``model``, wherever it is, as ``sample`` calls it."""

    def velocity(timestep: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        device = next(model.parameters()).device
        cast = {k: v.to(device, model.dtype) for k, v in inputs.items()}
        shapes = [[IMAGE_SHAPE]] * len(timestep)
        output: torch.Tensor = model(
            **cast, timestep=timestep.to(device), img_shapes=shapes, return_dict=False
        )[0]
        return output.float().cpu()

    return velocity
