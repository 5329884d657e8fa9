# SPDX-License-Identifier: Apache-2.0
"""The trained Qwen-Image-class model: it draws digits, as it did where it was trained, and through its pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from calib.digits_flux import classifier, digits
from calib.digits_flux.sampler import noise
from calib.digits_qwen import sampler, train
from lynx_compile.models.pipeline_loader import load_pipeline
from lynx_compile.tools.images import psnr

MAGNIFIED = 4  # a pixel in the sheet


@pytest.fixture(scope="module")
def model() -> QwenImageTransformer2DModel:
    return sampler.load_model()


def test_it_draws_the_digits_of_its_card(model: QwenImageTransformer2DModel):
    labels = torch.arange(digits.CLASSES)
    drawn = sampler.sample(sampler.dense(model), labels, seed=0, steps=20)
    assert (classifier.predict(drawn) == labels).sum() >= 9
    with Image.open(sampler.HERE / "samples.png") as sheet:
        pixels = np.array(sheet, dtype=np.float32)[::MAGNIFIED, ::MAGNIFIED] / 255
    row = np.stack(np.split(pixels[: digits.SIZE + 1], digits.CLASSES, axis=1))[
        :, : digits.SIZE, : digits.SIZE
    ]
    assert psnr(row, drawn.clamp(0, 1).numpy()) > 30


def test_pipeline_draws_what_the_sampler_does(model: QwenImageTransformer2DModel):
    pipe = load_pipeline(
        sampler.MODEL, dtype=torch.float32, device="cpu", encoded_prompts=True, modules={"transformer": model}
    )
    pipe.set_progress_bar_config(disable=True)
    rows = {name: value[3:4] for name, value in load_file(sampler.CONDITIONING).items()}
    size = 8 * digits.SIZE
    latents = pipe(
        **rows, true_cfg_scale=1.0, num_inference_steps=2, height=size, width=size,
        latents=noise(0, 1), output_type="latent",
    ).images  # fmt: skip
    drawn = sampler.sample(sampler.dense(model), torch.tensor([3]), seed=0, steps=2)
    torch.testing.assert_close(digits.unpack(latents), drawn, rtol=0, atol=1e-4)


def test_a_model_that_was_trained_two_steps_is_a_pipeline(tmp_path: Path):
    given = argparse.Namespace(
        out=tmp_path, minutes=1.0, steps=2, batch=2, seed=0, digits=None, no_compile=True
    )
    train.save_model(train.train(given), tmp_path)
    assert len((tmp_path / "training_log.csv").read_text().splitlines()) == 2
    pipe = load_pipeline(tmp_path, dtype=torch.float32, device="cpu", encoded_prompts=True)
    assert type(pipe).__name__ == "QwenImagePipeline"


def test_shifted_moves_an_image_by_at_most_a_pixel():
    images = torch.zeros(64, digits.SIZE, digits.SIZE)
    images[:, 5, 7] = 1
    moved = train.shifted(images, torch.Generator().manual_seed(0)).nonzero()
    assert len(moved) == 64
    assert (moved[:, 1:] - torch.tensor([5, 7])).abs().max() == train.SHIFT
