# SPDX-License-Identifier: Apache-2.0
"""A small random FLUX checkpoint, on disk as diffusers lays it out, and a recipe for it."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file

from lynx_compile.files.progress import no_progress
from lynx_compile.models import prompts
from lynx_compile.models.dit import DiT, find_dit
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.opened import open_model
from lynx_compile.models.recording import Recording
from lynx_compile.models.structure import LinearGroup, find_structure
from lynx_compile.passes.record import record
from lynx_compile.recipe import Recipe
from lynx_compile.tools import bench

os.environ["HF_HUB_OFFLINE"] = "1"
# A shell starts background jobs with Ctrl-C ignored, and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models are tiny; more threads only get in each other's way

TINY = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}
FLUX_DEV = TINY | {  # the config of FLUX.1-dev
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    **{name: [None, None] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")},
}
RECIPE = """\
model:
  source: model
  dtype: fp16
call:
  height: 128
  width: 128
  num_inference_steps: 4
  output_type: latent
calibration:
  prompts: prompts.safetensors
  samples: 6
  batch: 2
budget: false
compensation:
  tune: false
"""

LONG = (
    "test_cli.py",
    "test_outputs.py",
    "test_classes.py",
    "test_flagship.py",
    "test_stopped.py",
    "test_capture.py",
    "test_pipeline.py",
)


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What is imported by now stays: the garbage collector need not walk it again, half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take a minute come first: at the end, all but one of the workers would wait for them."""
    items.sort(key=lambda item: LONG.index(name) if (name := item.path.name) in LONG else len(LONG))


@cache
def tiny_groups() -> tuple[LinearGroup, ...]:
    """The groups of the tiny model in its recipe's call."""
    return flux_groups(TINY)


def flux_groups(
    config: dict[str, Any], side: int = 8, text: int = 4, batch: int = 2
) -> tuple[LinearGroup, ...]:
    """The groups of a FLUX for ``side`` x ``side`` image tokens and ``text`` text tokens."""
    with torch.device("meta"):
        skeleton = FluxTransformer2DModel.from_config(config)
    arguments = {
        "hidden_states": torch.empty(batch, side * side, config["in_channels"], device="meta"),
        "encoder_hidden_states": torch.empty(batch, text, config["joint_attention_dim"], device="meta"),
        "pooled_projections": torch.empty(batch, config["pooled_projection_dim"], device="meta"),
        "timestep": torch.empty(batch, device="meta"),
        "guidance": torch.empty(batch, device="meta") if config["guidance_embeds"] else None,
        "img_ids": torch.empty(side * side, 3, device="meta"),
        "txt_ids": torch.empty(text, 3, device="meta"),
    }
    return find_structure(skeleton, arguments).groups


def open_dit(recipe: Recipe) -> tuple[DiT, Recording]:
    """The recipe's transformer, and its pipeline's calls."""
    opened = open_model(recipe, _scratch() / "converted")
    rows = prompts.read(Path(recipe.calibration.prompts or ""))
    calls = recipe.calibration.model_copy(update={"memory_gib": 1.0, "tokens_per_call": 1})
    name = hashlib.sha256(f"{recipe.model} {recipe.call} {calls}".encode()).hexdigest()[:16]
    recording = record(recipe, opened, rows, _scratch() / name, no_progress)
    calls = recording.ways()[0]
    checkpoint = opened.checkpoints[calls.component]
    return find_dit(checkpoint, recording, calls, DTYPES[recipe.model.dtype]), recording


@cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="lynx-recordings-"))


def write_costs(
    path: Path, gains: Mapping[tuple[int, int, int], tuple[float, float]], rank: int = 16
) -> Path:
    """A cost table as ``lynx-compile bench`` writes it: {(tokens, K, N): gain of activations, of weights}."""
    results = [
        replace(
            bench._predict(bench.Shape("tiny", "linear", *sizes), rank),
            ratio=bench.Ratio(activation, activation / 2, activation * 2),
            weight_ratio=bench.Ratio(weight, weight / 2, weight * 2),
        )
        for sizes, (activation, weight) in gains.items()
    ]
    table = bench.Bench("some GPU", "2", "bf16", True, tuple(results))
    path.write_text(json.dumps(asdict(table)))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` (64 channels, random weights), ``prompts.safetensors`` and ``tiny.yaml``. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**TINY)
    for parameter in model.parameters():  # the default bias of zero would hide a lost bias
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "model" / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "model" / "scheduler")
    (folder / "model" / "model_index.json").write_text(json.dumps(INDEX))
    prompts = {"prompt_embeds": torch.randn(3, 4, 32), "pooled_prompt_embeds": torch.randn(3, 16)}
    save_file(prompts, folder / "prompts.safetensors")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def compiled_tiny(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of ``tiny.yaml``, with everything that a compilation leaves beside it. Read only."""
    from lynx_compile import pipeline
    from lynx_compile.recipe import load_recipe

    output = tmp_path_factory.mktemp("compiled") / "tiny.engine"
    pipeline.compile(load_recipe(tiny / "tiny.yaml"), output)
    return output
