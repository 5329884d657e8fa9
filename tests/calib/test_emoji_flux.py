# SPDX-License-Identifier: Apache-2.0
"""The trained emoji model: it draws what it drew where it was trained, and its prompts, data and training."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from calib.digits_flux.sampler import dense
from calib.emoji_flux import data, prompts, sampler, text, train
from lynx_compile.models.pipeline_loader import load_pipeline
from lynx_compile.passes.speed_table import CostTable
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.images import psnr

SHEET = sampler.HERE / "samples.png"
ENGINES = Path(__file__).parents[2] / "engines"
MAGNIFIED = 3  # a pixel in the sheet


@pytest.fixture(scope="module")
def words() -> text.WordTable:
    return text.WordTable.load(sampler.MODEL / sampler.WORDS)


def cell(path: Path, column: int) -> np.ndarray:
    """A picture of a sheet's first row, [3, 32, 32] in [0, 1]."""
    with Image.open(path) as sheet:
        pixels = np.array(sheet.convert("RGB"), dtype=np.float32)[::MAGNIFIED, ::MAGNIFIED] / 255
    left = column * (data.SIZE + 1)
    return pixels[: data.SIZE, left : left + data.SIZE].transpose(2, 0, 1)


def test_it_draws_the_pictures_of_its_card():
    (drawn,) = sampler.draw(sampler.MODEL, train.PICTURES[:1], seed=0).clamp(0, 1).numpy()
    assert psnr(cell(SHEET, 0), drawn) > 30
    assert psnr(cell(SHEET, 1), drawn) < 15  # the next picture, of another prompt


def test_pipeline_guides_as_the_sampler_does(words: text.WordTable):
    pipe = load_pipeline(sampler.MODEL, dtype=torch.float32, device="cpu", encoded_prompts=True)
    pipe.set_progress_bar_config(disable=True)
    wanted = [train.PICTURES[28]]
    rows = {name: value.float() for name, value in prompts.rows(words, wanted).items()}
    size = 8 * data.SIZE
    latents = pipe(
        **rows, true_cfg_scale=2.0, num_inference_steps=2, height=size, width=size,
        latents=sampler.noise(0, 1), output_type="latent",
    ).images  # fmt: skip
    drawn = sampler.sample(dense(pipe.transformer), words.encode(wanted), seed=0, steps=2, guidance=2.0)
    torch.testing.assert_close(data.unpack(latents), drawn, rtol=0, atol=0.01)  # the rows are fp16


def test_more_prompts_name_two_emoji_and_none_is_held_out():
    listed, held_out = (prompts.read(path) for path in (prompts.CALIBRATION, prompts.HELD_OUT))
    more = prompts.extended(listed, held_out, 4096)
    assert len(set(more)) == 4096 and more[: len(listed)] == listed and not {*more} & {*held_out}
    assert all(" with " in prompt for prompt in more[len(listed) :])
    assert prompts.extended(listed, held_out, 100) == listed[:100]


def test_prompts_are_apart_and_their_rows_the_words(words: text.WordTable):
    lists = {path: prompts.read(path) for path in prompts.COUNTS}
    assert {path: len(some) for path, some in lists.items()} == prompts.COUNTS
    assert len(set().union(*lists.values())) == sum(prompts.COUNTS.values())
    for path, some in lists.items():
        stored, made = load_file(prompts.output(path)), prompts.rows(words, some)
        assert stored.keys() == made.keys()
        assert all(torch.equal(stored[name], made[name]) for name in made)
    assert torch.equal(made["negative_prompt_embeds"][:1], prompts.rows(words, [""])["prompt_embeds"])


def test_words_that_no_emoji_has_are_named(words: text.WordTable):
    with pytest.raises(ValueError, match="'lynx' is no word of an emoji's name"):
        words.encode(["google lynx"])


@pytest.mark.parametrize("name", ["emoji-flux.yaml", "demo.yaml"])
def test_recipe_compares_on_the_prompts_kept_apart(name: str):
    recipe = load_recipe(ENGINES / name)
    assert recipe.calibration.prompts == str(prompts.CONDITIONING)
    assert recipe.compare.prompts == str(prompts.output(prompts.HELD_OUT))
    assert recipe.call["height"] == recipe.call["width"] == 8 * data.SIZE


def test_pack_puts_a_patch_of_three_colours_into_a_token():
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32) / 6144
    latents = data.pack(images)
    assert latents.shape == (2, 256, 12)
    torch.testing.assert_close(latents[1, 17], 2 * images[1, :, 2:4, 2:4].flatten() - 1)  # token (1, 1)
    torch.testing.assert_close(data.unpack(latents), images)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Both packages with one emoji of a skin tone: half transparent red."""
    described = [
        {
            "name": "WAVING HAND SIGN",
            "short_names": ["wave"],
            "image": "1f44b.png",
            "skin_variations": {"1F3FF": {"image": "1f44b-1f3ff.png"}},
        }
    ]
    png = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 51)).save(png, "PNG")
    for style in data.STYLES:
        files = {"emoji.json": json.dumps(described).encode()}
        files |= {f"img/{style}/64/{name}.png": png.getvalue() for name in ("1f44b", "1f44b-1f3ff")}
        with tarfile.open(tmp_path / f"emoji-datasource-{style}-{data.VERSION}.tgz", "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return tmp_path


def test_packages_become_images_on_white_and_their_names(packages: Path):
    emoji = data.read_packages(packages)
    assert emoji.texts[:2] == [
        ["twitter waving hand sign", "twitter wave"],
        ["twitter waving hand sign dark skin", "twitter wave dark skin"],
    ]
    assert emoji.weights.tolist() == pytest.approx([1, data.TONED_WEIGHT] * 2)
    assert emoji.images.shape == (4, 3, 32, 32)
    assert emoji.images[0, :, 0, 0].tolist() == [255, 204, 204]


def test_a_model_that_was_trained_two_steps_is_a_pipeline(packages: Path):
    emoji = data.read_packages(packages)
    emoji.weights[1] = 0
    data.save(emoji, packages / "emoji.safetensors")
    given = argparse.Namespace(
        data=packages / "emoji.safetensors", out=packages, size="tiny", minutes=1.0, steps=2, batch=2, seed=0,
        no_compile=True,
    )  # fmt: skip
    model = train.train(given)
    train.save_model(model, packages)
    assert len((packages / "training_log.csv").read_text().splitlines()) == 2
    assert sampler.draw(packages, ["google wave"], seed=0, steps=1).isfinite().all()
    pipe = load_pipeline(packages, dtype=torch.float32, device="cpu", encoded_prompts=True)
    assert type(pipe).__name__ == "FluxPipeline"


def test_the_widest_model_has_linears_that_the_cost_table_knows():
    recipe = load_recipe(sampler.HERE / "emoji-945m.yaml")
    table = CostTable.load(Path(recipe.sparsity.costs))
    measured = {(result.shape.channels, result.shape.out_channels) for result in table.results}
    with torch.device("meta"):
        module = train.EmojiModel(train.SIZES["945m"], ["pizza"]).transformer
    shapes = {
        (linear.in_features, linear.out_features)
        for name, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear) and "blocks" in name and ".norm" not in name
    }
    together = {
        (3072, 3072): (3072, 9216),
        (3072, 12288): (3072, 21504),
    }  # q, k, v, and the single blocks' MLP
    assert {together.get(shape, shape) for shape in shapes} <= measured and shapes - together.keys()
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(945e6, rel=1e-3)
