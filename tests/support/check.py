# SPDX-License-Identifier: Apache-2.0
"""One class of transformers through the whole compiler, stage by stage, on its tiny models and pipelines."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from lynx_compile import recipe
from lynx_compile.engine.arguments import flatten
from lynx_compile.engine.module import EngineModule
from lynx_compile.engine.runtime import Engine
from lynx_compile.models.calls import recorded_call
from lynx_compile.models.capture import call_pipeline, capture
from lynx_compile.models.checkpoint import open_checkpoint
from lynx_compile.models.dit import compiled_arguments, in_engine_dtypes
from lynx_compile.models.recording import Group, Recording
from lynx_compile.models.structure import find_structure
from lynx_compile.passes.build import build
from lynx_compile.passes.export import DenseOnnx, export_lengths, export_module
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.passes.select import SparsityPlan
from lynx_compile.tools.support import configurations, pipelines
from tests.engine.conftest import set_stage
from tests.engine.fakes import FakeCuda
from tests.passes.exact import exact_plan, exact_weights, pruned_weights
from tests.support import direct

EQUAL = 1e-4
VISIBLE = 1e-6  # a mask that changes less than this in eager mode shows nothing


@dataclass
class Row:
    """What was seen of a class; None: not run, or there is nothing to run.

    ``masks_live``: with another mask the exported graph still equals eager. ``candidates``, ``rewritten``: linears.
    ``engine``: TensorRT built one with a plugin layer for every node. ``error``: the largest relative one.
    """

    class_name: str
    pipeline: list[str] = field(default_factory=list)
    captured: bool | None = None
    exported: bool | None = None
    equal: bool | None = None
    masks_live: bool | None = None
    candidates: int | None = None
    rewritten: int | None = None
    engine: bool | None = None
    dropin: bool | None = None
    reason: list[str] = field(default_factory=list)
    error: float | None = None
    fixed: list[str] = field(default_factory=list)


def check(class_name: str, folder: Path, known_stages: set[str]) -> Row:
    """Run the stages. One that fails says why in ``reason``, and those that need it are not run.

    Args:
        known_stages: of ``captured``, ``exported``, ``rewritten``, ``engine`` and ``dropin``, those to run.
    """
    row = Row(class_name)
    names = configurations.names(class_name)
    recordings = _captured(row, class_name, folder) if "captured" in known_stages else {}
    if not names:
        row.reason.append("no tiny configuration")
    if names and "exported" in known_stages:
        dense = {name: _attempt(row, name, partial(_exported, row, name, folder / name)) for name in names}
        row.exported = all(made is not None for made in dense.values())
        row.equal = row.exported and all(made.equal for made in dense.values() if made)
        lives = [made.live for made in dense.values() if made and made.live is not None]
        row.masks_live = all(lives) if lives else None
        row.error = max((made.error for made in dense.values() if made), default=None)
        if row.exported and "rewritten" in known_stages:
            _rewritten(row, dense, folder)
        if row.rewritten and "engine" in known_stages:
            engines = [
                _attempt(row, f"{name}, engine", partial(_engine, name, folder / name / "bf16"))
                for name in names
            ]
            row.engine = all(engines)
    if "dropin" in known_stages:
        prepare = pipelines.prepare if recordings else direct.prepare
        dropins = [
            _attempt(
                row,
                f"{name}, drop-in",
                partial(_dropin, partial(prepare, name), recordings.get(name), class_name, folder / name),
            )
            for name in recordings or names
        ]
        row.dropin = all(dropins) if dropins else None
        if row.dropin and not recordings:
            row.reason.append("drop-in: by calls of the model itself")
    return row


def _attempt(row: Row, what: str, stage: Callable[[], Any]) -> Any:
    """The stage's result, or None and why."""
    try:
        return stage()
    except Exception as error:
        text = textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__
        row.reason.append(f"{what}: {text}")
        return None


