# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every transformer class of diffusers, with inputs: what is shown to work is shown on these."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers.models.transformers
import torch
from diffusers import ModelMixin

from lynx_compile.tools.support.audio_models import AUDIO_MODELS
from lynx_compile.tools.support.draws import Tiny, drawn, has_mask
from lynx_compile.tools.support.image_models import IMAGE_MODELS
from lynx_compile.tools.support.video_models import VIDEO_MODELS

TINY: dict[str, Tiny] = IMAGE_MODELS | VIDEO_MODELS | AUDIO_MODELS


@dataclass(frozen=True)
class Example:
    """A tiny model, in float32 and eval mode, and arguments for its ``forward``.

    ``second``: other values of the same shapes. ``masked``: the first values with another mask; None if it has none.
    """

    name: str
    module: torch.nn.Module
    inputs: dict[str, Any]
    second: dict[str, Any]
    masked: dict[str, Any] | None


def classes() -> dict[str, type[ModelMixin]]:
    """Every transformer class of the installed diffusers, by name."""
    package = diffusers.models.transformers
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]
    return {
        name: kind
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__
    }


def names(class_name: str) -> list[str]:
    """The tiny configurations of a class."""
    return [name for name, tiny in TINY.items() if tiny.class_name == class_name]


def example(name: str, seed: int = 0) -> Example:
    """A tiny configuration as a module with inputs; the same for the same seed."""
    tiny = TINY[name]
    module = model(classes()[tiny.class_name], tiny.config, seed)
    inputs = tiny.inputs | {"return_dict": False}
    if "return_dict" not in inspect.signature(type(module).forward).parameters:
        inputs = tiny.inputs
    masked = drawn(inputs, "masked", seed) if has_mask(inputs) else None
    return Example(name, module, drawn(inputs, "first", seed), drawn(inputs, "second", seed), masked)


def model(kind: Any, config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A model with random weights. Those that start as zeros or ones are filled too, or they would hide what is wrong.

    Gates of zero switch blocks off; biases of zero and scales of one cannot get lost.
    """
    with torch.random.fork_rng(), _uninitialised_is_nan():
        torch.manual_seed(seed)
        module: torch.nn.Module = kind(**config).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.isnan().any():  # left to a checkpoint, such as padding tokens
                parameter.zero_()
            if parameter.unique().numel() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module


@contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """What ``torch.empty`` gives meanwhile is NaN, and not whatever was there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
