# SPDX-License-Identifier: Apache-2.0
"""LoRAs folded into a checkpoint are what diffusers fuses."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file

from lynx_compile.errors import InputError
from lynx_compile.files.outputs import Outputs
from lynx_compile.files.ownership import refuse_foreign
from lynx_compile.models.opened import open_model
from lynx_compile.recipe import Recipe, load_recipe
from lynx_compile.tools import check as tools_check
from lynx_compile.tools.check import check

pytest.importorskip("peft", reason="diffusers reads LoRAs by it")
ADAPTED = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out", "x_embedder")


def write_lora(
    path: Path,
    transformer: Path,
    seed: int,
    rank: int = 4,
    alpha: float | None = None,
    adapted: Sequence[str] = ADAPTED,
) -> Path:
    """A LoRA of random values in diffusers' own layout, of linears of a model of FLUX's class."""
    generator = torch.Generator().manual_seed(seed)
    weights = FluxTransformer2DModel.from_pretrained(transformer).state_dict()
    found = {}
    for name in adapted:
        rows, channels = weights[f"{name}.weight"].shape
        found[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, channels, generator=generator) / 4
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 4
        if alpha is not None:
            found[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    save_file(found, path)
    return path


@pytest.fixture
def project(tiny: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "project"))
    write_lora(folder / "a.safetensors", folder / "model" / "transformer", 1)
    write_lora(folder / "b.safetensors", folder / "model" / "transformer", 2, rank=8, alpha=4.0)
    return folder


def opened(project: Path, loras: str) -> Any:
    text = (project / "tiny.yaml").read_text().replace("model:", f"model:\n  loras: {loras}", 1)
    (project / "lora.yaml").write_text(text)
    return open_model(load_recipe(project / "lora.yaml"), project / "converted").of("transformer")


def test_folded_is_what_diffusers_fuses(project: Path) -> None:
    checkpoint = opened(project, "[{source: a.safetensors, scale: 0.5}, {source: b.safetensors}]")
    module = FluxTransformer2DModel.from_pretrained(project / "model" / "transformer")
    pipe = FluxPipeline(None, None, None, None, None, None, module)
    pipe.load_lora_weights(str(project / "a.safetensors"), adapter_name="first")
    pipe.load_lora_weights(str(project / "b.safetensors"), adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, 1.0])
    pipe.fuse_lora(adapter_names=["first", "second"])
    pipe.unload_lora_weights()
    fused, plain = module.state_dict(), opened(project, "[]")
    assert set(fused) == set(checkpoint.tensors)
    for name, wanted in fused.items():
        torch.testing.assert_close(checkpoint.tensor(name), wanted, rtol=1e-5, atol=1e-6)
        changed = name.removesuffix(".weight") in ADAPTED
        assert torch.equal(checkpoint.tensor(name), plain.tensor(name)) != changed
    digest = checkpoint.digest()
    assert checkpoint.loras[0].endswith("a.safetensors x 0.5") and digest != plain.digest()
    written = list((project / "converted").iterdir())
    again = opened(project, "[{source: a.safetensors, scale: 0.5}, {source: b.safetensors}]")
    assert again.digest() == digest and list((project / "converted").iterdir()) == written
    assert opened(project, "[{source: a.safetensors}]").digest() != digest
    assert len(list((project / "converted").iterdir())) == 1, "one component has one folded copy"


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("[{source: none.safetensors}]", "The LoRA .*none.safetensors does not exist. Correct model.loras"),
        ("[{source: broken.safetensors}]", "broken.safetensors cannot be read"),
        ("[{source: foreign.safetensors}]", "changes nothing in 'transformer'"),
        ("[{source: large.safetensors}]", "does not fit 'transformer'"),
        (
            "[{source: a.safetensors, component: transformer_2}]",
            "is for 'transformer_2', which is not compiled",
        ),
        ("[{source: norm.safetensors}]", "norm_out.*which is of no low rank"),
        ("[{source: a.safetensors, scale: 1.0e+300}]", "model.loras make the weight .* infinite or NaN"),
    ],
)
def test_what_cannot_be_folded_is_named(project: Path, loras: str, message: str) -> None:
    (project / "broken.safetensors").write_bytes(b"no header")
    save_file(
        {"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)},
        project / "foreign.safetensors",
    )
    path = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{path}.lora_A.weight": torch.ones(2, 640), f"{path}.lora_B.weight": torch.ones(640, 2)}
    save_file(pair, project / "large.safetensors")
    save_file({**pair, "transformer.norm_out.linear.weight": torch.ones(4)}, project / "norm.safetensors")
    with pytest.raises(InputError, match=message):
        opened(project, loras)


def test_a_cache_that_check_has_begun_is_the_compilations(project: Path, tmp_path: Path) -> None:
    text = (
        (project / "tiny.yaml").read_text().replace("model:", "model:\n  loras: [{source: a.safetensors}]", 1)
    )
    (project / "checked.yaml").write_text(text)
    outputs = Outputs.of(tmp_path / "x.engine")
    assert "GiB" in "".join(check(load_recipe(project / "checked.yaml"), outputs.engine))
    assert list((outputs.cache / "converted").iterdir())
    refuse_foreign(outputs)


def test_a_check_that_is_stopped_while_it_folds_leaves_a_cache_of_ours(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(recipe: Recipe, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "transformer.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tools_check, "open_model", stopped)
    outputs = Outputs.of(tmp_path / "x.engine")
    with pytest.raises(KeyboardInterrupt):
        list(check(load_recipe(project / "tiny.yaml"), outputs.engine))
    refuse_foreign(outputs)
