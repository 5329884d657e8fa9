# SPDX-License-Identifier: Apache-2.0
"""diffusers' own pipelines around tiny transformers, driven with encoded prompts: nothing but the transformer runs.

They are real in what matters to a compiler: what the pipeline hands its transformer, how often and in which order.
Text encoders, tokenizers and autoencoders are left out; every pipeline that takes ``prompt_embeds`` runs without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from lynx_compile.tools.support.configurations import TINY, classes, model
from lynx_compile.tools.support.draws import Mask, Normal, drawn

LENGTHS = (12, 7)  # text tokens of the two prompts
TEXT = 12  # text tokens where the pipeline pads every prompt to one length


@dataclass(frozen=True)
class TinyPipeline:
    """How a pipeline of diffusers becomes a tiny one.

    ``transformers``: {component: configuration}, with what of it the pipeline needs otherwise.
    ``prompt``: draws for the pipeline's own arguments of a prompt, by its number of text tokens.
    ``scheduler``: the class that the checkpoints of this pipeline name, and its settings.
    ``parts``: other components, made anew for every pipeline.
    """

    class_name: str
    transformers: dict[str, tuple[str, dict[str, Any]]]
    call: dict[str, Any]
    prompt: Callable[[int], dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {})
    settings: dict[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A tiny pipeline with two prompts and the arguments of its call: what ``capture`` takes."""

    pipe: Any
    inputs: list[dict[str, Any]]
    call: dict[str, Any]


def prepare(name: str, seed: int = 0) -> Prepared:
    """A tiny pipeline, the same for the same seed."""
    tiny = PIPELINES[name]
    components: dict[str, Any] = {
        component: model(
            classes()[TINY[configuration].class_name], TINY[configuration].config | changes, seed + i
        )
        for i, (component, (configuration, changes)) in enumerate(tiny.transformers.items())
    }
    kind, options = tiny.scheduler
    components["scheduler"] = getattr(diffusers, kind)(**options)
    components |= {part: make() for part, make in tiny.parts.items()}
    pipeline = getattr(diffusers, tiny.class_name)
    missing = {
        part: None for part in pipeline._get_signature_types() if part not in components | tiny.settings
    }
    pipe = pipeline(**missing | components | tiny.settings)
    inputs = [drawn(tiny.prompt(length), "first", seed + length) for length in LENGTHS]
    return Prepared(pipe, inputs, dict(tiny.call))


def _embeds(width: int, pooled: int = 0, negative: bool = True) -> Callable[[int], dict[str, Any]]:
    """``prompt_embeds`` of one length, as encoders that pad make them, and those of an empty prompt for guidance."""

    def prompt(length: int) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt_embeds": Normal((1, TEXT, width))}
        if pooled:
            found["pooled_prompt_embeds"] = Normal((1, pooled))
        if negative:
            found |= {f"negative_{name}": draw for name, draw in found.items()}
        return found

    return prompt


def _masked(mask: str, width: int, negative_length: int | None = None) -> Callable[[int], dict[str, Any]]:
    """``prompt_embeds`` with their mask, of one length unless ``negative_length`` gives another to the empty prompt."""

    def prompt(length: int) -> dict[str, Any]:
        length, other = (length, negative_length) if negative_length else (TEXT, TEXT)
        return {
            "prompt_embeds": Normal((1, length, width)), mask: Mask((1, length), torch.int64),
            "negative_prompt_embeds": Normal((1, other, width)), f"negative_{mask}": Mask((1, other), torch.int64),
        }  # fmt: skip

    return prompt


IMAGE = {"height": 64, "width": 64, "num_inference_steps": 3}
VIDEO = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3}

PIPELINES = {
    "Flux": TinyPipeline(
        "FluxPipeline", {"transformer": ("Flux", {})}, IMAGE | {"true_cfg_scale": 2.0}, _embeds(32, 32)
    ),
    "SD3": TinyPipeline("StableDiffusion3Pipeline", {"transformer": ("SD35", {})}, IMAGE, _embeds(32, 64)),
    "Wan": TinyPipeline("WanPipeline", {"transformer": ("Wan", {})}, VIDEO, _embeds(32)),
    "Wan22": TinyPipeline(
        "WanPipeline",
        {"transformer": ("Wan", {}), "transformer_2": ("Wan", {})},
        VIDEO,
        _embeds(32),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        settings={"boundary_ratio": 0.875},
    ),
    "QwenImage": TinyPipeline(
        "QwenImagePipeline", {"transformer": ("QwenImage", {})}, IMAGE, _masked("prompt_embeds_mask", 32, 5)
    ),
    "ZImage": TinyPipeline(
        "ZImagePipeline",
        {"transformer": ("ZImage", {})},
        IMAGE,
        lambda length: {"prompt_embeds": [Normal((length, 32))], "negative_prompt_embeds": [Normal((5, 32))]},
    ),
    "PixArtSigma": TinyPipeline(
        "PixArtSigmaPipeline",
        {"transformer": ("PixArt", {})},
        IMAGE | {"use_resolution_binning": False, "negative_prompt": None},
        _masked("prompt_attention_mask", 32),
        ("DPMSolverMultistepScheduler", {}),
    ),
}
