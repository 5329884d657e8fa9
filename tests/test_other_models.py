# SPDX-License-Identifier: Apache-2.0
"""What is no diffusers pipeline, compiled from recorded calls: a plain ONNX file, and a module of the user's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lynx_compile import pipeline
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError
from lynx_compile.passes.export import export
from lynx_compile.recipe import load_recipe
from tests.conftest import open_dit

RECIPE = """\
model: {model}
calibration: {{recording: calls}}
sparsity: {{operand: weight}}
compensation: {{tune: false}}
"""


@pytest.fixture(scope="module")
def recorded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny FLUX as ``flux.onnx`` in fp16, and its recorded ``calls``."""
    folder = tmp_path_factory.mktemp("other")
    dit, recording = open_dit(load_recipe(tiny / "tiny.yaml"))
    export(dit, folder / "flux.onnx", torch.float16)
    shutil.copytree(recording.folder, folder / "calls")
    return folder


def _compile(folder: Path, model: str, output: Path) -> Manifest:
    (folder / "r.yaml").write_text(RECIPE.format(model=model))
    (manifest,) = pipeline.compile(load_recipe(folder / "r.yaml"), output)
    return manifest


@pytest.mark.slow
def test_an_onnx_file_becomes_an_engine(recorded: Path, compiled_tiny: Path, tmp_path: Path) -> None:
    manifest = _compile(recorded, "{onnx: flux.onnx, dtype: fp16}", tmp_path / "flux.engine")
    module = Manifest.read(compiled_tiny.with_suffix(".json"))
    assert manifest.plugin_layers == module.plugin_layers == 10
    assert [node.out_channels for node in manifest.sparse] == [node.out_channels for node in module.sparse]
    assert manifest.call is None, "no torch module calls it"
    assert [tensor.name for tensor in manifest.inputs] == [tensor.name for tensor in module.inputs]


@pytest.mark.slow
def test_a_module_that_a_recipe_names_becomes_an_engine(recorded: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tiny / "model" / "transformer"
    model = (
        f"{{module: 'diffusers:FluxTransformer2DModel', config: {folder / 'config.json'}, "
        f"weights: {folder / 'diffusion_pytorch_model.safetensors'}, dtype: fp16}}"
    )
    manifest = _compile(recorded, model, tmp_path / "flux.engine")
    assert manifest.plugin_layers == 10 and manifest.call is not None


def test_calls_of_other_shapes_are_refused(recorded: Path, tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "tiny.yaml")
    once = recipe.calibration.model_copy(update={"samples": 1, "batch": 1})
    _, recording = open_dit(recipe.model_copy(update={"calibration": once}))
    shutil.copytree(recording.folder, tmp_path / "calls")
    for path in recorded.glob("flux.onnx*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(
        InputError, match=r"takes 'hidden_states' \[2, 64, 4\], which has shape \[1, 64, 4\] there"
    ):
        _compile(tmp_path, "{onnx: flux.onnx, dtype: fp16}", tmp_path / "out" / "flux.engine")
