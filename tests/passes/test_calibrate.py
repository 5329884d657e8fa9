# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lynx_compile import models
from lynx_compile.errors import InputError, StageError
from lynx_compile.models.flux import denoise
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.passes.calibrate import Statistics, calibrate, load_conditioning, measurements
from lynx_compile.passes.select import select
from lynx_compile.recipe import Recipe, Sparsity, load_recipe
from lynx_compile.solve.moments import PrunedStatistics
from tests.conftest import TINY


def _calibrate(recipe: Recipe, folder: Path, dit: models.DiT | None = None, **changes: object) -> Statistics:
    calibration = recipe.calibration.model_copy(update=changes)
    recipe = recipe.model_copy(update={"calibration": calibration})
    dit = dit or models.load(recipe)
    return calibrate(dit, select(dit.groups, recipe.sparsity), recipe, folder, lambda *_: None)


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    """With both operands where one tensor has several readers: the moments of pruned activations count too."""
    sparsity = Sparsity(operand={"*.to_q": "weight", "*": "activation"})
    return load_recipe(tiny / "tiny.yaml").model_copy(update={"sparsity": sparsity})


def test_moments_are_those_of_the_linears_input_over_the_whole_loop(recipe: Recipe, tmp_path: Path) -> None:
    dit = models.load(recipe)
    seen: list[torch.Tensor] = []
    linear = dit.module.get_submodule("transformer_blocks.0.ff.net.2")
    handle = linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, -2)))
    statistics = _calibrate(recipe, tmp_path, dit)
    handle.remove()
    x = torch.cat(seen).double()
    assert len(x) == 6 * 4 * 64  # samples x steps x image tokens
    pruned = x * keep_mask(x.float())
    moments = statistics.load("transformer_blocks.0.ff.net.2")
    assert isinstance(moments, PrunedStatistics)
    assert moments.tokens == len(x)
    cov = torch.cov(torch.cat((x, pruned), 1).T, correction=0)
    channels = x.shape[1]
    xx, xs, ss = cov[:channels, :channels], cov[:channels, channels:], cov[channels:, channels:]
    for got, want in ((moments.xx, xx), (moments.xs, xs), (moments.ss, ss)):
        assert (got.double() - want).norm() < 1e-4 * want.norm()
    assert torch.allclose(moments.x_mean.double(), x.mean(0), atol=1e-5)


def test_only_what_the_plan_needs_is_gathered(recipe: Recipe, tmp_path: Path) -> None:
    """Where every reader of a tensor has pruned weights, the moments of pruned activations are not."""
    sparsity = Sparsity(operand={"*.ff.net.2": "activation", "*.to_q": "activation", "*": "weight"})
    recipe = recipe.model_copy(update={"sparsity": sparsity})
    dit = models.load(recipe)
    plan = select(dit.groups, sparsity)
    statistics = _calibrate(recipe, tmp_path, dit)
    pruned = {name for name in statistics.groups if isinstance(statistics.load(name), PrunedStatistics)}
    assert pruned == {
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp",
    }  # fmt: skip
    assert len(statistics.groups) == len({group.name for group in plan.groups}) > len(pruned)
    sizes = {one.name: one.bytes for one in measurements(plan)}
    assert sizes["transformer_blocks.0.ff.net.2"] == 3 * sizes["transformer_blocks.0.ff_context.net.2"]
    for name in statistics.groups:  # what one tensor takes on disk, but for the means and the header
        size = (tmp_path / f"{name}.safetensors").stat().st_size
        assert sizes[name] < size < sizes[name] * 1.1 + 1000


def test_same_seed_same_bytes_and_another_seed_others(recipe: Recipe, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        _calibrate(recipe, folder, seed=seed)
    first, second, third = (sorted(folder.iterdir()) for folder in folders)
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]
    other = {c.name: c.read_bytes() for c in third}
    assert other["single_transformer_blocks.0.proj_out.safetensors"] != first[0].read_bytes()
    assert (
        sum(a.read_bytes() != other[a.name] for a in first) >= len(first) - 1
    )  # block 0's text sees no noise


def test_several_passes_give_what_one_gives(recipe: Recipe, tmp_path: Path) -> None:
    one = _calibrate(recipe, tmp_path / "one")
    many = _calibrate(recipe, tmp_path / "many", memory_gib=0.0003)
    for group in one.groups:
        assert torch.equal(one.load(group).xx, many.load(group).xx)


def test_tokens_per_step_limits_the_tokens(recipe: Recipe, tmp_path: Path) -> None:
    statistics = _calibrate(recipe, tmp_path, tokens_per_step=5)
    assert statistics.load("transformer_blocks.0.attn.to_q").tokens == 6 * 4 * 5
    assert statistics.load("transformer_blocks.0.attn.add_q_proj").tokens == 6 * 4 * 4  # 4 text tokens


