# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image-Edit's example, whole, on a tiny model; the recipes of all.

FLUX's program is run in torch_ops/test_torch_backend.py and Wan's in test_two_denoisers.py, on what those compile;
the C++ ones in runtime_cpp/test_examples.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

from lynx_compile import pipeline
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.support import pipelines
from lynx_compile.tools.support.autoencoders import qwen
from tests.example_programs import EXAMPLES, encoded, hold, without_encoders


@pytest.mark.parametrize(
    "path", [*sorted(EXAMPLES.glob("*.yaml")), EXAMPLES.parent / "engines/flux.yaml"], ids=str
)
def test_its_recipe_is_one(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.call["num_inference_steps"] > 20 and recipe.checkpoint is None


def encode(pipe: Any, prompt: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    embeds = encoded(pipe, prompt, 12, 32)
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.int64)


@pytest.mark.slow
def test_qwen_image_edit_edits_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its recipe, but for a model of one block, fewer calls, and smaller pictures than the pipeline makes them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (64, 64, None))
    small = pipelines._image(
        "QwenImageEditPipeline", "QwenImage", lambda _: {}, changes={"num_layers": 1}, parts={"vae": qwen}
    )
    monkeypatch.setitem(pipelines.PIPELINES, "small", small)
    pipelines.prepare("small").pipe.to(torch.bfloat16).save_pretrained("model")
    without_encoders(QwenImageEditPipeline, encode, monkeypatch)
    pipelines.picture().save("cat.png")
    Path("edits.csv").write_text("prompt,image\na hat,cat.png\na red hat,cat.png\n")
    values = yaml.safe_load((EXAMPLES / "qwen_image_edit.yaml").read_text())
    values["model"]["source"] = "model"
    values["call"]["num_inference_steps"] = 2
    values["calibration"]["samples"] = 2
    values |= {"sparsity": {"operand": "weight"}, "compensation": {"tune": False}}
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    pipeline.compile(load_recipe(Path("recipe.yaml")), tmp_path / "edit.engine")

    arguments = ["--model", "model", "--engine", "edit.engine", "--image", "cat.png", "--prompt", "a hat"]
    found = hold("qwen_image_edit.py", [*arguments, "--steps", "2", "-o", "hat.png"], monkeypatch)
    assert found.shape == (1, 64, 64, 3)
