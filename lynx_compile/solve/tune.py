# SPDX-License-Identifier: Apache-2.0
"""Tuning: gradient descent on what the closed form leaves of a block, towards what the dense block returns.

The closed form repairs each linear alone, on what the dense model feeds it. Here the linears of a block are moved
together, on what the block is really given, so that they make up for each other and for the blocks before them. Masks
stay: of weights as they were solved, of activations by magnitude. Weights are rounded (to FP8) in every step, and
gradients pass that as if it did not happen (straight through), activations' pruning too. Activations are rounded where
the error is looked at, and not in steps, which would take twice as long for what weights can hardly mend. In steps a
GPU multiplies in bf16 also where the module is float32, as in training: their rounding is below that of few states.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lynx_compile.files.progress import Progress
from lynx_compile.ops.fp8 import round_rows, to_e4m3
from lynx_compile.ops.sparse_linear import keep_mask, norm_scale_of
from lynx_compile.solve.replayed import Gradients
from lynx_compile.solve.stacking import State, batches, joined, outputs_of

RATE = 0.005  # of a tensor's rms that Adam moves its elements in a step, at first; it falls to 0 along a half cosine
LOOK_EVERY = 25  # steps between two looks at the held-out error
LEAST_HELD_OUT = 8  # states that a look is at; else so many that it takes a tenth of the time
LEAST_STATES = 2  # of a step: of one alone it is that of its own time
WARM_UP = 20  # steps, from Adam's first on, which go by the signs of gradients alone
AVERAGED = 0.95  # what the mean keeps of itself in a step: it is of all steps, later of the last 20,
SHARE = 8  # and later of the last eighth: steps of one rate shake weights by more than so many of them gain
PATIENCE = 0.125  # of the steps may find it no lower, until it goes back: the rate falls, and noise with it
LEAST_PATIENCE = 2  # looks
LOST = 1.05  # times the lowest that it was: it goes back at once, for steps that raise it so far seldom make it good
SLOWER = 3  # times, from there on
MOST_RETURNS = 4  # in a row end it
SAVE_EVERY = 120  # seconds, at least, between what a stopped run could go on with
# float32: itself, its gradient, Adam's two moments, mean and best; and what a step keeps of its rounding and casting.
BYTES_A_WEIGHT = 6 * 4 + 9
SCALES = 0.1  # of the rate, for FP8 scales: a step moves a row's weights all one way, where their own steps cancel out
HALF = {"cuda": torch.bfloat16}  # of steps, by the kind of device, where the module is float32
SAVED = ("now", "mean", "best")  # of each parameter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What one linear has of its node's weights, for x [..., K].

    ``weight``: [N, K] float32, or e4m3 with its ``weight_scale`` [N]. ``bias``: [N]. ``lora_down``: A [r, K] and
    ``lora_up``: B [N, r], where there is a low-rank branch. float32 but for ``weight``. ``operand``: which is 2:4.
    ``norm_scale``: whether pruned activations are scaled.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    operand: Literal["activation", "weight", "none"]
    norm_scale: bool = False
    lora_down: torch.Tensor | None = None
    lora_up: torch.Tensor | None = None
    weight_scale: torch.Tensor | None = None


def on_channels(linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``linear`` where channels stand second: x [batch, K, ...] -> [batch, N, ...]."""
    y: torch.Tensor = linear(x.movedim(1, -1))
    return y.movedim(-1, 1)


