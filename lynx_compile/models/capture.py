# SPDX-License-Identifier: Apache-2.0
"""Run the user's own pipeline and record every call that it makes of its transformer.

A hook on the module sees each call before the module does; the pipeline is not changed, and nothing is known of it
but the names of its components. What a compiled graph could not repeat is refused by name.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ModelMixin

from lynx_compile import parallel
from lynx_compile.errors import InputError, LynxError, StageError, first_line
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.models.prompts import update_digest
from lynx_compile.models.recorder import Pipeline, Recorder, call_parameters, class_name, config, listed
from lynx_compile.models.recording import VERSION, Header, Recording, load
from lynx_compile.models.recording_writer import Writer

Inputs = Sequence[Mapping[str, Any]]


def capture(
    pipe: Pipeline,
    inputs: Inputs,
    folder: Path,
    *,
    call: Mapping[str, Any] | None = None,
    components: Sequence[str] = (),
    seed: int = 0,
    batch: int = 1,
    states_per_prompt: int | None = None,
    held_out: Inputs = (),
    model_digest: str = "",
    progress: Progress = no_progress,
) -> Recording:
    """Record what the pipeline hands its transformer for every prompt. The same arguments record the same bytes.

    A run that was stopped goes on with the prompts that are missing; a folder that holds another recording is
    overwritten. Several processes run a share of the prompts each, into one folder; what several of them meet is stored
    several times.

    Args:
        inputs: per prompt, the arguments of ``pipe.__call__`` that are its own, such as ``prompt`` and ``image``;
            see ``prompts.read``. Tensors are encoded prompts, with a batch of 1 in front.
        call: the arguments that are the same for all. The last latents are not decoded unless it says so.
        components: names in ``pipe.components``; by default the diffusers models, neither autoencoders nor encoders,
            that the pipeline calls more than once a run.
        seed: the noise of a prompt depends on it and the prompt's place alone.
        batch: prompts to a run; the last run is filled up from the first prompts.
        states_per_prompt: record so many calls of each component and run, drawn by ``seed``; by default all. The
            first call of every graph is among them, in the first run and where the first run has not got that graph.
        held_out: as ``inputs``; runs of their own, behind the others, from which errors are reported.
        model_digest: of the weights, so that those of another model are not taken for this one's.

    Raises:
        InputError: an argument is not the pipeline's, a component is not there or never called, or a call cannot
            become a graph. StageError: the pipeline fails.
    """
    fitted = runs_of(inputs, batch)
    runs = [*fitted, *(runs_of(held_out, batch) if held_out else ())]
    apart = tuple(range(len(fitted), len(runs)))
    arguments = dict(call or {})
    _check_arguments(pipe, [*arguments, *(name for run in runs for name in run)])
    if states_per_prompt is not None and states_per_prompt < 1:
        raise InputError(
            f"states_per_prompt is {states_per_prompt}.", "Record at least one state of a prompt."
        )
    modules = _modules(pipe, components)
    choices = [arguments, list(components), seed, batch, states_per_prompt, len(fitted), model_digest]
    key = _key(pipe, modules, choices, runs)

    def record(number: int) -> None:
        progress("prompts", number, len(runs))
        known = modules if writer.components is None else {c.name: modules[c.name] for c in writer.components}
        recorder = Recorder(pipe, known, writer, set(components), states_per_prompt, seed, number)
        try:
            with recorder.listening():
                call_pipeline(pipe, arguments | runs[number], sample_seed(seed, number), recorder)
            writer.finish(recorder.sample, writer.components or recorder.components())
        finally:
            recorder.sample.close()

    with parallel.first_process_first():  # the first run tells all what is to be recorded
        writer = Writer(folder, Header(VERSION, key, type(pipe).__name__, (), len(runs), apart))
        if 0 in writer.missing:
            record(0)
    for number in parallel.share(range(len(runs))):
        if number in writer.missing:
            record(number)
    parallel.meet()
    progress("prompts", len(runs), len(runs))
    return load(folder)


def call_pipeline(
    pipe: Pipeline, arguments: Mapping[str, Any], seed: int, recorder: Recorder | None = None
) -> Any:
    """Call the pipeline once. Its last latents are not decoded unless ``arguments`` say so.

    Raises:
        InputError: it refuses its arguments. StageError: it fails.
    """
    known = call_parameters(pipe)
    arguments = dict(arguments)
    if "generator" in known:
        arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    if "output_type" in known:
        arguments.setdefault("output_type", "latent")
    if recorder is not None and "callback_on_step_end" in known and "callback_on_step_end" not in arguments:
        recorder.counts_steps = True
        arguments["callback_on_step_end"] = recorder.on_step_end
        if "callback_on_step_end_tensor_inputs" in known:
            arguments["callback_on_step_end_tensor_inputs"] = []
    placed = {name: _placed(pipe, value) for name, value in arguments.items()}
    name = type(pipe).__name__
    with torch.random.fork_rng(), torch.no_grad(), _without_progress_bar(pipe):
        torch.manual_seed(seed)
        try:
            inspect.signature(type(pipe).__call__).bind(pipe, **placed)
        except TypeError as error:
            raise InputError(
                f"The {name} refuses its arguments ({first_line(error)}).", "Correct 'call:'."
            ) from None
        try:
            return pipe(**placed)
        except LynxError:
            raise
        except ValueError as error:  # what pipelines raise when they check their arguments
            raise InputError(
                f"The {name} refuses its arguments ({first_line(error)}).", "Correct 'call:'."
            ) from error
        except Exception as error:
            reason = f"the {name} failed ({type(error).__name__}: {first_line(error)})."
            raise StageError("capture", reason, "Check that the pipeline runs by itself.") from error


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _placed(pipe: Pipeline, value: Any) -> Any:
    """An encoded prompt where the pipeline computes and, if it is a floating one, in its dtype."""
    if isinstance(value, list):
        return [_placed(pipe, item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(pipe._execution_device, pipe.dtype if value.is_floating_point() else None)


def runs_of(inputs: Inputs, batch: int) -> list[dict[str, Any]]:
    """The prompts' own arguments, run by run; the last run is filled up from the first prompts."""
    if not inputs:
        raise InputError("There is no prompt.", "Give at least two of different length.")
    for row in inputs:
        if row.keys() != inputs[0].keys():
            raise InputError(
                f"The prompts do not have the same arguments ({listed(inputs[0])}; {listed(row)}).",
                "Give each prompt all of them.",
            )
    filled = list(islice(cycle(inputs), -(-len(inputs) // batch) * batch))
    return [_collated(filled[start : start + batch]) for start in range(0, len(filled), batch)]


def _collated(rows: Inputs) -> dict[str, Any]:
    if len(rows) == 1:
        return dict(rows[0])
    return {name: _together([row[name] for row in rows]) for name in rows[0]}


def _together(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        if len({value.shape[1:] for value in values}) > 1:
            raise InputError(
                "Encoded prompts of one run differ in length.", "Pad them, with a mask, or take a batch of 1."
            )
        return torch.cat(values)
    return [item for value in values for item in value] if isinstance(values[0], list) else values


def _check_arguments(pipe: Pipeline, names: Sequence[str]) -> None:
    known = call_parameters(pipe)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean '{close[0]}'?" if close else f"It takes {listed(known)}."
            raise InputError(f"The {type(pipe).__name__} takes no argument '{name}'.", hint)


def _modules(pipe: Pipeline, names: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The modules to listen to: those named, or all that may be the transformer."""
    modules = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    for name in names:
        if name not in modules:
            raise InputError(
                f"The {type(pipe).__name__} has no component '{name}'.", f"It has {listed(modules)}."
            )
    if names:
        return {name: modules[name] for name in names}
    found: dict[str, torch.nn.Module] = {}
    for name, module in modules.items():
        if may_denoise(name, type(module)) and all(module is not other for other in found.values()):
            found[name] = module
    if not found:
        raise InputError(
            f"The {type(pipe).__name__} has no diffusion transformer.", "Name the component to compile."
        )
    return found


def may_denoise(name: str, kind: type) -> bool:
    """Whether a component of this name and class may be the transformer: neither autoencoder nor encoder."""
    # What lives in a pipeline's own folder prepares its conditioning (projections, connectors, duration embedders).
    is_other = kind.__module__.startswith(("diffusers.models.autoencoders", "diffusers.pipelines."))
    return (
        issubclass(kind, ModelMixin) and not is_other and "encoder" not in f"{name} {kind.__name__}".lower()
    )


def _key(
    pipe: Pipeline,
    modules: Mapping[str, torch.nn.Module],
    choices: list[Any],
    runs: list[dict[str, Any]],
) -> str:
    """Digest of all that a recording depends on."""
    configs = {name: config(module) for name, module in modules.items()}
    versions = [torch.__version__, diffusers.__version__]
    digest = hashlib.sha256(json.dumps([class_name(pipe), versions, configs], sort_keys=True).encode())
    for value in (choices, runs):
        update_digest(digest, value)
    return digest.hexdigest()


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a run."""
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint32)[0])
