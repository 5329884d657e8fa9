# SPDX-License-Identifier: Apache-2.0
"""Train an emoji model by flow matching on a GPU and save it as a diffusers folder, with a sheet to look at.

``python -m calib.emoji_flux.train emoji.safetensors --size small --minutes 7 --out model`` from the repository's root;
``calib.emoji_flux.data`` makes the data. Needs torch, diffusers, safetensors and Pillow.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from calib import flow_matching
from calib.emoji_flux import data, sampler, text

HEAD_DIM = 64
AXES_DIMS_ROPE = (16, 24, 24)
BATCH = 256
NO_PROMPT = 0.1  # of the batch, for classifier-free guidance
LOST_WORDS = 0.2  # of the prompts lose some of their words,
LOST_WORD = 0.3  # each of them with this probability


@dataclass(frozen=True)
class Size:
    heads: int
    double_blocks: int
    single_blocks: int
    learning_rate: float


SIZES = {
    "tiny": Size(1, 1, 1, 1e-3),  # 0.2 M parameters: to try the script
    "small": Size(4, 2, 6, 1e-3),  # 11 M
    "156m": Size(12, 4, 8, 6e-4),
    "945m": Size(48, 1, 4, 2.5e-4),  # few blocks, whose linears are of FLUX.1's sizes
}
PICTURES = (
    "google grinning face with smiling eyes", "google smiling cat face with heart shaped eyes",
    "google pizza", "google rocket", "google octopus", "google cherry blossom", "google fire", "google snowman",
    "twitter grinning face with smiling eyes", "twitter smiling cat face with heart shaped eyes",
    "twitter pizza", "twitter rocket", "twitter octopus", "twitter cherry blossom", "twitter fire", "twitter snowman",
    "google woman astronaut medium dark skin", "google man cook light skin", "google japan flag", "google unicorn face",
    "google hot beverage", "google red apple", "google slice of pizza", "google sunflower",
    "twitter thumbs up sign dark skin", "twitter ghost", "twitter jack o lantern", "twitter money bag",
    "twitter blue heart", "twitter fox face", "twitter guitar", "twitter hamburger",
    # nobody drew these
    "google cat face with sunglasses", "google pizza rocket", "google purple octopus", "google green apple face",
    "twitter dog face with heart shaped eyes", "twitter snowman with sunglasses", "twitter blue fire",
    "twitter robot cat face",
)  # fmt: skip


class EmojiModel(nn.Module):
    """What is learned: the transformer and the table of words."""

    def __init__(self, size: Size, vocabulary: list[str]) -> None:
        super().__init__()
        self.words = text.WordTable(vocabulary)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=data.CHANNELS * data.PATCH**2,
            num_layers=size.double_blocks,
            num_single_layers=size.single_blocks,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=size.heads,
            joint_attention_dim=text.DIM,
            pooled_projection_dim=text.DIM,
            guidance_embeds=False,
            axes_dims_rope=AXES_DIMS_ROPE,
        )
        zeroed = re.compile(r".+\.norm\w*\.linear|norm_out\.linear|proj_out")
        flow_matching.start_at_zero(self.transformer, lambda path: zeroed.fullmatch(path) is not None)


class Batches:
    """All images and texts on one device, and random batches of them."""

    def __init__(self, emoji: data.Emoji, words: text.WordTable, device: torch.device) -> None:
        self.images = emoji.images.to(device)
        self.weights = emoji.weights.to(device)
        most = max(len(some) for some in emoji.texts)
        self.counts = torch.tensor([len(some) for some in emoji.texts], device=device)
        padded = [text for some in emoji.texts for text in some + [""] * (most - len(some))]
        self.ids = words.ids(padded).reshape(len(emoji.texts), most, text.TOKENS).to(device)
        self.positions = {name: ids.to(device) for name, ids in sampler.position_ids().items()}

    def clean(self, rows: torch.Tensor) -> torch.Tensor:
        """Latents of images, float32."""
        return data.pack(self.images[rows].float() / 255)

    def draw(self, count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, 256, 12] and one text of each [count, 12], some without words or with fewer."""

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=random, device=self.images.device)

        rows = torch.multinomial(self.weights, count, replacement=True, generator=random)
        ids = self.ids[rows, (uniform(count) * self.counts[rows]).long()]
        lost = (uniform(count, 1) < LOST_WORDS) & (uniform(count, text.TOKENS) < LOST_WORD)
        lost |= uniform(count, 1) < NO_PROMPT
        return self.clean(rows), ids.masked_fill(lost, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="what calib.emoji_flux.data wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, log and sheets")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--minutes", type=float, default=7.0, help="of training, compilation not counted")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = train(given)
    save_model(model, given.out)
    for guidance in (1.0, 2.0, 3.0):
        images = sampler.draw(given.out, PICTURES, seed=0, guidance=guidance)
        sampler.contact_sheet(images, 8, given.out / f"samples-{guidance:g}.png")


