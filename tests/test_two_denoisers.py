# SPDX-License-Identifier: Apache-2.0
"""Pipelines that become two engines: of two denoisers (Wan 2.2's way), and of one that is called in two ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lynx_compile import pipeline
from lynx_compile.engine.manifest import Manifest
from lynx_compile.models.capture import capture
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.support.pipelines import prepare

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


@pytest.mark.slow
def test_two_denoisers_become_two_engines(tmp_path: Path) -> None:
    tiny = prepare("Wan22")
    tiny.pipe.save_pretrained(tmp_path / "model")
    rows = {name: torch.cat([row[name] for row in tiny.inputs]) for name in tiny.inputs[0]}
    save_file(rows, tmp_path / "prompts.safetensors")
    (tmp_path / "wan.yaml").write_text(RECIPE.format(call=json.dumps(tiny.call)))
    manifests = pipeline.compile(load_recipe(tmp_path / "wan.yaml"), tmp_path / "out" / "wan.engine")
    assert [m.source.subfolder for m in manifests] == ["transformer", "transformer_2"]
    for name, manifest in zip(("transformer", "transformer_2"), manifests, strict=True):
        assert Manifest.read(tmp_path / "out" / f"wan.{name}.json") == manifest
        assert manifest.plugin_layers == len(manifest.sparse) > 0
        assert (tmp_path / "out" / f"wan.{name}.engine").read_bytes()[:4] == b"vtrt"
    hashes = {manifest.source.sha256 for manifest in manifests}
    assert len(hashes) == 2, "each has its own weights"


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
