# SPDX-License-Identifier: Apache-2.0
"""A pipeline of two denoisers, from its own call to two engines (Wan 2.2's way)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lynx_compile import pipeline
from lynx_compile.engine.manifest import Manifest
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.support.pipelines import prepare

RECIPE = """\
model: {{source: model, dtype: bf16}}
call: {call}
calibration: {{prompts: prompts.safetensors, samples: 2}}
sparsity: {{operand: weight}}
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