class TunedLinear(torch.nn.Module):
    """A compensated linear whose weights are float32 parameters; its results have the dtype of what it reads."""

    keep: torch.Tensor | None
    first_scale: torch.Tensor | None

    def __init__(self, rows: Rows, lora_down: torch.nn.Parameter | None = None) -> None:
        """``lora_down``: A of all linears of the node, one parameter; those of ``rows`` are not read."""
        super().__init__()
        # Not ``rows`` itself: its tensors are as large as these.
        self._operand = rows.operand
        self._norm_scale = rows.norm_scale
        self.rounds_activations = rows.weight_scale is not None
        weight = rows.weight.float()
        self.register_buffer("keep", keep_mask(weight) if rows.operand == "weight" else None)
        self.register_buffer("first_scale", rows.weight_scale)
        self.log_scale: torch.nn.Parameter | None = None
        if rows.weight_scale is not None:
            weight = weight * rows.weight_scale[:, None]
            self.log_scale = torch.nn.Parameter(torch.zeros_like(rows.weight_scale))
        self.weight = torch.nn.Parameter(weight.clone())
        self.bias = torch.nn.Parameter(rows.bias.clone())
        self.lora_down = lora_down
        self.lora_up = torch.nn.Parameter(rows.lora_up.clone()) if rows.lora_up is not None else None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """In any dtype its scales stay float32, as those of the engine: those of small rows would be 0 in fp16."""
        scale = self.first_scale
        super()._apply(fn, recurse)
        self.first_scale = None if scale is None else scale.to(self.weight.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        y = functional.linear(self._read(x), self._kept().to(x.dtype), self.bias.to(x.dtype))
        if self.lora_down is None or self.lora_up is None:
            return y
        low = functional.linear(x, self.lora_down.to(x.dtype))
        return y + functional.linear(low, self.lora_up.to(x.dtype))

    @torch.no_grad()
    def rows(self) -> Rows:
        """The weights as they are now, rounded where they are FP8, on the CPU."""
        scale = self._scale()
        weight = self.weight if self.keep is None else self.weight * self.keep
        if scale is not None:
            weight = to_e4m3(weight / scale[:, None])
        tensors = {
            "weight": weight,
            "bias": self.bias,
            "lora_down": self.lora_down,
            "lora_up": self.lora_up,
            "weight_scale": scale,
        }
        on_cpu: dict[str, Any] = {name: _on_cpu(tensor) for name, tensor in tensors.items()}
        return Rows(operand=self._operand, norm_scale=self._norm_scale, **on_cpu)

    def _scale(self) -> torch.Tensor | None:
        """s_w [N]."""
        if self.first_scale is None or self.log_scale is None:
            return None
        return self.first_scale * self.log_scale.exp()

    def _kept(self) -> torch.Tensor:
        """The weights that are multiplied, [N, K]."""
        weight = self.weight if self.keep is None else self.weight * self.keep
        with torch.no_grad():
            scale = self._scale()
        if scale is None:
            return weight
        rounded: torch.Tensor = _Rounded.apply(weight, scale, self.log_scale)
        return rounded

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """What of x is multiplied."""
        prunes = self._operand == "activation"
        if not prunes and not self.rounds_activations:
            return x
        with torch.no_grad():
            tokens = x.reshape(-1, x.shape[-1])
            keep = keep_mask(tokens) if prunes else None
            if self.rounds_activations:
                read = round_rows(tokens, keep).dequantized(x.dtype)
            else:
                assert keep is not None
                read = torch.where(keep, tokens, torch.zeros_like(tokens))
                if self._norm_scale:
                    read = read * norm_scale_of(tokens, keep).to(x.dtype)
        return _straight_through(x, read.reshape(x.shape))


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone()


class _StraightThrough(torch.autograd.Function):
    """``rounded``, with the gradient of ``value``: exactly, where value + (rounded - value) would round once more."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _Rounded(torch.autograd.Function):
    """Weights [N, K] as FP8 has them, w_q = e4m3(w / s) s with s [N]; ``log_scale`` gets the gradient of s.

    Gradients pass the rounding: dw_q / dw = 1, and so dw_q / dlog s = w_q - w. One node of the graph, for a GPU waits
    for the host in a step of many small ones.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scale: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        rounded = to_e4m3(weight / scale[:, None]).float().mul_(scale[:, None])
        ctx.save_for_backward(rounded - weight)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (moved,) = ctx.saved_tensors
        return gradients[0], None, (gradients[0] * moved).sum(1)


def _straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = _StraightThrough.apply(value, rounded)
    return made


@contextmanager
def activations_unrounded(linears: Iterable[TunedLinear]) -> Iterator[None]:
    """Those in FP8 read activations as they are meanwhile, pruned where they are pruned; weights stay rounded."""
    rounding = [linear for linear in linears if linear.rounds_activations]
    for linear in rounding:
        linear.rounds_activations = False
    try:
        yield
    finally:
        for linear in rounding:
            linear.rounds_activations = True


@contextmanager
def _multiplied_in_half(module: torch.nn.Module, targets: Sequence[torch.Tensor]) -> Iterator[None]:
    """Products of float32 are in ``HALF`` meanwhile, where the device has one."""
    kind = next(module.parameters()).device.type
    is_float32 = any(target.dtype == torch.float32 for target in targets)
    if kind not in HALF or not is_float32:
        yield
        return
    with warnings.catch_warnings(), torch.autocast(kind, HALF[kind]):
        # Norms that are not fused say so.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


@dataclass(frozen=True)
class Effort:
    """How long to tune a module: at most so many ``steps`` of ``samples`` each, and about so many ``seconds``.

    ``rate``: of a tensor's rms that Adam moves its elements in a step, at first; it falls to 0 along a half cosine.
    """

    steps: int
    seconds: float
    samples: int
    seed: int
    rate: float = RATE


@dataclass(frozen=True)
class Outcome:
    """Held-out error of the module's result before and after, and what it took. Without a gain both are the same."""

    before: float
    after: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Shelf:
    """Where tuning that takes long lays what it needs to go on. ``load``: what was saved last, on the CPU, or None."""

    load: Callable[[], Mapping[str, torch.Tensor] | None]
    save: Callable[[Mapping[str, torch.Tensor]], None]


NOWHERE = Shelf(lambda: None, lambda tensors: None)


def fit(
    module: torch.nn.Module,
    linears: Iterable[TunedLinear],
    train: Sequence[State],
    held_out: Sequence[State],
    effort: Effort,
    progress: Progress,
    shelf: Shelf = NOWHERE,
) -> Outcome:
    """Move the parameters of ``linears``, by which ``module`` computes, until the held-out error falls no more.

    What is looked at is their mean over the last steps (Polyak averaging): gradients of few states shake the weights
    themselves by more than some steps gain, until steps are small. Where it stays no better, tuning goes on from the
    best that was seen, with smaller steps. They are left at the best, which is where they began if nothing was better.
    """
    linears = tuple(linears)
    if not train or not _parameters(linears):
        error = block_error(module, held_out, effort.samples)
        return Outcome(error, error, 0, 0.0)
    with differentiable_attention():
        run = _Fit(module, linears, train, held_out, effort, shelf)
        while run.step < run.total and run.returns < MOST_RETURNS:
            run.take_step()
            progress("steps", run.step, run.total)
            if not run.step % LOOK_EVERY or run.step >= run.total:
                run.look()
    return run.finish()


class _Fit:
    """Where tuning is. ``kept``: the best means that were seen, and ``best`` their held-out error."""

    def __init__(
        self,
        module: torch.nn.Module,
        linears: Sequence[TunedLinear],
        train: Sequence[State],
        held_out: Sequence[State],
        effort: Effort,
        shelf: Shelf,
    ) -> None:
        self._start, self._saved = time.monotonic(), time.monotonic()
        self._module, self._linears, self._effort, self._shelf = module, linears, effort, shelf
        looked_at = LOOK_EVERY * effort.samples // 3, LEAST_HELD_OUT
        self._held_out, self._known = _taken(iter(held_out), *looked_at), _taken(iter(train), *looked_at)
        self._parameters = _parameters(linears)
        self._of_size: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in self._parameters:
            self._of_size.setdefault(_about(_size(parameter, linears)), []).append(parameter)
        self._adam = self._fresh_adam()
        self._gradients = Gradients(partial(_step_loss, module), self._parameters)
        self._draw = _drawn(train, effort.seed)
        self.step, self.total, self._rate = 0, effort.steps, effort.rate
        self._worse = 0  # looks since the best, or since it went back to it
        self.returns = 0  # how often it did, in a row
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        self._mean, self._averaged = [kept.clone() for kept in self._kept], 0
        if (saved := shelf.load()) is not None:
            self._take_up(saved)
        else:
            self.best = self.before = block_error(module, self._held_out, effort.samples)

    def take_step(self) -> None:
        rate = self._rate * (1 + math.cos(math.pi * self.step / self.total)) / 2
        rate *= min((self._averaged + 1) / WARM_UP, 1)
        for group, size in zip(self._adam.param_groups, self._of_size, strict=True):
            group["lr"] = rate * size
        device = next(self._module.parameters()).device
        with activations_unrounded(self._linears):
            self._gradients.take(
                (None if batch[0].kind is None else (batch[0].kind, len(batch)), _part(batch, device))
                for batch in batches(self._drawn(), self._effort.samples)
            )
        self._adam.step()
        self.step += 1
        self._averaged += 1
        of_all = 1 - 1 / self._averaged
        decay = max(min(AVERAGED, of_all), of_all**SHARE)
        get_ema_multi_avg_fn(decay)(self._mean, [p.detach() for p in self._parameters], self._averaged)
        if time.monotonic() - self._start >= self._effort.seconds:
            self.total = self.step

    def look(self) -> None:
        with self._at_mean():
            error = block_error(self._module, self._held_out, self._effort.samples)
        log.info(
            "%d steps: held-out error %.5f, least %.5f, rate %.2g", self.step, error, self.best, self._rate
        )
        self._worse += 1
        if error < self.best:
            self.best, self._worse, self.returns = error, 0, 0
            _restore(self._kept, self._mean)
        elif self._worse >= self._patience() or not error < LOST * self.best:
            self._worse, self.returns = 0, self.returns + 1
            _restore(self._parameters, self._kept)
            _restore(self._mean, self._kept)
            self._adam, self._rate, self._averaged = self._fresh_adam(), self._rate / SLOWER, 0
        self._foresee(time.monotonic() - self._start)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._lay_down()

    def finish(self) -> Outcome:
        _restore(self._parameters, self._kept)
        known = block_error(self._module, self._known, self._effort.samples)
        log.info("held-out error %.5f, %.5f on states that it was tuned on", self.best, known)
        return Outcome(self.before, self.best, self.step, time.monotonic() - self._start)

    def _patience(self) -> int:
        """Looks in a row."""
        return max(round(PATIENCE * self.total / LOOK_EVERY), LEAST_PATIENCE)

    def _foresee(self, spent: float) -> None:
        """How many steps it will be, at the pace of those that took ``spent`` seconds."""
        self.total = min(self._effort.steps, max(int(self.step * self._effort.seconds / spent), self.step))

    @contextmanager
    def _at_mean(self) -> Iterator[None]:
        """The parameters have their mean's values meanwhile."""
        self._swap()
        yield
        self._swap()

    def _swap(self) -> None:
        for number, parameter in enumerate(self._parameters):
            self._mean[number], parameter.data = parameter.data, self._mean[number]

    def _drawn(self) -> list[State]:
        return _taken(self._draw, self._effort.samples, LEAST_STATES)

    def _fresh_adam(self) -> torch.optim.Adam:
        groups = [{"params": parameters} for parameters in self._of_size.values()]
        return torch.optim.Adam(groups, fused=self._parameters[0].is_cuda)

    def _lay_down(self) -> None:
        spent = time.monotonic() - self._start
        counts = self.step, self._worse, self.returns, self._averaged
        numbers = (*counts, self._rate, self.best, self.before, spent)
        tensors = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        for number, parameter in enumerate(self._parameters):
            values = (parameter.detach(), self._mean[number], self._kept[number])
            tensors |= {f"{name}.{number}": value for name, value in zip(SAVED, values, strict=True)}
            tensors |= {f"{name}.{number}": value for name, value in self._adam.state[parameter].items()}
        self._shelf.save(tensors)
        self._saved = time.monotonic()

    def _take_up(self, saved: Mapping[str, torch.Tensor]) -> None:
        *counts, self._rate, self.best, self.before, spent = saved["numbers"].tolist()
        self.step, self._worse, self.returns, self._averaged = map(int, counts)
        self._start -= spent
        self._foresee(spent)
        for _ in range(self.step):
            self._drawn()
        for number, parameter in enumerate(self._parameters):
            values = [saved[f"{name}.{number}"] for name in SAVED]
            _restore([parameter, self._mean[number], self._kept[number]], values)
            state = {name: saved.get(f"{name}.{number}") for name in ("step", "exp_avg", "exp_avg_sq")}
            moved = {name: value.to(parameter.device) for name, value in state.items() if value is not None}
            if moved:  # none right after a look that began anew
                self._adam.state[parameter] = moved


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Without cuDNN's attention, whose backward pass fails in torch 2.11 (illegal memory access)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@torch.no_grad()
def block_error(module: torch.nn.Module, states: Sequence[State], samples: int = 1) -> float:
    """What the loss is the square of: the relative error of the module's results, as the states' weights have it.

    ``samples``: of states that may be joined to one call.
    """
    device = next(module.parameters()).device
    squares = sum(float(_loss(module, _part(batch, device)).sum()) for batch in batches(states, samples))
    elements = sum(state.weight * sum(t.numel() for t in state.targets) for state in states)
    return float((squares / max(elements, 1)) ** 0.5)


class _Part(NamedTuple):
    """States as one call: what the module is given, what it should return, and what each of them counts."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[torch.Tensor, ...]
    weights: torch.Tensor


def _part(states: Sequence[State], device: torch.device) -> _Part:
    args, kwargs, targets = joined([(s.args, s.kwargs, s.targets) for s in states], states[0].rows, device)
    return _Part(args, kwargs, targets, torch.tensor([state.weight for state in states], device=device))


def _step_loss(module: torch.nn.Module, part: _Part) -> torch.Tensor:
    """Of a step: multiplied in half precision, and summed."""
    with _multiplied_in_half(module, part.targets):
        return _loss(module, part).sum()


def _loss(module: torch.nn.Module, part: _Part) -> torch.Tensor:
    """Squared error of every result of every state, over the mean square of what it should be: [results, states].

    A sum over elements and not their mean: gradients in fp16 would vanish.
    """
    results = outputs_of(module(*part.args, **part.kwargs))
    tiny = torch.finfo(torch.float32).tiny
    losses = []
    for result, target in zip(results, part.targets, strict=True):
        wanted = target.float().reshape(len(part.weights), -1)
        lost = (result.float().reshape(len(part.weights), -1) - wanted).square().sum(1)
        losses.append(part.weights * lost / wanted.square().mean(1).clamp_min(tiny))
    return torch.stack(losses)


def _parameters(linears: Sequence[TunedLinear]) -> list[torch.nn.Parameter]:
    """Each once: the linears of a node share one."""
    return list(dict.fromkeys(p for linear in linears for p in linear.parameters() if p.requires_grad))


def _taken(states: Iterator[State], samples: int, least: int) -> list[State]:
    """The next of them, until they are so many samples, and at least so many states; fewer where they end."""
    found: list[State] = []
    rows = 0
    for state in states:
        found.append(state)
        rows += state.rows
        if len(found) >= least and rows >= samples:
            break
    return found


def _drawn(states: Sequence[State], seed: int) -> Iterator[State]:
    """All of them in a random order, and again in another one, without end."""
    choice = torch.Generator().manual_seed(seed)
    while True:
        for number in torch.randperm(len(states), generator=choice).tolist():
            yield states[number]


@torch.no_grad()
def _restore(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _about(size: float) -> float:
    """Within a tenth, so that few sizes are told apart: Adam takes a kernel for each."""
    return 2.0 ** (round(4 * math.log2(size)) / 4) if size else 0.0


def _size(parameter: torch.nn.Parameter, linears: Sequence[TunedLinear]) -> float:
    """The size that a parameter's step is relative to."""
    for linear in linears:
        if parameter is linear.log_scale:
            return SCALES
        if parameter is linear.bias or parameter is linear.weight:
            kept = linear.weight.detach()[linear.weight != 0]
            return float(kept.square().mean().sqrt()) if len(kept) else 0.0
    return float(parameter.detach().square().mean().sqrt())
