# SPDX-License-Identifier: Apache-2.0
"""What every linear's form adds at the model's output: by random probes, for all linears and forms at once.

The error d that a form makes in its linear's result moves the model's output by J d, to first order. For random signs v
of the output's shape E (v'J d)^2 = |J d|^2 (Hutchinson, 1990), and v'J, the gradient of v'y at the linear's result, is
what one backward pass gives for all linears. So a row of the result is one probe of one call: <v'J, d> of every linear
and form, over |y_dense|. The square's mean over rows is the squared relative error of a form alone; that of a sum over
linears is that of a plan, with what their errors have in common.

Memory: the model, one block's activations (blocks are computed again on the way back), what every block is given, and
a few nodes' solved weights in float32; those of all nodes where ``calibration.memory_gib`` holds them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from lynx_compile.engine.arguments import flatten
from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.files.tensors import load_keyed, save_keyed, save_tensors
from lynx_compile.models.blocks import block_paths
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Call, Recording
from lynx_compile.models.structure import is_pointwise
from lynx_compile.passes.block_weights import node_linears
from lynx_compile.passes.calibrate import replay
from lynx_compile.passes.select import SparseGroup
from lynx_compile.passes.states import spread_calls, weight_of
from lynx_compile.recipe import Recipe
from lynx_compile.solve.tune import TunedLinear, differentiable_attention, on_channels

SENSITIVITY = StageVersion("sensitivity", 1, ("torch", "diffusers", "transformers"))
FEWEST, MOST = 32, 128  # calls that are probed, spread over steps, branches and samples
ROWS = (
    256  # wanted, a row for each sample of a call and probe: an error's standard deviation is then 4 % of it
)
AT_ONCE = 8  # nodes in memory, where it does not hold all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """``adds`` [rows, columns]: v'J d / |y_dense| of a column's linear and form. ``weights`` [rows], ``steps`` [rows].

    float64, float64 and int64.
    """

    adds: torch.Tensor
    weights: torch.Tensor
    steps: torch.Tensor

    def error(self, adds: torch.Tensor) -> float:
        """Relative error at the output of what adds so much in every row, [rows]: a column, or a sum of columns."""
        return float(((self.weights * adds.square()).sum() / self.weights.sum()) ** 0.5)

    def at(self, steps: range) -> Rows:
        """The rows of some denoising steps."""
        inside = (self.steps >= steps.start) & (self.steps < steps.stop)
        return Rows(self.adds[inside], self.weights[inside], self.steps[inside])


@dataclass(frozen=True)
class Sensitivities:
    """``path``: the ``Rows``. ``columns``: the position of a node among those that were solved, and a linear of it."""

    path: Path
    columns: tuple[tuple[int, str], ...]

    def load(self) -> Rows:
        try:
            return Rows(**load_file(self.path))
        except (OSError, SafetensorError, TypeError) as error:
            raise StageError(
                "sensitivity",
                f"{self.path} cannot be read ({error}).",
                "Run again with --fresh, or delete the cache.",
            ) from None


def sensitivity(
    dit: DiT,
    nodes: Sequence[SparseGroup],
    weights: Sequence[Path],
    recording: Recording,
    recipe: Recipe,
    folder: Path,
    key: str,
    progress: Progress,
) -> Sensitivities:
    """Probe every node that could be, with its compensated ``weights``, on calls that are not held out.

    Deterministic. A call that is done is not probed again by a later run of the same ``key``.

    Raises:
        StageError: an error is not finite.
    """
    columns = columns_of(nodes)
    wanted = min(max(-(-ROWS // recipe.calibration.batch), FEWEST), MOST)
    calls = probed_calls(recording, dit.calls.calls, recipe.calibration.seed, wanted)
    last = max(call.step for call in dit.calls.calls)
    solved = Solved(nodes, weights, dit.device, recipe.calibration.memory_gib)
    least = -(-ROWS // len(calls)) if solved.fit else 1  # reading them is what takes time
    dit.module.requires_grad_(False)
    parts: list[Rows] = []
    with probed(dit.module, columns, solved) as probe:
        for number, call in enumerate(calls):
            progress("calls", number, len(calls))
            path = folder / "calls" / f"{number}.safetensors"
            if (done := load_keyed(path, key)) is not None:
                adds = done[0]["adds"]
            else:
                choice = torch.Generator().manual_seed(recipe.calibration.seed * len(calls) + number)
                adds = probe(partial(_output, dit, recording, call), choice, least)
                if not adds.isfinite().all():
                    raise StageError(
                        "sensitivity",
                        "a gradient is not finite (NaN or infinity).",
                        "Use dtype bf16 (fp16 overflows in some models), or set budget to 'off'.",
                    )
                save_keyed(path, key, {"adds": adds})
            weight = torch.full((len(adds),), weight_of(call, last) / len(adds), dtype=torch.float64)
            parts.append(Rows(adds, weight, torch.full((len(adds),), call.step)))
    progress("calls", len(calls), len(calls))
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    save_tensors(folder / "rows.safetensors", together)
    return Sensitivities(folder / "rows.safetensors", columns)


def columns_of(nodes: Sequence[SparseGroup]) -> tuple[tuple[int, str], ...]:
    """Of ``Rows.adds``: every node's linears."""
    return tuple((number, linear.path) for number, node in enumerate(nodes) for linear in node.linears)