def _captured(row: Row, class_name: str, folder: Path) -> dict[str, Recording]:
    """The recordings of the class's pipelines."""
    names = pipelines.names(class_name)
    if not names:
        row.reason.append(f"no pipeline: {pipelines.WITHOUT[class_name]}")
        return {}
    found = {}
    for name in names:
        recording = _attempt(row, name, partial(_capture, name, folder / name / "recording"))
        if recording is not None:
            found[name] = recording
    row.pipeline = sorted({pipelines.PIPELINES[name].class_name for name in found or names})
    row.captured = bool(found)
    return found


def _capture(name: str, folder: Path) -> Recording:
    return _recording(pipelines.prepare(name), folder)


def _recording(prepared: pipelines.Prepared, folder: Path) -> Recording:
    return capture(prepared.pipe, prepared.inputs, folder, call=prepared.call)


@dataclass(frozen=True)
class _Dense:
    dense: DenseOnnx
    error: float
    equal: bool
    live: bool | None


def _exported(row: Row, name: str, folder: Path) -> _Dense:
    """The configuration's float32 ONNX against eager, on other inputs and on another mask."""
    with pytest.MonkeyPatch.context() as patch:
        _keep_float32(patch)
        return _exported_in_float32(row, name, folder)


def _keep_float32(patch: pytest.MonkeyPatch) -> None:
    """For models that round to bfloat16 whatever they are in: ONNX Runtime has none of it on a CPU."""
    patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


def _exported_in_float32(row: Row, name: str, folder: Path) -> _Dense:
    example = configurations.example(name)
    dense = export_module(example.module, example.inputs, folder / "dense.onnx")
    row.fixed += [sentence for sentence in map(str, dense.baked) if sentence not in row.fixed]
    example = configurations.example(name)  # a call may have changed its arguments
    first = _eager(example.module, example.inputs)
    errors = [
        _error(_run(dense.path, given), _eager(example.module, given))
        for given in (example.inputs, example.second)
    ]
    live = None
    if example.masked is not None:
        wanted = _eager(example.module, example.masked)
        if _error(first, wanted) > VISIBLE:
            live = _attempt(row, f"{name}, another mask", lambda: _run(dense.path, example.masked))
            live = live is not None and _error(live, wanted) < EQUAL
    if max(errors) >= EQUAL:
        row.reason.append(f"{name}: differs by {max(errors):.1e}")
    return _Dense(dense, max(errors), max(errors) < EQUAL, live)


def _rewritten(row: Row, dense: Mapping[str, _Dense], folder: Path) -> None:
    row.candidates = row.rewritten = 0
    for name, made in dense.items():
        example = configurations.example(name)
        structure = find_structure(example.module, example.inputs)
        row.candidates += len(structure.candidates)
        make = partial(_lynx, exact_weights, example.module, example.inputs, made.dense, folder / name)
        lynx = _attempt(row, f"{name}, rewrite", make)
        if lynx is None:
            continue
        sparse = {linear for node in lynx.sparse for linear in node.linears}
        row.rewritten += len(sparse)
        left = [
            f"{x.path} ({x.reason})" for x in lynx.dense if x.path in {c.path for c in structure.candidates}
        ]
        if left:
            row.reason.append(f"{name}: {len(left)} candidates stay dense, {left[0]}")
        example = configurations.example(name)
        error = _error(_run(lynx.path, example.inputs), _run(made.dense.path, example.inputs))
        if not error < EQUAL:
            row.reason.append(f"{name}: the rewritten graph differs by {error:.1e}")
            row.rewritten = 0


def _lynx(
    weights: Callable[[torch.nn.Module, SparsityPlan, Path], list[Path]],
    module: torch.nn.Module,
    inputs: Mapping[str, Any],
    dense: DenseOnnx,
    folder: Path,
) -> LynxOnnx:
    """Every candidate rewritten."""
    plan = exact_plan(find_structure(module, inputs).groups)
    return rewrite(dense, plan, weights(module, plan, folder), folder / "lynx.onnx")


