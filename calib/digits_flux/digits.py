# SPDX-License-Identifier: Apache-2.0
"""The data: scikit-learn's digits at 16 x 16, packed as FLUX packs latents, and one "prompt" per class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
CONDITIONING = HERE / "conditioning.safetensors"
# How the transformer's arguments are called in the pipeline's call.
PIPELINE_NAMES = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
CLASSES = 10
SIZE = 16  # pixels along a side
PATCH = 2  # a token packs PATCH x PATCH pixels
SIDE = SIZE // PATCH  # tokens along a side
BRIGHTEST = 16.0  # scikit-learn's pixels are counts in 0 .. 16
HELD_OUT = 360  # of 1797 images
SPLIT_SEED = 0


def digits(split: Literal["train", "held_out"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 16, 16] float32 in [0, 1] and their labels [n] int64; the two splits share no image."""
    from sklearn.datasets import load_digits  # only the digits themselves need it, not what is drawn

    data = load_digits()
    images = torch.from_numpy(data.images).float() / BRIGHTEST
    images = torch.nn.functional.interpolate(images[:, None], size=(SIZE, SIZE), mode="bilinear")[:, 0]
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = order[:HELD_OUT] if split == "held_out" else order[HELD_OUT:]
    return images[rows], labels[rows]


def pack(images: torch.Tensor) -> torch.Tensor:
    """Images [n, 16, 16] in [0, 1] to latents [n, 64, 4] in [-1, 1], a token per 2 x 2 patch."""
    patches = (2 * images - 1).reshape(-1, SIDE, PATCH, SIDE, PATCH).permute(0, 1, 3, 2, 4)
    return patches.reshape(-1, SIDE * SIDE, PATCH * PATCH)


def unpack(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack``; values are not clipped."""
    patches = latents.reshape(-1, SIDE, SIDE, PATCH, PATCH).permute(0, 1, 3, 2, 4)
    return (patches.reshape(-1, SIZE, SIZE) + 1) / 2


def make_conditioning(tokens: int, joint_dim: int, pooled_dim: int, seed: int) -> dict[str, torch.Tensor]:
    """One random "prompt" per class, rms 1; at each token position the ten classes are orthogonal.

    Returns:
        float32 ``encoder_hidden_states`` [10, tokens, joint_dim], ``pooled_projections`` [10, pooled_dim].
    """
    random = torch.Generator().manual_seed(seed)

    def orthogonal(dim: int) -> torch.Tensor:
        columns: torch.Tensor = torch.linalg.qr(torch.randn(dim, CLASSES, generator=random)).Q
        return columns.T * math.sqrt(dim)

    text = torch.stack([orthogonal(joint_dim) for _ in range(tokens)], dim=1)
    return {
        "encoder_hidden_states": text.contiguous(),
        "pooled_projections": orthogonal(pooled_dim).contiguous(),
    }


def load_conditioning() -> dict[str, torch.Tensor]:
    """The table the model was trained with, a row per class; keys as in ``make_conditioning``."""
    stored = load_file(CONDITIONING)
    return {name: stored[argument] for name, argument in PIPELINE_NAMES.items()}


def save_conditioning(conditioning: dict[str, torch.Tensor]) -> None:
    """Store the table under the names of ``FluxPipeline``'s arguments."""
    save_file({PIPELINE_NAMES[name]: rows for name, rows in conditioning.items()}, CONDITIONING)
