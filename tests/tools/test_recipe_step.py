# SPDX-License-Identifier: Apache-2.0
"""A recipe's own model and calls, as ``bench --model`` measures them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from lynx_compile import cli
from lynx_compile.errors import InputError
from lynx_compile.passes.speed_table import Form
from lynx_compile.recipe import load_recipe
from lynx_compile.tools import bench_model, full_size, model_forms
from lynx_compile.tools.full_size import Size
from lynx_compile.tools.recipe_step import step_models
from tests.conftest import open_dit
from tests.tools.test_bench_model import TINY

FLUX = "model: {source: black-forest-labs/FLUX.1-dev}\n"


def models(path: Path, folder: Path, *, random: bool = False) -> Any:
    said: list[str] = []
    return *step_models(path, folder, random_weights=random, log=said.append), said


def weight(module: torch.nn.Module) -> torch.Tensor:
    found: Any = module.get_submodule("transformer_blocks.0.attn.to_q")
    return found.weight


def test_its_checkpoint_and_the_call_of_its_pipeline(tiny: Path, tmp_path: Path) -> None:
    model, said = models(tiny / "tiny.yaml", tmp_path)
    assert said == ["the pipeline runs once, to see how it calls its transformer"]
    assert (model.name, model.class_name) == ("tiny", "FluxTransformer2DModel")
    assert model.what == f"as called by FluxPipeline, 128x128 pixels, weights of {tiny / 'model'}"
    module, call = model.build("cpu"), model.step("cpu")
    stored = load_file(tiny / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(weight(module), stored["transformer_blocks.0.attn.to_q.weight"].half())
    assert tuple(call["hidden_states"].shape) == (2, 64, 4) and call["hidden_states"].dtype == torch.float16
    assert call["img_ids"].dtype == torch.float32 and "return_dict" not in call
    with torch.no_grad():
        assert module(**call, return_dict=False)[0].shape == (2, 64, 4)
    observed = model_forms.observe(module, call)
    model_forms.merge_dense(module, observed)
    assert all(isinstance(each, model_forms.DenseLinear) for each in model_forms.dense_linears(module))


def test_random_weights_where_there_are_none_or_none_are_wanted(tiny: Path, tmp_path: Path) -> None:
    _, recording = open_dit(load_recipe(tiny / "tiny.yaml"))
    shutil.copytree(recording.folder, tmp_path / "calls")
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    text = f"model: {{source: SOURCE, dtype: fp16}}\ncalibration: {{recording: {tmp_path / 'calls'}}}\n"
    for source, random in ((tiny / "model", True), (tmp_path / "model", False)):
        (tmp_path / "r.yaml").write_text(text.replace("SOURCE", str(source)))
        model, said = models(tmp_path / "r.yaml", tmp_path / "scratch", random=random)
        assert model.weights == "random weights" and (random or "Weights are random" in said[0])
        module, call = model.build("cpu"), model.step("cpu")
        assert weight(module).dtype == torch.float16 and 0.05 < weight(module).std() < 0.5
        with torch.no_grad():
            assert module(**call, return_dict=False)[0].isfinite().all()


def test_a_checkpoint_of_known_size_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "r.yaml").write_text(f"{FLUX}call: {{height: 768, width: 1360, max_sequence_length: 256}}\n")
    model, said = models(tmp_path / "r.yaml", tmp_path)
    assert "HF_HUB_OFFLINE" in said[0] and "Weights are random" in said[0]
    assert model.what == "1360x768 pixels, 256 text tokens, batch 1, random weights"
    assert models(tmp_path / "r.yaml", tmp_path, random=True)[1] == []
    assert Size.of_call({}, 2) == Size(64, 64, 512, 2)
    (tmp_path / "r.yaml").write_text("model: {source: somebody/other}\n")
    with pytest.raises(InputError, match="could not be fetched"):
        models(tmp_path / "r.yaml", tmp_path)
    (tmp_path / "r.yaml").write_text("model: {onnx: a.onnx}\ncalibration: {recording: calls}\n")
    with pytest.raises(InputError, match="a step is measured of a torch module"):
        models(tmp_path / "r.yaml", tmp_path)


def test_without_a_gpu_the_plan_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = dataclasses.replace(full_size.find("flux1_dev"), config=TINY["flux1_dev"])
    monkeypatch.setattr(full_size, "MODELS", (small,))
    (tmp_path / "r.yaml").write_text(FLUX)
    monkeypatch.setattr(
        "sys.argv", ["lynx-compile", "bench", "--model", f"{tmp_path}/r.yaml", "--random-weights"]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "r (1024x1024 pixels, 512 text tokens, batch 1, random weights), planned for sm80" in said
    assert "51 linears 2:4 weights, " in said and "error: There is no GPU here" in said


def test_the_plan_of_an_engine_is_that_of_its_manifest() -> None:
    class Node:
        linears, operand, fp8 = ("a", "b"), "weight", True

    class Manifest:
        sparse = (Node,)

    plan = bench_model.plan_of(Manifest)  # type: ignore[arg-type]
    assert plan == {"a": Form("weight", True), "b": Form("weight", True)}
    assert bench_model.mixture_of(plan, ["a", "b", "c"]) == {"2:4 weights in FP8": 2, "dense": 1}