def _engine(name: str, folder: Path) -> bool:
    """An engine of TensorRT-RTX for the model as its checkpoint gives it in bfloat16; the build counts plugin layers.

    What the class keeps in float32, and what inputs may stay in it, is as in a run of the compiler.
    """
    example = configurations.example(name)
    example.module.save_pretrained(folder / "checkpoint")
    checkpoint = open_checkpoint(folder / "checkpoint", None)
    inputs = in_engine_dtypes(checkpoint, example.inputs, torch.bfloat16)
    module = checkpoint.load(torch.bfloat16)
    dense = export_module(module, inputs, folder / "dense.onnx", torch.bfloat16)
    lynx = _lynx(pruned_weights, module, inputs, dense, folder)
    built = build(lynx, recipe.Engine(backend="tensorrt_rtx", gpus=("sm80",)), folder / "small.engine")
    return built.plugin_layers == len(lynx.nodes)


def _dropin(
    prepare: Callable[[], pipelines.Prepared], recording: Recording | None, class_name: str, folder: Path
) -> bool:
    """The pipeline's own output with fake engines, which run the exported ONNX, in the place of the class's models."""
    recording = recording or _recording(prepare(), folder / "recording")
    prepared = prepare()
    with pytest.MonkeyPatch.context() as patch:
        _keep_float32(patch)
        expected = [_latents(prepared, prompt) for prompt in range(2)]
        patch.setattr(EngineModule, "device", torch.device("cpu"))
        patch.setattr(EngineModule, "dtype", torch.float32)
        ways: dict[str, list[Engine]] = {}
        for way in recording.ways():
            if recording.component(way.component).class_name.endswith(f":{class_name}"):
                place = folder / way.component / str(way.index)
                made = _engine_of(patch, prepared.pipe, recording, way, place)
                ways.setdefault(way.component, []).append(made)
        for component, engines in ways.items():
            setattr(prepared.pipe, component, EngineModule(engines))
        for prompt, output in enumerate(expected):
            torch.testing.assert_close(_latents(prepared, prompt), output, rtol=1e-3, atol=1e-3)
    return bool(ways)


def _engine_of(
    patch: pytest.MonkeyPatch, pipe: Any, recording: Recording, calls: Group, folder: Path
) -> Engine:
    """A fake engine for one way in which a component is called."""
    component = recording.component(calls.component)
    arguments, axes = compiled_arguments(recording, calls)
    dense = export_lengths(pipe.components[component.name], arguments, axes, folder / "dense.onnx")
    assert dense.output is not None
    stage = set_stage(patch, LynxOnnx(dense.path, dense.path, (), (), (), dense.lengths), FakeCuda())
    call = recorded_call(component, calls, arguments, dense.output, dense.baked)
    stage.change(call=call.model_dump(), source={"config": component.config})
    return Engine.open(stage.path)


def _latents(prepared: pipelines.Prepared, prompt: int) -> list[torch.Tensor]:
    """All tensors that the pipeline returns, not decoded where it lets them be."""
    arguments = prepared.call | prepared.inputs[prompt]
    return list(_arrays(call_pipeline(prepared.pipe, arguments, seed=5)))


def _arrays(value: Any) -> Iterator[torch.Tensor]:
    """Every array in what a pipeline returns; a modular one returns its whole state."""
    if isinstance(value, torch.Tensor | np.ndarray):
        yield torch.as_tensor(value)
    elif is_dataclass(value):
        yield from _arrays([getattr(value, entry.name) for entry in fields(value)])
    elif isinstance(value, Mapping):
        yield from _arrays(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)


def _eager(module: torch.nn.Module, inputs: Mapping[str, Any]) -> list[np.ndarray]:
    with torch.no_grad():
        return [t.numpy() for t in flatten(module(**inputs), "output").tensors.values()]


def _run(path: Path, inputs: Mapping[str, Any]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors, names = flatten(inputs).tensors, {entry.name for entry in session.get_inputs()}
    return list(session.run(None, {name: t.numpy() for name, t in tensors.items() if name in names}))


def _error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest relative error of an output; infinite where something is not a number."""
    errors = [
        float(np.linalg.norm((a - b).astype(np.float64)) / max(float(np.linalg.norm(b)), 1e-30))
        for a, b in zip(found, wanted, strict=True)
    ]
    return max((e if np.isfinite(e) else float("inf") for e in errors), default=0.0)
