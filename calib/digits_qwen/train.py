# SPDX-License-Identifier: Apache-2.0
"""Train the Qwen-Image-class digits model by flow matching and save it as a diffusers folder.

``python -m calib.digits_qwen.train --out calib/digits_qwen/model`` from the repository's root; ``--digits FILE`` where
scikit-learn is missing: ``python -m calib.digits_qwen.train --save-digits FILE`` writes that file where it is not.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from calib import flow_matching
from calib.digits_flux import digits
from calib.digits_flux.sampler import contact_sheet
from calib.digits_qwen import sampler

HEADS, HEAD_DIM = 2, 64
BLOCKS = 2
AXES_DIMS_ROPE = (16, 24, 24)
BATCH = 256
SHIFT = 1  # pixels of random translation
SAMPLES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=sampler.MODEL)
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, compilation not counted")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=Path, help="what --save-digits wrote")
    parser.add_argument("--save-digits", type=Path, help="write the digits of the training split and stop")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    given = parser.parse_args()
    if given.save_digits:
        images, labels = digits.digits("train")
        save_file({"images": images, "labels": labels}, given.save_digits)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    save_model(train(given), given.out)
    sampler.save_conditioning()
    images = sampler.sample(
        sampler.dense(sampler.load_model(given.out)), torch.arange(SAMPLES) % digits.CLASSES, 0, 20
    )
    contact_sheet(images, digits.CLASSES, given.out / "samples.png")


def train(given: argparse.Namespace) -> QwenImageTransformer2DModel:
    """The averaged model."""
    torch.manual_seed(given.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in calib.emoji_flux.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.digits:
        stored = load_file(given.digits)
        images, labels = stored["images"], stored["labels"]
    else:
        images, labels = digits.digits("train")
    images, labels = images.to(device), labels.to(device)
    prompts = {name: rows.to(device) for name, rows in sampler.load_conditioning().items()}
    model = new_model().to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)

    def loss(model: nn.Module, random: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images), (given.batch,), generator=random, device=device)
        clean = digits.pack(shifted(images[rows], random))
        chosen = {name: value[labels[rows]] for name, value in prompts.items()}
        shapes = [[sampler.IMAGE_SHAPE]] * given.batch

        def velocity(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return model(hidden_states=noisy, timestep=t, img_shapes=shapes, **chosen, return_dict=False)[0]

        return flow_matching.velocity_loss(velocity, clean, random)

    settings = flow_matching.Settings(
        minutes=given.minutes, steps=given.steps, seed=given.seed, ema_decay=0.999
    )
    if not given.no_compile:
        model.compile()
    ema = flow_matching.train(model, loss, settings, given.out / "training_log.csv")
    assert isinstance(ema, QwenImageTransformer2DModel)
    return ema


def shifted(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Images [n, 16, 16], each moved by at most ``SHIFT`` pixels along both axes; what comes in is black."""
    n, size = len(images), digits.SIZE
    moves = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=random, device=images.device)
    at = torch.arange(size, device=images.device) + moves  # [2, n, 16], into the padded images
    padded = nn.functional.pad(images, (SHIFT,) * 4)
    return padded[torch.arange(n, device=images.device)[:, None, None], at[0, :, :, None], at[1, :, None, :]]


def new_model() -> QwenImageTransformer2DModel:
    """The untrained model; modulations and the output layer start at zero."""
    model = QwenImageTransformer2DModel(
        patch_size=digits.PATCH,
        in_channels=digits.PATCH**2,
        out_channels=1,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=64,
        axes_dims_rope=AXES_DIMS_ROPE,
    )
    zeroed = re.compile(r".+\.(img|txt)_mod\.1|norm_out\.linear|proj_out")
    flow_matching.start_at_zero(model, lambda path: zeroed.fullmatch(path) is not None)
    return model


def save_model(model: QwenImageTransformer2DModel, folder: Path) -> None:
    """Write transformer (fp16), scheduler and index; a ``QwenImagePipeline`` without encoder and VAE."""
    flow_matching.save_pipeline(model, "QwenImagePipeline", ("vae", "text_encoder", "tokenizer"), folder)


if __name__ == "__main__":
    main()