def train(given: argparse.Namespace) -> EmojiModel:
    """The averaged model; prints the loss of trained and of held-out images."""
    torch.manual_seed(given.seed)
    # torch 2.11: an illegal memory access in this model's backward pass.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emoji, size = data.load(given.data), SIZES[given.size]
    model = EmojiModel(size, data.vocabulary(emoji.texts)).to(device)
    parameters = sum(p.numel() for p in model.transformer.parameters())
    print(f"{given.size}: {parameters / 1e6:.2f} M parameters on {device}", flush=True)
    batches = Batches(emoji, model.words, device)
    loss = loss_of(batches, given.batch)
    settings = flow_matching.Settings(
        minutes=given.minutes, steps=given.steps, seed=given.seed, learning_rate=size.learning_rate
    )
    if not given.no_compile:
        model.transformer.compile()
    ema = flow_matching.train(model, loss, settings, given.out / "training_log.csv")
    assert isinstance(ema, EmojiModel)
    rows = (batches.weights == 0).nonzero().flatten()
    for name, some in (("held-out", rows), ("trained", rows - 1)):
        print(f"loss of {len(some)} {name} images: {_loss_on(ema, batches, some):.4f}", flush=True)
    return ema


def loss_of(batches: Batches, count: int) -> Callable[[nn.Module, torch.Generator], torch.Tensor]:
    """The loss of a random batch of ``count``."""

    def loss(model: nn.Module, random: torch.Generator) -> torch.Tensor:
        clean, ids = batches.draw(count, random)
        return _velocity_loss(model, clean, ids, batches.positions, random)

    return loss


def _velocity_loss(
    model: Any,
    clean: torch.Tensor,
    ids: torch.Tensor,
    positions: dict[str, torch.Tensor],
    random: torch.Generator,
) -> torch.Tensor:
    prompts = model.words(ids)

    def velocity(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model.transformer(
            hidden_states=noisy, timestep=t, **prompts, **positions, return_dict=False
        )[0]  # fmt: skip

    return flow_matching.velocity_loss(velocity, clean, random)


def _loss_on(model: EmojiModel, batches: Batches, rows: torch.Tensor, times: int = 8) -> float:
    """Mean loss of images under their names, with the same noise for every call."""
    random = torch.Generator(rows.device).manual_seed(0)
    clean, ids = batches.clean(rows), batches.ids[rows, 0]
    with torch.no_grad():
        found = [_velocity_loss(model, clean, ids, batches.positions, random) for _ in range(times)]
    return float(torch.stack(found).mean())


def save_model(model: EmojiModel, folder: Path) -> None:
    """Write transformer (fp16), words, scheduler and index; a ``FluxPipeline`` without encoders and VAE."""
    model.words.save(folder / sampler.WORDS)
    absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    flow_matching.save_pipeline(model.transformer, "FluxPipeline", absent, folder)


if __name__ == "__main__":
    main()
