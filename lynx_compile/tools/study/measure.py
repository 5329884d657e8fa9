# SPDX-License-Identifier: Apache-2.0
"""How far a module with other linears is from the dense one: on the dense one's own calls, and in images."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lynx_compile.engine.arguments import flatten
from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress
from lynx_compile.models.structure import is_pointwise
from lynx_compile.passes.block_weights import substituted
from lynx_compile.solve.linalg import moved, tensor_cores
from lynx_compile.solve.tune import Rows, TunedLinear, on_channels
from lynx_compile.tools.compare_torch import TorchState, module_outputs, squares_of
from lynx_compile.tools.held_out import Sampler, draw, record_held_out, rows_of_images, time_of
from lynx_compile.tools.images import has_lpips, lpips, psnr, ssim
from lynx_compile.tools.metric import call_metric

Tensors = dict[str, torch.Tensor]
LEAST_LAYER_STATES = 8  # at which linears are compared, in whole calls


@dataclass(frozen=True)
class HeldOut:
    """The dense model's calls for one seed's noise, what it returned, and its images; None where it draws none."""

    sampler: Sampler
    module: nn.Module
    states: Sequence[TorchState]
    outputs: Sequence[Tensors]
    images: np.ndarray | None

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of every step."""
        return tuple(time for _, time in sorted({state.step: state.time for state in self.states}.items()))


@dataclass(frozen=True)
class Measured:
    """As ``results.Run`` has it; ``images`` [n, colours, height, width], None where there are none."""

    layer_error: float
    output_error: float
    by_step: tuple[float, ...]
    psnr: float | None
    ssim: float | None
    lpips: float | None
    metric: dict[str, float] | None
    images: np.ndarray | None


def hold_out(sampler: Sampler, component: str, folder: Path, progress: Progress) -> HeldOut:
    """Run the dense pipeline for the noise of ``sampler``."""
    recording = record_held_out(sampler, component, folder, progress)
    states = []
    for call in recording.calls(component):
        arguments = recording.arguments(call)
        arguments.pop("return_dict", None)
        states.append(TorchState(call.step, time_of(call, flatten(arguments).tensors), arguments))
    module = getattr(sampler.pipe, component)
    with tensor_cores():
        outputs = module_outputs(module, states, progress)
        return HeldOut(sampler, module, states, outputs, draw(sampler, progress))


def measure(
    held_out: HeldOut,
    rows: Mapping[str, Rows],
    dtype: torch.dtype,
    layer_states: int,
    metric: str | None,
    progress: Progress,
) -> Measured:
    """The module with ``rows`` in the place of its linears; 16-bit weights rounded to ``dtype``, as they are written.

    Args:
        layer_states: calls at which every linear is compared on the dense model's own input.
        metric: the recipe's, ``module:function``, which is called.

    Raises:
        StageError: an output is not finite. InputError: the metric fails.
    """
    device = next(held_out.module.parameters()).device
    linears = {path: _linear(moved(part, device), dtype) for path, part in rows.items()}
    with tensor_cores():
        chosen = np.linspace(0, len(held_out.states) - 1, max(layer_states, LEAST_LAYER_STATES)).round()
        few = [held_out.states[number] for number in sorted({int(at) for at in chosen})]
        layer = _layer_error(held_out.module, linears, few, progress)
        with substituted(held_out.module, linears):
            outputs = module_outputs(held_out.module, held_out.states, progress)
            images = None if held_out.images is None else draw(held_out.sampler, progress)
    whole, by_step = _output_errors(held_out, outputs)
    if held_out.images is None or images is None:
        return Measured(layer, whole, by_step, None, None, None, None, None)
    pairs = list(zip(held_out.images, images, strict=True))
    numbers = None
    if metric is not None:
        which = rows_of_images(held_out.sampler, len(images))
        numbers = call_metric(metric, held_out.images, images, which)
    return Measured(
        layer, whole, by_step,
        statistics.fmean(psnr(*pair) for pair in pairs), _mean([ssim(*pair) for pair in pairs]),
        _mean([lpips(*pair) for pair in pairs]) if has_lpips() else None, numbers, images,
    )  # fmt: skip


def _linear(rows: Rows, dtype: torch.dtype) -> TunedLinear:
    """A linear of ``rows``, as it will be stored."""

    def stored(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(dtype).float()

    down = stored(rows.lora_down)
    weight = rows.weight if rows.weight_scale is not None else stored(rows.weight)
    kept = replace(rows, weight=weight, bias=stored(rows.bias), lora_up=stored(rows.lora_up))  # type: ignore[arg-type]
    return TunedLinear(kept, None if down is None else nn.Parameter(down)).requires_grad_(False)


def _layer_error(
    module: nn.Module, linears: Mapping[str, TunedLinear], states: Sequence[TorchState], progress: Progress
) -> float:
    """Mean over the linears of their relative errors, each over all its tokens."""
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)

    def hook(path: str, tuned: TunedLinear) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
        def compare(linear: nn.Module, given: tuple[Any, ...], y_dense: torch.Tensor) -> None:
            y = on_channels(tuned, given[0]) if is_pointwise(linear) else tuned(given[0])
            pair = (y.float() - y_dense.float(), y_dense.float())
            squares[path].append(torch.stack([part.square().sum(dtype=torch.float64) for part in pair]))

        return compare

    with ExitStack() as stack, torch.no_grad():
        for path, tuned in linears.items():
            handle = module.get_submodule(path).register_forward_hook(hook(path, tuned))
            stack.callback(handle.remove)
        if linears:
            module_outputs(module, states, progress)
    errors = []
    for found in squares.values():
        lost, dense = torch.stack(found).sum(0).tolist()
        errors.append(math.sqrt(lost / max(dense, 1e-30)))
    return statistics.fmean(errors) if errors else 0.0


def _output_errors(held_out: HeldOut, outputs: Sequence[Tensors]) -> tuple[float, tuple[float, ...]]:
    """Over all calls, and over those of each step."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for state, found, dense in zip(held_out.states, outputs, held_out.outputs, strict=True):
        for name, y_dense in dense.items():
            squares = squares_of(found[name], y_dense)
            if not math.isfinite(squares.lost):
                raise StageError("study", f"'{name}' is not finite.", "Set model.dtype to bf16.")
            sums[state.step][0] += squares.lost
            sums[state.step][1] += squares.dense
    by_step = tuple(math.sqrt(lost / max(dense, 1e-30)) for _, (lost, dense) in sorted(sums.items()))
    lost, dense = (sum(part) for part in zip(*sums.values(), strict=True))
    return math.sqrt(lost / max(dense, 1e-30)), by_step


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if len(found) == len(values) else None
