# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint: what is wrong with it is one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lynx_compile import models
from lynx_compile.errors import InputError
from lynx_compile.models import flux
from lynx_compile.recipe import Recipe, Shapes, load_recipe
from tests.conftest import TINY


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    shutil.copytree(tiny, tmp_path / "copy")
    return tmp_path / "copy"


def _load(folder: Path, **shapes: int) -> models.DiT:
    recipe = load_recipe(folder / "tiny.yaml")
    recipe = recipe.model_copy(update={"shapes": recipe.shapes.model_copy(update=shapes)})
    dit = models.load(recipe)
    assert dit.module is dit.module
    return dit


def _weights(folder: Path) -> Path:
    return folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors"


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(_weights(folder))
        change(tensors)
        save_file(tensors, _weights(folder), {"format": "pt"})

    return edit


def _edit_config(**change: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model" / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def _to_pickle(folder: Path) -> None:
    torch.save(load_file(_weights(folder)), _weights(folder).with_suffix(".bin"))
    _weights(folder).unlink()


def _truncate(folder: Path) -> None:
    _weights(folder).write_bytes(_weights(folder).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "model"), "The model folder .*model does not exist"),
        (
            lambda f: (f / "model/transformer/config.json").unlink(),
            "config.json does not exist. model.source must be",
        ),
        (lambda f: (f / "model/transformer/config.json").write_text("{"), "cannot be read as JSON"),
        (
            lambda f: (f / "model/transformer/config.json").write_text("[]"),
            "the class 'None' is not supported",
        ),
        (_edit_config(_class_name="UNet2DModel"), "the class 'UNet2DModel' is not supported"),
        (_edit_config(num_layers=2), "do not fit their config.json|cannot be loaded"),
        (_to_pickle, "holds no safetensors file.*pickles are never loaded"),
        (_truncate, "cannot be loaded"),
        (_edit_weights(lambda t: t.pop("proj_out.bias")), "missing keys: proj_out.bias|cannot be loaded"),
        (_edit_weights(lambda t: t.update(extra=torch.zeros(1))), "unexpected keys: extra|cannot be loaded"),
        (
            _edit_weights(lambda t: t["proj_out.weight"].fill_(torch.nan)),
            "'proj_out.weight' in .* is not finite",
        ),
        (lambda f: shutil.rmtree(f / "model/scheduler"), "scheduler_config.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copied)
    with pytest.raises(InputError, match=message) as caught:
        _load(copied)
    assert "\n" not in str(caught.value)


def test_shapes_must_be_whole_tokens(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"shapes.height = 17 is not divisible by 2.*Use 16"):
        _load(tiny, height=17)


def test_a_hub_id_that_cannot_be_fetched(tiny: Path) -> None:
    recipe = load_recipe(tiny / "tiny.yaml")
    model = recipe.model.model_copy(update={"source": "nobody/nothing"})
    with pytest.raises(InputError, match="'nobody/nothing' could not be fetched from the hub"):
        models.load(recipe.model_copy(update={"model": model}))


def test_pixels_of_a_token_follow_the_vae(copied: Path) -> None:
    (copied / "model" / "vae").mkdir()
    (copied / "model" / "vae" / "config.json").write_text('{"block_out_channels": [1, 2, 3, 4]}')
    assert _load(copied, height=64, width=32).inputs["hidden_states"].shape == (2, 4 * 2, 4)


def test_digest_changes_with_the_weights(tiny: Path, copied: Path) -> None:
    before = models.load(load_recipe(copied / "tiny.yaml")).digest
    assert before == models.load(load_recipe(tiny / "tiny.yaml")).digest
    _edit_weights(lambda t: t["proj_out.bias"].add_(1))(copied)
    assert before != models.load(load_recipe(copied / "tiny.yaml")).digest


def test_example_inputs(tiny: Path) -> None:
    recipe: Recipe = load_recipe(tiny / "tiny.yaml")
    inputs = models.load(recipe).inputs
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "hidden_states": (2, 64, 4), "encoder_hidden_states": (2, 4, 32), "pooled_projections": (2, 16),
        "timestep": (2,), "img_ids": (64, 3), "txt_ids": (4, 3), "guidance": (2,),
    }  # fmt: skip
    assert inputs["hidden_states"].dtype == torch.float16 and inputs["timestep"].dtype == torch.float32
    assert recipe.shapes == Shapes(batch=2, height=16, width=16, text_length=4)


def test_tokens_of_a_group_are_the_rows_of_its_tensor_at_the_recipes_shapes(tiny: Path) -> None:
    def tokens(**shapes: int) -> dict[str, int]:
        recipe = load_recipe(tiny / "tiny.yaml")
        recipe = recipe.model_copy(update={"shapes": recipe.shapes.model_copy(update=shapes)})
        return {group.name: group.tokens for group in models.load(recipe).groups}

    found = tokens()  # 2 samples of 8 x 8 image and 4 text tokens
    names = (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.ff_context.net.2", "single_transformer_blocks.0.proj_mlp",
        "time_text_embed.timestep_embedder.linear_1", "x_embedder", "context_embedder",
    )  # fmt: skip
    assert [found[name] for name in names] == [128, 128, 8, 8, 136, 2, 128, 8]
    larger = tokens(batch=1, height=32, text_length=6)
    assert [larger[name] for name in names] == [128, 128, 6, 6, 134, 1, 128, 6]


def test_inputs_keep_their_kinds_where_the_structure_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions may be integers and masks booleans, and a model may index with them."""
    dtypes: dict[str, torch.dtype] = {}
    real = flux.MODEL.forward

    def forward(self: torch.nn.Module, **inputs: torch.Tensor) -> object:
        dtypes.update({name: value.dtype for name, value in inputs.items()})
        return real(self, **inputs)

    monkeypatch.setattr(flux.MODEL, "forward", forward)
    inputs = flux.example_inputs(TINY, 2, 8, 8, 4, torch.float16)
    inputs |= {"img_ids": inputs["img_ids"].long(), "txt_ids": inputs["txt_ids"].bool()}
    models.find_groups(TINY, inputs)
    assert (dtypes["img_ids"], dtypes["txt_ids"]) == (torch.int64, torch.bool)
    assert dtypes["hidden_states"] == torch.float32  # as the skeleton's weights are
