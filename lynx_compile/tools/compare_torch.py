# SPDX-License-Identifier: Apache-2.0
"""What ``compare`` measures through torch: the dense module, and the same one with the compiled linears in it.

Both run in the recipe's dtype where the pipeline runs: minutes on a GPU, for a model whose float32 graph a CPU would
need days for. A linear's error and the output's are taken on the dense module's own calls.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lynx_compile.engine.arguments import flatten, parameters, spread, unflatten
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress
from lynx_compile.models.recording import Recording
from lynx_compile.tools.comparison import Squares
from lynx_compile.tools.held_out import served_calls, serves_none, time_of
from lynx_compile.torch_ops.apply import apply, compiled_linears, restore

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TorchState:
    """A call on the dense module's trajectory, on a CPU."""

    step: int
    time: float
    arguments: dict[str, Any]


def read_states(recording: Recording, component: str, manifest: Manifest) -> list[TorchState]:
    """The recorded calls that were compiled for.

    Raises:
        InputError: none of them is one.
    """
    found = [
        TorchState(recorded.step, time_of(recorded, flatten(arguments).tensors), arguments)
        for recorded, arguments in served_calls(recording, component, manifest)
    ]
    if not found:
        raise serves_none(component)
    return found


def module_outputs(module: nn.Module, states: Sequence[TorchState], progress: Progress) -> list[Tensors]:
    """What the module returns in every state, on the CPU."""
    found = []
    for done, state in enumerate(states):
        found.append({name: y.cpu() for name, y in _run(module, state).items()})
        progress("states", done + 1, len(states))
    return found


@contextmanager
def applied(module: nn.Module, engine: Path) -> Iterator[None]:
    """The module computes with the compiled linears meanwhile."""
    apply(module, engine)
    try:
        yield
    finally:
        restore(module)


def output_squares(found: Sequence[Tensors], dense: Sequence[Tensors]) -> list[dict[str, Squares]]:
    """{output: how far it is from the dense module's} for every state.

    Raises:
        StageError: a value is not finite, or the dense module's output is zero.
    """
    return [
        {name: _checked(name, squares_of(y[name], y_dense[name])) for name in y_dense}
        for y, y_dense in zip(found, dense, strict=True)
    ]


def linear_squares(
    module: nn.Module, engine: Path, states: Sequence[TorchState], progress: Progress
) -> dict[str, list[Squares]]:
    """{linear: how far the compiled one is from it on its own input} for every call of it in these states.

    The compiled ones wait in host memory; one at a time is where the module is.
    """
    squares: dict[str, list[Squares]] = defaultdict(list)
    resident = _Resident(next(module.parameters()).device)
    handles = []
    for node, op in compiled_linears(engine):
        for index, path in enumerate(node.linears):
            hook = _hook(resident, op, node.sizes, index, path, squares[path])
            handles.append(module.get_submodule(path).register_forward_hook(hook))
    try:
        for done, state in enumerate(states):
            _run(module, state)
            progress("states", done + 1, len(states))
    finally:
        for handle in handles:
            handle.remove()
    return squares


def squares_of(y: torch.Tensor, y_dense: torch.Tensor) -> Squares:
    """Of one tensor, in float64."""
    y, y_dense = y.double(), y_dense.double()
    return Squares(float((y - y_dense).square().sum()), float(y_dense.square().sum()))


class _Resident:
    """The linear that is on ``device``: the last that was asked for, since readers of one tensor follow one another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of: nn.Module | None = None
        self._copy: Any = None

    def copy_of(self, op: nn.Module) -> Any:
        if self._of is not op:
            self._of, self._copy = op, None
            moved = copy.copy(op)
            moved._buffers = dict(op._buffers)
            self._copy = moved.to(self.device)
        return self._copy


def _hook(
    resident: _Resident, op: nn.Module, sizes: Sequence[int], index: int, path: str, found: list[Squares]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def compare(linear: nn.Module, given: tuple[torch.Tensor, ...], y_dense: torch.Tensor) -> None:
        x = given[0]
        if isinstance(linear, nn.Conv2d):
            x, y_dense = x.movedim(1, -1), y_dense.movedim(1, -1)
        found.append(_checked(path, squares_of(resident.copy_of(op).parts(x, sizes)[index], y_dense)))

    return compare


def _run(module: nn.Module, state: TorchState) -> Tensors:
    device = next(module.parameters()).device
    flat = flatten(state.arguments)
    moved: Mapping[str, torch.Tensor] = {name: value.to(device) for name, value in flat.tensors.items()}
    bound = unflatten(flat.structure, moved)
    known = [parameter for parameter in parameters(module.forward) if parameter.name in bound]
    args, kwargs = spread(known, bound)
    with torch.no_grad():
        result = module(*args, **kwargs)
    return {n: y for n, y in flatten({"y": result}).tensors.items() if y.is_floating_point()}


def _checked(name: str, squares: Squares) -> Squares:
    if not 0 < squares.dense < math.inf:
        raise StageError(
            "compare",
            f"'{name}' is not finite, or zero in the dense model.",
            "Check the calibration inputs and the checkpoint.",
        )
    if not math.isfinite(squares.lost):
        raise StageError("compare", f"'{name}' of the compiled model is not finite.", "Report the model.")
    return squares
