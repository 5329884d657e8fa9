# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file

from lynx_compile.errors import InputError
from lynx_compile.models.capture import capture
from lynx_compile.models.pipeline_loader import load_pipeline
from lynx_compile.tools.support import pipelines

DIGITS = Path(__file__).parents[2] / "calib" / "digits_flux"


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(DIGITS / "model", tmp_path / "model")
    return tmp_path / "model"


def test_a_trained_flux_without_encoders_or_autoencoder(tmp_path: Path) -> None:
    pipe = load_pipeline(DIGITS / "model", dtype=torch.float32, device="cpu", encoded_prompts=True)
    assert pipe.text_encoder is None and pipe.vae is None
    prompts = load_file(DIGITS / "conditioning.safetensors")
    rows = [{name: values[i : i + 1] for name, values in prompts.items()} for i in range(10)]
    found = capture(pipe, rows[:2], tmp_path, call={"height": 128, "width": 128, "num_inference_steps": 3})
    example = found.example("transformer")
    assert example["hidden_states"].shape == (1, 64, 4)
    assert torch.equal(example["encoder_hidden_states"], rows[0]["prompt_embeds"])
    times = [float(found.tensors(call)["timestep"]) for call in found.calls("transformer")]
    assert times == pytest.approx([1, 2 / 3, 1 / 3] * 2, abs=2e-3)


def test_what_the_folder_holds_and_says(tmp_path: Path) -> None:
    pipelines.prepare("Wan22").pipe.save_pretrained(tmp_path)
    edit_index(tmp_path, vae=["diffusers", "AutoencoderKLWan"], tokenizer=["transformers", "T5TokenizerFast"])
    pipe = load_pipeline(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.use_flow_sigmas
    assert pipe.transformer_2.dtype == torch.bfloat16
    assert not pipe.transformer.training
    assert pipe.config.boundary_ratio == 0.875
    pipe = load_pipeline(tmp_path, dtype=torch.float32, device="cpu", modules={"transformer_2": None})
    assert pipe.transformer_2 is None


def test_a_component_of_one_variant_alone(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    pipe = load_pipeline(folder, dtype=torch.float32, device="cpu", encoded_prompts=True)
    assert pipe.transformer.dtype == torch.float32


def test_pickles_are_never_loaded(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(folder, dtype=torch.float32)


def test_code_of_a_checkpoint_is_never_run(folder: Path) -> None:
    (folder / "pipeline.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    edit_index(folder, _class_name=["pipeline", "MyPipeline"])
    with pytest.raises(InputError, match="names no pipeline of the installed diffusers"):
        load_pipeline(folder, dtype=torch.float32)
    edit_index(folder, _class_name="FluxPipeline", transformer=["transformer_flux", "MyTransformer"])
    (folder / "transformer" / "transformer_flux.py").write_text(
        "raise SystemExit('code of the checkpoint ran')\n"
    )
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(folder, dtype=torch.float32)


def test_what_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_index.json does not exist"):
        load_pipeline(tmp_path, dtype=torch.float32)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_pipeline(tmp_path, dtype=torch.float32)
