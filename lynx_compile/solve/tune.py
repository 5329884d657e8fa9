# SPDX-License-Identifier: Apache-2.0
"""Tuning: gradient descent on what the closed form leaves of a block, towards what the dense block returns.

The closed form repairs each linear alone, on what the dense model feeds it. Here the linears of a block are moved
together, on what the block is really given, so that they make up for each other and for the blocks before them. Masks
stay: of weights as they were solved, of activations by magnitude. What rounding does (to FP8) happens in every step,
and gradients pass it as if it did not (straight through), activations' pruning too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from lynx_compile.files.progress import Progress
from lynx_compile.ops.fp8 import round_rows, to_e4m3
from lynx_compile.ops.sparse_linear import keep_mask, norm_scale_of

RATE = 0.005  # of a tensor's rms that Adam moves its elements in a step, at first; it falls to 0 along a half cosine
LOOK_EVERY = 25  # steps between two looks at the held-out error
SLOWER = 3  # times, after a look that finds it no lower
MOST_WORSE = 5  # such looks in a row end it


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


class TunedLinear(torch.nn.Module):
    """A compensated linear whose weights are float32 parameters; its results have the dtype of what it reads."""

    keep: torch.Tensor | None
    first_scale: torch.Tensor | None

    def __init__(self, rows: Rows, lora_down: torch.nn.Parameter | None = None) -> None:
        """``lora_down``: A of all linears of the node, one parameter; those of ``rows`` are not read."""
        super().__init__()
        self._rows = rows
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        y = functional.linear(self._read(x), self._kept().to(x.dtype), self.bias.to(x.dtype))
        if self.lora_down is None or self.lora_up is None:
            return y
        low = functional.linear(x, self.lora_down.to(x.dtype))
        return y + functional.linear(low, self.lora_up.to(x.dtype))

    def on_channels(self, x: torch.Tensor) -> torch.Tensor:
        """The same where channels stand second: x [batch, K, ...] -> [batch, N, ...]."""
        return self.forward(x.movedim(1, -1)).movedim(-1, 1)

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
        return replace(self._rows, **{name: _on_cpu(tensor) for name, tensor in tensors.items()})  # type: ignore[arg-type]

    def _scale(self) -> torch.Tensor | None:
        """s_w [N]."""
        if self.first_scale is None or self.log_scale is None:
            return None
        return self.first_scale * self.log_scale.exp()

    def _kept(self) -> torch.Tensor:
        """The weights that are multiplied, [N, K]."""
        weight = self.weight if self.keep is None else self.weight * self.keep
        if (scale := self._scale()) is None:
            return weight
        scaled = weight / scale[:, None]
        return _straight_through(scaled, to_e4m3(scaled).float()) * scale[:, None]

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """What of x is multiplied."""
        prunes = self._rows.operand == "activation"
        if not prunes and self.log_scale is None:
            return x
        with torch.no_grad():
            tokens = x.reshape(-1, x.shape[-1])
            keep = keep_mask(tokens) if prunes else None
            if self.log_scale is not None:
                read = round_rows(tokens, keep).dequantized(x.dtype)
            else:
                assert keep is not None
                read = torch.where(keep, tokens, torch.zeros_like(tokens))
                if self._rows.norm_scale:
                    read = read * norm_scale_of(tokens, keep).to(x.dtype)
        return _straight_through(x, read.reshape(x.shape))


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone()


def _straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach()


@dataclass(frozen=True)
class State:
    """What a block is given in one call, what it should return (``outputs_of`` that), and how much that counts."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[torch.Tensor, ...]
    weight: float


@dataclass(frozen=True)
class Effort:
    """How long to tune a block: at most so many ``steps`` of ``states`` each, and about so many ``seconds``."""

    steps: int
    seconds: float
    states: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Held-out error of the block's result before and after, and what it took. Without a gain both are the same."""

    before: float
    after: float
    steps: int
    seconds: float


