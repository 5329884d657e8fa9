# SPDX-License-Identifier: Apache-2.0
"""The trained digits model: its files are what the compiler expects, and it draws digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from calib.digits_flux import classifier, digits, evaluate, metric, sampler, train
from lynx_compile.recipe import load_recipe
from tests.conftest import flux_groups

TRANSFORMER = sampler.MODEL / "transformer"
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def model() -> FluxTransformer2DModel:
    return sampler.load_model()


def test_weights_are_small_finite_fp16_safetensors():
    path = TRANSFORMER / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    assert path.stat().st_size <= 12 * MEGABYTE
    assert classifier.WEIGHTS.stat().st_size <= MEGABYTE
    assert all(w.dtype == torch.float16 and w.isfinite().all() for w in weights.values())


def test_config_is_that_of_the_settings():
    config = json.loads((TRANSFORMER / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (3, 64)
    assert (config["num_layers"], config["num_single_layers"]) == (2, 4)
    assert (config["in_channels"], config["guidance_embeds"]) == (4, False)
    assert config["axes_dims_rope"] == [16, 24, 24]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(sampler.MODEL / "scheduler").config
    assert (scheduler.shift, scheduler.use_dynamic_shifting) == (1.0, False)


def test_every_candidate_linear_fits_the_sparse_op(model: FluxTransformer2DModel):
    groups = flux_groups(dict(model.config), side=digits.SIDE, text=8, batch=10)
    linears = [linear for group in groups for linear in group.linears if linear.refusal is None]
    assert len(linears) == 2 * 12 + 4 * 5
    assert all(x.in_channels % 16 == 0 and x.out_channels % 8 == 0 for x in linears)


def test_conditioning_is_the_seeded_table():
    stored = digits.load_conditioning()
    made = digits.make_conditioning(8, 64, 64, train.SETTINGS.seed)
    assert stored.keys() == made.keys()
    for key in made:
        torch.testing.assert_close(stored[key], made[key], rtol=0, atol=1e-5)
    pooled = stored["pooled_projections"]
    torch.testing.assert_close(pooled @ pooled.T, 64 * torch.eye(10), rtol=0, atol=1e-3)


def test_pack_puts_a_patch_into_a_token():
    images = torch.arange(2 * 256).reshape(2, 16, 16) / 512
    latents = digits.pack(images)
    assert latents.shape == (2, 64, 4)
    torch.testing.assert_close(latents[1, 9], 2 * images[1, 2:4, 2:4].flatten() - 1)  # token (1, 1)
    torch.testing.assert_close(digits.unpack(latents), images)


def test_splits_share_no_image():
    train_images, held_out = (digits.digits(split)[0] for split in ("train", "held_out"))
    assert len(train_images) + len(held_out) == 1797
    assert torch.cdist(held_out.flatten(1), train_images.flatten(1)).min() > 0


def test_classifier_knows_held_out_digits():
    assert classifier.held_out_accuracy() >= 0.97
    images, _ = digits.digits("held_out")
    assert classifier.features(images[:5]).shape == (5, classifier.FEATURES)


def test_samples_show_their_label(model: FluxTransformer2DModel):
    labels = torch.arange(10).repeat(2)
    images = sampler.sample(sampler.dense(model), labels, seed=1, steps=8)
    assert images.shape == (20, 16, 16)
    assert (classifier.predict(images) == labels).sum() >= 18
    wrong = (labels + 1) % 10
    assert (classifier.predict(images) == wrong).sum() <= 2


def test_sampling_repeats_and_ignores_the_batch_size(model: FluxTransformer2DModel):
    labels = torch.tensor([3, 1, 4, 1, 5])
    dense = sampler.dense(model)
    images = sampler.sample(dense, labels, seed=7, steps=3)
    assert torch.equal(images, sampler.sample(dense, labels, seed=7, steps=3))
    in_pairs = sampler.sample(dense, labels, seed=7, steps=3, batch=2)
    torch.testing.assert_close(images, in_pairs, rtol=0, atol=1e-4)
    first_two = sampler.sample(dense, labels[:2], seed=7, steps=3)
    torch.testing.assert_close(images[:2], first_two, rtol=0, atol=1e-4)
    assert (images - sampler.sample(dense, labels, seed=8, steps=3)).abs().max() > 0.1
    assert (images[1] - images[3]).abs().max() > 0.1  # one label, two images


def test_frechet_distance_of_gaussians_known_in_closed_form():
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet_distance(features, features + 2) == pytest.approx(8 * 4, rel=1e-5)
    spread = torch.cov(features.double().T).trace().item()  # doubling the deviations: tr(C + 4C - 2 * 2C)
    about_mean = features - features.mean(0)
    assert evaluate.frechet_distance(about_mean, 2 * about_mean) == pytest.approx(spread, rel=1e-5)


def test_contact_sheet_places_images_row_by_row(tmp_path: Path):
    images = torch.zeros(3, 16, 16)
    images[2] = 1.5  # clipped to white
    sampler.contact_sheet(images, 2, tmp_path / "sheet.png", magnify=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (68, 68)
        assert [sheet.getpixel(xy) for xy in ((8, 8), (42, 8), (8, 42), (33, 8))] == [0, 0, 255, 102]


def test_training_resumes_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "SETTINGS", replace(train.SETTINGS, batch=4))
    images, labels = (part[:64] for part in digits.digits("train"))
    arguments = digits.pack(images), labels, digits.load_conditioning()

    def step(run: train.Run) -> float:
        loss = train.one_step(run, *arguments, torch.Generator().manual_seed(run.step))
        run.step += 1
        return loss

    torch.manual_seed(0)
    run = train.Run.started()
    first = step(run)
    run.save(tmp_path / "checkpoint.safetensors")
    resumed = train.Run.restored(tmp_path / "checkpoint.safetensors")
    assert resumed.step == 1
    for _ in range(2):  # the second loss shows that the optimizer's moments came back too
        assert step(resumed) == pytest.approx(step(run), rel=1e-6) != first


def test_the_recipes_metric_reads_the_digits():
    images, labels = digits.digits("held_out")
    images, labels = images[:40, None].numpy(), labels[:40].numpy()
    found = metric.digits_read(images, images[::-1].copy(), labels)
    same = metric.digits_read(images, images, labels)
    assert same["agreement"] == 1 and same["accuracy"] == same["dense_accuracy"] > 0.9
    assert same["frechet"] < 1e-3
    assert metric.digits_read(images, images[:, :, ::-1].copy(), labels)["frechet"] > 1, "upside down"
    assert found["dense_accuracy"] == same["accuracy"] and found["accuracy"] < 0.5 > found["agreement"]
    recipe = load_recipe(digits.HERE.parents[1] / "engines" / "digits-flux.yaml")
    assert recipe.compare.metric == f"{metric.__name__}:{metric.digits_read.__name__}"
    assert set(recipe.compare.min_metric) <= set(found)
