# SPDX-License-Identifier: Apache-2.0
"""A small random FLUX checkpoint, on disk as diffusers lays it out, and a recipe for it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file

from lynx_compile import models
from lynx_compile.models import flux
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
RECIPE = """\
model:
  source: model
  dtype: fp16
shapes:
  batch: 2
  height: 16
  width: 16
  text_length: 4
calibration:
  source: prompts.safetensors
  samples: 6
  steps: 4
"""


def tiny_groups() -> tuple[models.LinearGroup, ...]:
    """The groups of the tiny model at its recipe's shapes."""
    return models.find_groups(TINY, flux.example_inputs(TINY, 2, 8, 8, 4, torch.float16))


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
    prompts = {"encoder_hidden_states": torch.randn(3, 4, 32), "pooled_projections": torch.randn(3, 16)}
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