def fit(
    block: torch.nn.Module,
    linears: Iterable[TunedLinear],
    train: Sequence[State],
    held_out: Sequence[State],
    effort: Effort,
    progress: Progress,
) -> Outcome:
    """Move the parameters of ``linears``, by which ``block`` computes, until the held-out error falls no more.

    Where a look finds it no lower, tuning goes on from the best that was seen, with smaller steps. They are left at
    the best, which is where they began if nothing was better.
    """
    start = time.monotonic()
    linears = tuple(linears)
    parameters = _parameters(linears)
    sizes = [_size(parameter, linears) for parameter in parameters]
    best = before = block_error(block, held_out)
    if not parameters:
        return Outcome(before, before, 0, time.monotonic() - start)
    kept = [parameter.detach().clone() for parameter in parameters]
    adam, rate, worse = _adam(parameters), RATE, 0
    draw = _drawn(train, effort.seed)
    step, total = 0, effort.steps
    while step < total and worse < MOST_WORSE:
        for group, size in zip(adam.param_groups, sizes, strict=True):
            group["lr"] = rate * size * (1 + math.cos(math.pi * step / total)) / 2
        adam.zero_grad()
        for state in islice(draw, effort.states):
            (state.weight / effort.states * _squares(block, state).sum()).backward()
        adam.step()
        step += 1
        progress("steps", step, effort.steps)
        if step % LOOK_EVERY and step < total:
            continue
        if (error := block_error(block, held_out)) < best:
            best, worse = error, 0
            kept = [parameter.detach().clone() for parameter in parameters]
        else:
            _restore(parameters, kept)
            adam, rate, worse = _adam(parameters), rate / SLOWER, worse + 1
        total = min(effort.steps, max(int(step * effort.seconds / (time.monotonic() - start)), step))
    _restore(parameters, kept)
    return Outcome(before, best, step, time.monotonic() - start)


@torch.no_grad()
def block_error(block: torch.nn.Module, states: Sequence[State]) -> float:
    """What the loss is the square of: the relative error of the block's results, as the states' weights have it."""
    squares = sum(state.weight * float(_squares(block, state).sum()) for state in states)
    elements = sum(state.weight * sum(t.numel() for t in state.targets) for state in states)
    return float((squares / max(elements, 1)) ** 0.5)


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of what a block returns that tell its error."""
    return tuple(
        leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )


def _squares(block: torch.nn.Module, state: State) -> torch.Tensor:
    """Squared error of every result, [results], each over the mean square of what it should be.

    A sum over elements and not their mean: gradients in fp16 would vanish.
    """
    # Copies, for blocks that write into what they are given.
    args, kwargs = tree_map(_copied, (state.args, state.kwargs))
    results = outputs_of(block(*args, **kwargs))
    pairs = zip(results, state.targets, strict=True)
    return torch.stack(
        [
            (result.float() - target.float()).square().sum()
            / target.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            for result, target in pairs
        ]
    )


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _parameters(linears: Sequence[TunedLinear]) -> list[torch.nn.Parameter]:
    """Each once: the linears of a node share one."""
    return list(dict.fromkeys(p for linear in linears for p in linear.parameters() if p.requires_grad))


def _adam(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Adam:
    return torch.optim.Adam([{"params": [parameter]} for parameter in parameters])


def _drawn(states: Sequence[State], seed: int) -> Iterator[State]:
    """All of them in a random order, and again in another one, without end."""
    choice = torch.Generator().manual_seed(seed)
    while True:
        for number in torch.randperm(len(states), generator=choice).tolist():
            yield states[number]


@torch.no_grad()
def _restore(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _size(parameter: torch.nn.Parameter, linears: Sequence[TunedLinear]) -> float:
    """The size that a parameter's step is relative to."""
    for linear in linears:
        if parameter is linear.log_scale:
            return 1.0
        if parameter is linear.bias or parameter is linear.weight:
            kept = linear.weight.detach()[linear.weight != 0]
            return float(kept.square().mean().sqrt()) if len(kept) else 0.0
    return float(parameter.detach().square().mean().sqrt())