def test_too_few_tokens_are_one_warning_with_the_number_needed(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _calibrate(recipe, tmp_path)
    assert len(caplog.records) == 1
    assert "on 96, its 256 channels need at least 2560" in caplog.text and "26.7-fold" in caplog.text


def test_hooks_are_gone_even_after_an_error(recipe: Recipe, tmp_path: Path) -> None:
    dit = models.load(recipe)
    dit.module.get_submodule("transformer_blocks.0.ff.net.0.proj").weight[0, 0] = torch.nan
    with pytest.raises(StageError, match="'transformer_blocks.0.ff.net.2' is not finite.*bf16"):
        _calibrate(recipe, tmp_path, dit)
    assert not any(module._forward_pre_hooks for module in dit.module.modules())


def test_denoise_is_the_pipelines_loop() -> None:
    """Latents against ``FluxPipeline`` itself, with the timestep shift of FLUX.1-dev."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**TINY).eval()
    options = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    parts = {
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(**options), transformer=transformer, **parts)
    latents, text, pooled = torch.randn(1, 16, 4), torch.randn(1, 4, 32), torch.randn(1, 16)
    expected = pipeline(
        prompt_embeds=text, pooled_prompt_embeds=pooled, latents=latents, height=64, width=64, num_inference_steps=5,
        guidance_scale=3.5, output_type="latent",
    ).images  # fmt: skip
    conditioning = {
        "encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": torch.zeros(4, 3),
        "img_ids": models.flux.image_ids(4, 4), "guidance": torch.full((1,), 3.5),
    }  # fmt: skip
    with torch.no_grad():
        got = denoise(
            lambda **inputs: transformer(**inputs, return_dict=False)[0],
            FlowMatchEulerDiscreteScheduler(**options), latents, conditioning, 5,
        )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_by_the_checkpoints_encoders(tmp_path: Path) -> None:
    pipeline = _pipeline_with_text_encoders()
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a fox\n\n  two owls \n")
    (tmp_path / "r.yaml").write_text(
        "model: {source: model, dtype: fp16}\nshapes: {height: 16, width: 16, text_length: 6}\n"
        "calibration: {source: prompts.txt}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    rows = load_conditioning(tmp_path / "prompts.txt", models.load(recipe), recipe)
    text, pooled, _ = pipeline.encode_prompt(prompt="two owls", prompt_2=None, max_sequence_length=6)
    assert rows["encoder_hidden_states"].shape == (2, 6, 32) and rows["pooled_projections"].shape == (2, 16)
    torch.testing.assert_close(
        rows["encoder_hidden_states"][1].float(), text[0].float(), rtol=0.05, atol=0.05
    )
    torch.testing.assert_close(rows["pooled_projections"][1].float(), pooled[0].float(), rtol=0.05, atol=0.05)


def _pipeline_with_text_encoders() -> FluxPipeline:
    torch.manual_seed(0)
    characters = [chr(i) for i in range(33, 127)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=188, eos_token_id=189,
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in characters)]
    t5 = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=CLIPTokenizer(
            vocab={c: i for i, c in enumerate(vocabulary)}, merges=[], model_max_length=77
        ),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0),
        transformer=FluxTransformer2DModel(**TINY),
    )


def _good() -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": torch.randn(3, 4, 32), "pooled_projections": torch.randn(3, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled_projections": None}, "holds no 'pooled_projections'"),
        (
            {"encoder_hidden_states": torch.randn(3, 5, 32)},
            r"has shape \[3, 5, 32\], the model and recipe want",
        ),
        ({"pooled_projections": torch.randn(3, 17)}, r"want \[prompts, 16\]"),
        ({"pooled_projections": torch.randn(2, 16)}, "different numbers of rows"),
        ({"pooled_projections": torch.full((3, 16), torch.nan)}, "values that are not finite"),
        ({"pooled_projections": torch.zeros(0, 16)}, "has shape"),
    ],
)
def test_bad_conditioning(recipe: Recipe, tmp_path: Path, change: dict, message: str) -> None:  # type: ignore[type-arg]
    path = tmp_path / "prompts.safetensors"
    save_file({name: value for name, value in (_good() | change).items() if value is not None}, path)
    with pytest.raises(InputError, match=message):
        load_conditioning(path, models.load(recipe), recipe)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, "does not exist"),
        ("cut.safetensors", b"\x10\x00", "is not a readable safetensors file"),
        ("pickle.safetensors", b"\x80\x04cos\nsystem\n", "is not a readable safetensors file"),
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("latin.txt", b"\xff\xfe\xfa", "is not UTF-8 text"),
        ("prompts.txt", b"a fox\n", "has no usable text encoders"),
    ],
)
def test_bad_calibration_files(
    recipe: Recipe, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_conditioning(tmp_path / name, models.load(recipe), recipe)
