# SPDX-License-Identifier: Apache-2.0
"""A recipe for torch: compiled without any TensorRT, and applied."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import lynx_compile
from lynx_compile import pipeline
from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.engine.runtime import Engine
from lynx_compile.errors import InputError
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.inspection import inspect
from lynx_compile.tools.support import autoencoders
from tests.example_programs import encoded, hold, without_encoders


@pytest.fixture(scope="module")
def compiled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with ``backend: torch``, where no TensorRT can be imported."""
    output = tmp_path_factory.mktemp("torch") / "tiny.engine"
    recipe = load_recipe(tiny / "tiny.yaml")
    engine = recipe.engine.model_copy(update={"backend": "torch", "weights": "external"})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tensorrt", "tensorrt_rtx"):
            patch.setitem(sys.modules, name, None)
        patch.setattr(trt, "backend", lambda choice: pytest.fail("a TensorRT was asked for"))
        pipeline.compile(recipe.model_copy(update={"engine": engine}), output)
    return output


def arguments() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    return {
        "hidden_states": torch.randn(2, 64, 4, generator=generator).half(),
        "encoder_hidden_states": torch.randn(2, 4, 32, generator=generator).half(),
        "pooled_projections": torch.randn(2, 16, generator=generator).half(),
        "timestep": torch.full((2,), 0.5).half(),
        "guidance": torch.full((2,), 3.5).half(),
        "img_ids": ids,
        "txt_ids": torch.zeros(4, 3),
    }


def test_what_it_leaves_is_applied_and_is_its_onnx(compiled: Path, tiny: Path) -> None:
    manifest = Manifest.read(compiled.with_suffix(".json"))
    assert (manifest.backend.name, manifest.backend.version) == ("torch", str(torch.__version__))
    module = FluxTransformer2DModel.from_pretrained(tiny / "model" / "transformer", torch_dtype=torch.float16)
    given = arguments()

    def run() -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = module(**given, return_dict=False)[0].double()
        return result

    dense = run()
    lynx_compile.apply(module, compiled)
    found = run()
    session = onnxruntime.InferenceSession(compiled.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    weights: dict[str, Any] = _weights(compiled, manifest)
    kinds = {"fp16": np.float16, "fp32": np.float32}
    feed = {each.name: given[each.name].numpy().astype(kinds[each.dtype]) for each in manifest.inputs}
    wanted = torch.from_numpy(np.asarray(session.run(None, feed | weights)[0])).double()
    assert (found - wanted).norm() / wanted.norm() < min(0.02, (dense - wanted).norm() / wanted.norm() / 3)
    assert {entry.name for entry in session.get_inputs()} == {*feed, *weights}
    lynx_compile.restore(module)
    assert torch.equal(run(), dense)


def test_the_example_draws_with_it(
    compiled: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(pipe: Any, prompt: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return encoded(pipe, prompt, 4, 32), encoded(pipe, prompt, 16), torch.zeros(4, 3).half()

    vae = autoencoders.kl(1).half()
    without_encoders(FluxPipeline, encode, monkeypatch, dtype=torch.float16, vae=vae)
    arguments = ["--model", tiny / "model", "--engine", compiled, "--prompt", "a lynx", "--size", "128"]
    picture = tmp_path / "lynx.png"
    found = hold("flux_text_to_image.py", [*arguments, "--steps", "2", "-o", picture], monkeypatch)
    assert found.shape == (1, 128, 128, 3)


def _weights(compiled: Path, manifest: Manifest) -> dict[str, Any]:
    from safetensors.numpy import load_file

    tensors = load_file(compiled.with_suffix(".safetensors"))
    return {tensor.name: tensors[tensor.name] for tensor in manifest.weights.tensors}


def test_it_is_no_engine_and_says_so(compiled: Path) -> None:
    with pytest.raises(
        InputError, match=r"compiled for torch.*lynx_compile.apply\(pipe.transformer, 'tiny.engine'\)"
    ):
        Engine.open(compiled)
    assert "lynx_compile.apply" in compiled.read_text()
    found = inspect(compiled)
    assert found.problems == () and found.plugin_layers is None


def test_hopper_is_a_target_of_torch_alone(tiny: Path, tmp_path: Path) -> None:
    text = (tiny / "tiny.yaml").read_text().replace("source: model", f"source: {tiny / 'model'}")
    text = text.replace("prompts: prompts", f"prompts: {tiny / 'prompts'}")
    (tmp_path / "a.yaml").write_text(text + "engine:\n  backend: torch\n  gpus: [sm90]\n")
    assert load_recipe(tmp_path / "a.yaml").engine.gpus == ("sm90",)
    (tmp_path / "b.yaml").write_text(text + "engine:\n  gpus: [sm89, sm90]\n")
    with pytest.raises(InputError, match="no TensorRT builds for sm90 ahead of time"):
        load_recipe(tmp_path / "b.yaml")
