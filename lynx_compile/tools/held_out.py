# SPDX-License-Identifier: Apache-2.0
"""What an engine is compared on: the pipeline's calls and images for prompts and noise that calibration did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lynx_compile.engine.arguments import bind, flatten
from lynx_compile.engine.calls import check_constants, result_of
from lynx_compile.engine.manifest import Call, Manifest
from lynx_compile.engine.module import fitted
from lynx_compile.errors import InputError
from lynx_compile.files.progress import Progress
from lynx_compile.models import prompts
from lynx_compile.models.capture import call_pipeline, capture, runs_of, sample_seed
from lynx_compile.models.opened import open_model
from lynx_compile.models.recorder import TIMES
from lynx_compile.models.recording import Call as RecordedCall
from lynx_compile.models.recording import Recording, load
from lynx_compile.passes.record import open_pipeline
from lynx_compile.recipe import Recipe

Values = dict[str, np.ndarray]
Run = Callable[[Values], Values]


@dataclass(frozen=True)
class State:
    """A call on the dense model's trajectory: the graph's inputs, in float32 where they float."""

    step: int
    time: float
    feed: Values


@dataclass(frozen=True)
class Sampler:
    """The recipe's pipeline with what it is called for; None where the recipe has a recording instead.

    ``rows``: per image the prompt's own arguments. ``numbers``: of their rows in the file of prompts.
    ``held_out``: whether calibration saw none of them.
    """

    pipe: Any
    rows: Sequence[Mapping[str, Any]]
    numbers: np.ndarray
    held_out: bool
    recipe: Recipe


def open_sampler(recipe: Recipe, converted: Path, dtype: torch.dtype | None = None) -> Sampler | None:
    """The pipeline, at ``compare.samples`` of the prompts that are kept apart, in turn where there are fewer.

    Args:
        converted: folder for weights that have to be converted to diffusers' layout first.
        dtype: as of ``record.open_pipeline``.

    Raises:
        InputError: the pipeline or the prompts cannot be read.
    """
    if recipe.calibration.prompts is None:
        return None
    rows = prompts.read(Path(recipe.compare.prompts or recipe.calibration.prompts))
    everything = tuple(range(len(rows)))
    split = prompts.split(rows, recipe.calibration.held_out)
    apart = everything if recipe.compare.prompts else split.held_out
    numbers = list(islice(cycle(apart), recipe.compare.samples))
    pipe = open_pipeline(recipe, open_model(recipe, converted), rows, dtype)
    is_held_out = recipe.compare.prompts is not None or not split.shared
    return Sampler(pipe, [rows[number] for number in numbers], np.array(numbers), is_held_out, recipe)


def record_held_out(sampler: Sampler, component: str, folder: Path, progress: Progress) -> Recording:
    """The dense model's calls for the comparison's prompts and noise."""
    recipe = sampler.recipe
    return capture(
        sampler.pipe,
        sampler.rows,
        folder,
        call=recipe.call,
        components=(component,),
        seed=recipe.compare.seed,
        batch=recipe.calibration.batch,
        progress=progress,
    )


def calibration_calls(recipe: Recipe) -> Recording:
    """The recipe's own recording, where there is no pipeline to make another."""
    assert recipe.calibration.recording is not None, "a recipe has prompts or a recording"
    return load(Path(recipe.calibration.recording))


def read_states(recording: Recording, component: str, manifest: Manifest) -> list[State]:
    """The recorded calls that the engine serves.

    Raises:
        InputError: none of them is one.
    """
    found = []
    for recorded, arguments in served_calls(recording, component, manifest):
        flat = flatten(arguments)
        try:
            feed = as_feed(fitted(call_of(manifest), manifest.inputs, flat.tensors, torch.device("cpu")))
        except InputError:
            continue
        found.append(State(recorded.step, time_of(recorded, flat.tensors), feed))
    if not found:
        raise serves_none(component)
    return found


def served_calls(
    recording: Recording, component: str, manifest: Manifest
) -> Iterator[tuple[RecordedCall, dict[str, Any]]]:
    """The recorded calls whose constants are those of the engine's, and their arguments."""
    for recorded in recording.calls(component):
        arguments = recording.arguments(recorded)
        arguments.pop("return_dict", None)
        try:
            check_constants(call_of(manifest), flatten(arguments))
        except InputError:
            continue
        yield recorded, arguments


