# SPDX-License-Identifier: Apache-2.0
"""Pipelines that become two engines: of two denoisers (Wan 2.2's way), and of one that is called in two ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

import lynx_compile
from lynx_compile import pipeline
from lynx_compile.engine.manifest import Manifest
from lynx_compile.models.capture import capture
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.support import autoencoders
from lynx_compile.tools.support.pipelines import PIPELINES, prepare
from tests.example_programs import encoded, hold, without_encoders

RECIPE = """\
model: {{source: model, dtype: bf16}}
call: {call}
calibration: {{prompts: prompts.safetensors, samples: 2}}
sparsity: {{operand: weight}}
compensation: {{tune: blockwise, steps: 2}}
"""
RECORDED = """\
model:
  module: diffusers:MotifVideoTransformer3DModel
  config: model/config.json
  weights: model/diffusion_pytorch_model.safetensors
  dtype: bf16
calibration: {recording: calls}
sparsity: {operand: weight}
compensation: {tune: false}
"""


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Wan 2.2 as ``model``, and ``out/wan.engine`` compiled of it."""
    folder = tmp_path_factory.mktemp("wan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PIPELINES, "Wan22", replace(PIPELINES["Wan22"], parts={"vae": autoencoders.wan}))
        tiny = prepare("Wan22")
    tiny.pipe.save_pretrained(folder / "model")
    rows = {name: torch.cat([row[name] for row in tiny.inputs]) for name in tiny.inputs[0]}
    save_file(rows, folder / "prompts.safetensors")
    (folder / "wan.yaml").write_text(RECIPE.format(call=json.dumps(tiny.call)))
    pipeline.compile(load_recipe(folder / "wan.yaml"), folder / "out" / "wan.engine")
    return folder


@pytest.mark.slow
def test_two_denoisers_become_two_engines(wan: Path) -> None:
    names = ("transformer", "transformer_2")
    manifests = [Manifest.read(wan / "out" / f"wan.{name}.json") for name in names]
    assert [m.source.subfolder for m in manifests] == list(names)
    for name, manifest in zip(names, manifests, strict=True):
        assert manifest.plugin_layers == len(manifest.sparse) > 0
        assert (wan / "out" / f"wan.{name}.engine").read_bytes()[:4] == b"vtrt"
    hashes = {manifest.source.sha256 for manifest in manifests}
    assert len(hashes) == 2, "each has its own weights"


@pytest.mark.slow
def test_the_example_draws_a_video_with_both(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(pipe: Any, prompt: Any, negative: Any = None, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return encoded(pipe, prompt, 12, 32), encoded(pipe, negative or "", 12, 32)

    without_encoders(WanPipeline, encode, monkeypatch)
    taken = []
    applied = lynx_compile.apply
    monkeypatch.setattr(
        lynx_compile, "apply", lambda module, path: taken.append(path.name) or applied(module, path)
    )
    arguments = ["--model", wan / "model", "--engine", wan / "out" / "wan.engine", "--prompt", "a lynx"]
    sizes = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "4"]
    found = hold("wan22_text_to_video.py", [*arguments, *sizes, "-o", tmp_path / "lynx.gif"], monkeypatch)
    assert found.shape == (5, 64, 64, 3)
    assert taken == ["wan.transformer.engine", "wan.transformer_2.engine"] * 2


@pytest.mark.slow
def test_two_ways_become_two_engines(tmp_path: Path) -> None:
    tiny = prepare("MotifVideo")
    for row in tiny.inputs:  # the pipeline's own prompts have masks of one dtype; these make two graphs
        row["negative_prompt_attention_mask"] = row["negative_prompt_attention_mask"].long()
    recording = capture(tiny.pipe, tiny.inputs, tmp_path / "calls", call=tiny.call)
    tiny.pipe.transformer.save_pretrained(tmp_path / "model")
    (tmp_path / "motif.yaml").write_text(RECORDED)
    first, second = pipeline.compile(load_recipe(tmp_path / "motif.yaml"), tmp_path / "out" / "motif.engine")
    for number, manifest in enumerate((first, second)):
        assert Manifest.read(tmp_path / "out" / f"motif.{number}.json") == manifest
        assert manifest.plugin_layers == len(manifest.sparse) > 0
        assert manifest.call.tensors["encoder_attention_mask"] == ("bool", "int64")[number]
    assert len(recording.ways()) == 2
    assert first.source.sha256 == second.source.sha256, "so that they can be loaded together"