def probed_calls(recording: Recording, calls: Sequence[Call], seed: int, most: int) -> list[Call]:
    """Calls that are not held out, spread over steps, branches and samples."""
    out = recording.held_out(calls)
    left = [call for number, call in enumerate(calls) if number not in out] or list(calls)
    return spread_calls(left, seed, most)


class Solved:
    """The solved linears of nodes, as modules by their columns: kept where they fit, else read when asked for."""

    def __init__(
        self, nodes: Sequence[SparseGroup], paths: Sequence[Path], device: torch.device, memory_gib: float
    ) -> None:
        self.fit = 4 * sum(node.weights for node in nodes) <= memory_gib * 2**30
        # A node's linears are asked for one after the other, each in all forms.
        self._node = lru_cache(None if self.fit else AT_ONCE)(
            lambda number: node_linears(paths[number], device)
        )

    def linear(self, column: tuple[int, str]) -> TunedLinear:
        """The module of a node's linear."""
        number, path = column
        return self._node(number)[path]


Run = Callable[[], tuple[torch.Tensor, ...]]  # one call with gradients: the output's tensors


@contextmanager
def probed(
    module: torch.nn.Module, columns: Sequence[tuple[int, str]], solved: Solved
) -> Iterator[Callable[[Run, torch.Generator, int], torch.Tensor]]:
    """What probes a call of ``module``: (run, choice, least rows) -> ``Rows.adds`` of it."""
    readers: dict[str, list[int]] = {}
    for number, (_, path) in enumerate(columns):
        readers.setdefault(path, []).append(number)
    found: dict[int, torch.Tensor] = {}
    anchor = torch.zeros((), device=next(module.parameters()).device, requires_grad=True)

    def note(path: str, gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        pointwise = is_pointwise(module.get_submodule(path))
        for number in readers[path]:
            linear = solved.linear(columns[number])
            moved = (on_channels(linear, x) if pointwise else linear(x)) - y
            inner = (gradient.float() * moved.float()).flatten(1).sum(1).double().cpu()
            found[number] = found[number] + inner if number in found else inner

    def hook(path: str) -> Callable[..., torch.Tensor]:
        return lambda _, arguments, y: _Seen.apply(y, arguments[0], anchor, partial(note, path))

    def probe(run: Run, choice: torch.Generator, least: int) -> torch.Tensor:
        outputs = run()
        size = sum(float(y.detach().double().square().sum()) for y in outputs) ** 0.5
        rows: list[torch.Tensor] = []
        while sum(map(len, rows)) < least:
            found.clear()
            signs = [torch.randint(0, 2, y.shape, generator=choice).to(y) * 2 - 1 for y in outputs]
            torch.autograd.backward(outputs, signs, retain_graph=True)
            rows.append(_by_samples(found, len(columns), len(outputs[0])) / max(size, 1e-30))
        return torch.cat(rows)

    with ExitStack() as stack:
        stack.enter_context(differentiable_attention())
        for path in block_paths(module):
            block = module.get_submodule(path)
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(patch.object(block, "forward", again))
        for path in readers:
            handle = module.get_submodule(path).register_forward_hook(hook(path))
            stack.callback(handle.remove)
        yield probe


class _Seen(torch.autograd.Function):
    """A linear's result y, whose gradient is noted on its way back with x and y."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, note: Any) -> torch.Tensor:
        """``anchor``: wants a gradient, so that the result does, whatever x is made of."""
        ctx.save_for_backward(x, y)
        ctx.note = note
        return y.clone()  # models may write into it

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        with torch.no_grad():
            ctx.note(gradient, *ctx.saved_tensors)
        return gradient, None, None, None


def _by_samples(found: Mapping[int, torch.Tensor], columns: int, batch: int) -> torch.Tensor:
    """[rows, columns]: a row for each sample of the batch, whose errors have nothing to do with each other; or one.

    A row's square then stands for so many samples.
    """
    apart = all(len(inner) == batch for inner in found.values())
    adds = torch.zeros(batch if apart else 1, columns, dtype=torch.float64)
    for number, inner in found.items():
        adds[:, number] = inner if apart else inner.sum()
    return adds * len(adds) ** 0.5


def _output(dit: DiT, recording: Recording, call: Call) -> tuple[torch.Tensor, ...]:
    result = replay(dit, recording.arguments(call), gradients=True)
    return tuple(t for t in flatten(result, "output").tensors.values() if t.requires_grad)