def call_of(manifest: Manifest) -> Call:
    """How the pipeline calls what was compiled."""
    assert manifest.call is not None, "an engine of a pipeline has one"
    return manifest.call


def time_of(recorded: RecordedCall, tensors: Mapping[str, torch.Tensor]) -> float:
    """A call's time by its own arguments; the step's number where none of them tells."""
    time = next((t for name, t in tensors.items() if name.partition(".")[0] in TIMES), None)
    return float(recorded.step if time is None else time.flatten()[0])


def serves_none(component: str) -> InputError:
    """What is wrong where no recorded call is one of the engine's."""
    return InputError(
        f"The engine serves none of the calls that the pipeline makes of '{component}'.",
        "Compile it again with this recipe.",
    )


def as_feed(tensors: Mapping[str, torch.Tensor]) -> Values:
    """Tensors as ONNX Runtime takes them of a graph in float32."""
    return {
        name: (t.float() if t.is_floating_point() else t).contiguous().numpy() for name, t in tensors.items()
    }


@contextmanager
def replaced(module: torch.nn.Module, manifest: Manifest, run: Run) -> Iterator[None]:
    """``module`` computes with ``run`` meanwhile, and is itself in everything else that a pipeline asks of it."""
    call = call_of(manifest)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = bind(call.parameters, args, kwargs)
        return_dict = bound.pop("return_dict", None)
        given = flatten(bound)
        check_constants(call, given)
        outputs = run(as_feed(fitted(call, manifest.inputs, given.tensors, torch.device("cpu"))))
        like = next(t for t in given.tensors.values() if t.is_floating_point())
        tensors = {name: torch.from_numpy(value).to(like.device) for name, value in outputs.items()}
        tensors = {n: t.to(like.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        return result_of(call.result, tensors, return_dict)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def draw(sampler: Sampler, progress: Progress) -> np.ndarray | None:
    """The pipeline's images [n, colours, height, width] in [0, 1]; of videos, every frame.

    None where it makes something else.
    """
    recipe = sampler.recipe
    runs = runs_of(sampler.rows, recipe.calibration.batch)
    found = []
    for number, run in enumerate(runs):
        progress("runs of the pipeline", number, len(runs))
        arguments = {**recipe.call, **run}
        if getattr(sampler.pipe, "vae", None) is not None:
            arguments["output_type"] = "pt"
        result = call_pipeline(sampler.pipe, arguments, sample_seed(recipe.compare.seed, number))
        found.append(_as_images(sampler, result))
    progress("runs of the pipeline", len(runs), len(runs))
    images = [image for image in found if image is not None]
    if len(images) < len(runs):
        return None
    return torch.cat(images)[: len(sampler.rows) * len(images[0]) // recipe.calibration.batch].numpy()


def rows_of_images(sampler: Sampler, images: int) -> np.ndarray:
    """For each image, or frame of a video, the row of the file of prompts that it was drawn for."""
    return np.repeat(sampler.numbers, images // len(sampler.numbers))


def _as_images(sampler: Sampler, result: Any) -> torch.Tensor | None:
    """What a pipeline returned, as [n, colours, height, width] in [0, 1]."""
    values = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    if isinstance(values, list) and values and all(isinstance(value, torch.Tensor) for value in values):
        values = torch.stack(values)
    if not isinstance(values, torch.Tensor):
        return None
    values = values.detach().float().cpu()
    if getattr(sampler.pipe, "vae", None) is None:
        values = _unpacked(sampler, values) / 2 + 0.5  # it works on pixels in [-1, 1], which are its latents
    if values.ndim == 5:  # videos: [n, frames, colours, height, width]
        values = values.flatten(0, 1)
    return values.clamp(0, 1) if values.ndim == 4 and values.shape[1] in (1, 3, 4) else None


def _unpacked(sampler: Sampler, latents: torch.Tensor) -> torch.Tensor:
    """Latents that the pipeline packs into tokens, by its own function for it."""
    pipe, size = sampler.pipe, sampler.recipe.call
    if latents.ndim != 3 or not hasattr(pipe, "_unpack_latents") or not {"height", "width"} <= size.keys():
        return latents
    unpacked: torch.Tensor = pipe._unpack_latents(
        latents, size["height"], size["width"], pipe.vae_scale_factor
    )
    return unpacked
