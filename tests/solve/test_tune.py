# SPDX-License-Identifier: Apache-2.0
"""What tuning computes with is what the engine computes; and what it may and may not change."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lynx_compile.files.progress import no_progress
from lynx_compile.ops.fp8 import Rounded, fp8_linear, round_rows, to_e4m3
from lynx_compile.ops.sparse_linear import expand_low_rank, keep_mask, sparse_linear
from lynx_compile.solve import tune
from lynx_compile.solve.stacking import State, outputs_of
from lynx_compile.solve.tune import (
    NOWHERE,
    Effort,
    Outcome,
    Rows,
    Shelf,
    TunedLinear,
    activations_unrounded,
    block_error,
    fit,
    on_channels,
)

K, N, RANK = 32, 24, 16


def _rows(operand: Any, fp8: bool = False, rank: int = 0, norm_scale: bool = False) -> Rows:
    torch.manual_seed(1)
    weight, bias, scale = torch.randn(N, K), torch.randn(N), None
    if operand == "weight":
        weight = weight * keep_mask(weight)
    if fp8:
        rounded = round_rows(weight)
        weight, scale = rounded.values, rounded.scale
    down, up = (torch.randn(rank, K) * 0.1, torch.randn(N, rank) * 0.1) if rank else (None, None)
    return Rows(weight, bias, operand, norm_scale, down, up, scale)


def _linear(rows: Rows) -> TunedLinear:
    return TunedLinear(rows, None if rows.lora_down is None else torch.nn.Parameter(rows.lora_down.clone()))


@pytest.mark.parametrize(("rank", "norm_scale"), [(0, False), (RANK, False), (RANK, True)])
def test_pruned_activations_are_those_of_the_op(rank: int, norm_scale: bool) -> None:
    rows, x = _rows("activation", rank=rank, norm_scale=norm_scale), torch.randn(2, 5, K)
    up = torch.zeros(N, 0) if rows.lora_up is None else rows.lora_up
    down = torch.zeros(1, K) if rows.lora_down is None else rows.lora_down
    want = sparse_linear(
        x, expand_low_rank(rows.weight, up), down, rows.bias, rank=rank, norm_scale=norm_scale
    )
    assert torch.allclose(_linear(rows)(x), want, atol=1e-5)


@pytest.mark.parametrize("operand", ["none", "weight", "activation"])
def test_fp8_is_that_of_the_op(operand: str) -> None:
    rows, x = _rows(operand, fp8=True), torch.randn(2, 5, K)
    assert rows.weight_scale is not None
    weight = Rounded(rows.weight, rows.weight_scale)
    want = fp8_linear(x, weight, rows.bias, prune=operand == "activation")
    assert torch.allclose(_linear(rows)(x), want, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_is_that_of_the_op_in_16_bits_too(dtype: torch.dtype) -> None:
    """As a GPU runs it. Scales of small rows are below what fp16 holds, and an empty row's far below."""
    rows, x = _rows("weight", fp8=True), torch.randn(2, 5, K).to(dtype)
    assert rows.weight_scale is not None
    scale = rows.weight_scale.clone()
    scale[1], scale[2] = 2.0**-18, 2.0**-100 / 448
    weight = rows.weight.float()
    weight[2] = 0.0
    rows = replace(rows, weight=weight.to(rows.weight.dtype), weight_scale=scale, bias=torch.zeros(N))
    made = _linear(rows).to(dtype=dtype)(x)
    want = fp8_linear(x.float(), Rounded(rows.weight, scale), rows.bias)
    assert made.dtype == dtype and made.isfinite().all() and not made[..., 2].any()
    lost = (made.float() - want).flatten(0, 1).norm(dim=0) / want.flatten(0, 1).norm(dim=0).clamp_min(1e-30)
    assert float(lost.detach().max()) < 0.01, "of any row"


@pytest.mark.parametrize("operand", ["none", "weight", "activation"])
def test_steps_round_weights_and_leave_activations(operand: str) -> None:
    linear, x = _linear(_rows(operand, fp8=True)), torch.randn(7, K).bfloat16()
    read = torch.where(keep_mask(x), x, 0.0) if operand == "activation" else x
    with activations_unrounded([linear, TunedLinear(_rows("weight"))]):
        assert torch.equal(linear._read(x), read)
        rows = linear.rows()
        assert rows.weight_scale is not None
        assert torch.equal(linear._kept(), Rounded(rows.weight, rows.weight_scale).dequantized())
    rounded = round_rows(x, keep_mask(x) if operand == "activation" else None).dequantized(x.dtype)
    assert torch.equal(linear._read(x), rounded), "exactly, in 16 bits too"


def test_channels_may_stand_second() -> None:
    linear, x = _linear(_rows("weight")), torch.randn(2, K, 3, 4)
    assert torch.allclose(on_channels(linear, x).movedim(1, -1), linear(x.movedim(1, -1)))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("operand", ["none", "weight", "activation"])
def test_what_was_not_tuned_comes_back_as_it_was(operand: str, fp8: bool) -> None:
    rows = _rows(operand, fp8=fp8, rank=RANK if operand == "activation" and not fp8 else 0)
    back = _linear(rows).rows()
    assert (back.operand, back.norm_scale) == (rows.operand, rows.norm_scale)
    for name in ("weight", "bias", "lora_down", "lora_up", "weight_scale"):
        old, new = getattr(rows, name), getattr(back, name)
        assert (old is None) == (new is None)
        if old is not None:
            assert new.dtype == old.dtype and torch.equal(new.float(), old.float())


@pytest.mark.parametrize("fp8", [False, True])
def test_gradients_pass_what_rounds_and_prunes(fp8: bool) -> None:
    linear = _linear(_rows("activation", fp8=fp8))
    x = torch.randn(7, K, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear._kept().detach().sum(0).expand_as(x), atol=1e-4), "of every channel"
    assert linear.weight.grad is not None and linear.weight.grad.abs().sum() > 0


def test_gradients_of_scales_are_those_of_the_rounding_as_a_constant() -> None:
    linear = _linear(_rows("weight", fp8=True))
    assert linear.first_scale is not None and linear.log_scale is not None and linear.keep is not None
    with torch.no_grad():
        linear.weight += 0.01 * torch.randn_like(linear.weight)
        linear.log_scale += 0.1 * torch.randn_like(linear.log_scale)
    wanted = torch.randn_like(linear.weight)
    (linear._kept() * wanted).sum().backward()
    weight, log_scale = (p.detach().double().requires_grad_() for p in (linear.weight, linear.log_scale))
    scaled = weight * linear.keep / (linear.first_scale * log_scale.exp())[:, None]
    rounded = scaled + (to_e4m3(scaled.float()).double() - scaled).detach()
    (rounded * (linear.first_scale * log_scale.exp())[:, None] * wanted).sum().backward()
    for found, expected in ((linear.weight, weight), (linear.log_scale, log_scale)):
        assert found.grad is not None and expected.grad is not None
        assert torch.allclose(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


class Block(torch.nn.Module):
    """A dense block with a compensated twin: two linears, and it writes into what it is given."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor, *, also: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x += 1  # as some blocks do
        y = self.second(self.first(x).relu())
        return y + also["residual"], y[:, :1]


def _problem(operand: str, fp8: bool = False) -> tuple[Block, list[TunedLinear], list[State], list[State]]:
    torch.manual_seed(0)
    dense = Block(torch.nn.Linear(K, N), torch.nn.Linear(N, K)).requires_grad_(False)
    linears = []
    for linear in (dense.first, dense.second):
        weight: Any = linear.weight
        weight = weight * keep_mask(weight) if operand == "weight" else weight
        rounded = round_rows(weight) if fp8 else None
        values, scale = (weight, None) if rounded is None else (rounded.values, rounded.scale)
        linears.append(TunedLinear(Rows(values, linear.bias, operand, weight_scale=scale)))  # type: ignore[arg-type]
    states = []
    for _ in range(20):
        x, also = torch.randn(50, K), {"residual": torch.randn(50, K)}
        states.append(State((x,), {"also": also}, outputs_of(dense(x.clone(), also=also)), 1.0))
    return Block(*linears), linears, states[4:], states[:4]


@pytest.mark.parametrize(
    ("operand", "fp8"), [("weight", False), ("activation", False), ("weight", True), ("activation", True)]
)
def test_tuning_lowers_the_held_out_error_and_leaves_masks(operand: str, fp8: bool) -> None:
    block, linears, train, held_out = _problem(operand, fp8)
    masks = [linear.weight.detach() != 0 for linear in linears]
    given = [state.args[0].clone() for state in train]
    outcome = fit(block, linears, train, held_out, Effort(150, 1e9, 2, 0), no_progress)
    assert outcome.after < 0.95 * outcome.before and outcome.steps == 150
    assert block_error(block, held_out) == pytest.approx(outcome.after, rel=1e-6), "it is left at its best"
    assert all(torch.equal(state.args[0], x) for state, x in zip(train, given, strict=True))
    if operand == "weight":
        for linear, mask in zip(linears, masks, strict=True):
            assert not (linear.rows().weight.float() != 0)[~mask].any()
            assert mask.unflatten(-1, (-1, 4)).sum(-1).le(2).all()


def test_scales_of_rows_move_slower_than_weights() -> None:
    """At the weights' own rate they shake a block by more than its steps gain."""
    block, linears, train, held_out = _problem("weight", fp8=True)
    before = [linear.weight.detach().clone() for linear in linears]
    fit(block, linears, train, held_out, Effort(tune.LOOK_EVERY, 1e9, 2, 0, rate=1e-3), no_progress)
    for linear, weight in zip(linears, before, strict=True):
        assert linear.log_scale is not None
        moved = float(linear.log_scale.detach().abs().max())
        of_weights = float(
            (linear.weight.detach() - weight).abs().max() / weight[weight != 0].square().mean().sqrt()
        )
        assert 0 < moved < 0.2 * of_weights


def test_fp8_is_written_as_it_was_judged() -> None:
    """The error of what ``rows`` gives, multiplied as the op does, is the one that tuning ended with."""
    block, linears, train, held_out = _problem("weight", fp8=True)
    outcome = fit(block, linears, train, held_out, Effort(60, 1e9, 2, 0), no_progress)
    again = Block(*(TunedLinear(linear.rows()) for linear in linears))
    assert outcome.after < outcome.before
    assert block_error(again, held_out) == pytest.approx(outcome.after, rel=1e-5)


@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, True), (torch.float16, False)])
def test_steps_multiply_in_half_what_is_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, half: bool
) -> None:
    """As a GPU does: in steps alone, and a module that is in 16 bits already stays in its own."""
    monkeypatch.setitem(tune.HALF, "cpu", torch.bfloat16)
    block, linears, train, held_out = _problem("weight")
    train, held_out = (
        [
            replace(s, args=(s.args[0].to(dtype),), targets=tuple(t.to(dtype) for t in s.targets),
                    kwargs={"also": {"residual": s.kwargs["also"]["residual"].to(dtype)}})
            for s in some
        ]
        for some in (train, held_out)
    )  # fmt: skip
    seen = set()
    block.second.register_forward_hook(
        lambda module, args, y: seen.add((torch.is_grad_enabled(), y.dtype)) or None
    )
    outcome = fit(block, linears, train, held_out, Effort(50, 1e9, 2, 0), no_progress)
    assert seen == {(True, torch.bfloat16 if half else dtype), (False, dtype)}
    assert outcome.after < outcome.before
    assert all(parameter.dtype == torch.float32 for parameter in block.parameters())


def test_what_only_gets_worse_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LOOK_EVERY", 2)
    block, linears, train, held_out = _problem("weight")
    before = [parameter.detach().clone() for parameter in block.parameters()]
    outcome = fit(block, linears, train, held_out, Effort(1000, 1e9, 2, 0, rate=1e5), no_progress)
    assert outcome.after == outcome.before and outcome.steps == 2 * tune.MOST_RETURNS, "it ends early"
    assert all(torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True))


@pytest.mark.parametrize(("better_at", "steps"), [(None, 80), (7, 115), (8, 120)])
def test_an_eighth_of_the_steps_may_find_nothing_better(
    monkeypatch: pytest.MonkeyPatch, better_at: int | None, steps: int
) -> None:
    """4 looks of 5 steps, of 160: then it goes back, and what has gone back four times in a row ends."""
    monkeypatch.setattr(tune, "LOOK_EVERY", 5)
    looks = itertools.count()  # the first is at what it is given
    monkeypatch.setattr(tune, "block_error", lambda *_: 0.96 if next(looks) == better_at else 1.0)
    block, linears, train, held_out = _problem("weight")
    outcome = fit(block, linears, train, held_out, Effort(160, 1e9, 2, 0), no_progress)
    assert (outcome.before, outcome.after) == (1.0, 1.0 if better_at is None else 0.96)
    assert outcome.steps == steps


@pytest.mark.parametrize(("error", "steps"), [(1.04, 80), (1.06, 20), (math.nan, 20)])
def test_it_goes_back_at_once_where_the_error_leaves_the_best(
    monkeypatch: pytest.MonkeyPatch, error: float, steps: int
) -> None:
    """Four looks in a row, of 5 steps each, in place of four times four."""
    monkeypatch.setattr(tune, "LOOK_EVERY", 5)
    looks = itertools.count()
    monkeypatch.setattr(tune, "block_error", lambda *_: error if next(looks) else 1.0)
    block, linears, train, held_out = _problem("weight")
    given = [linear.weight.detach().clone() for linear in linears]
    outcome = fit(block, linears, train, held_out, Effort(160, 1e9, 2, 0), no_progress)
    assert (outcome.after, outcome.steps) == (1.0, steps)
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears, given, strict=True))


@pytest.mark.parametrize("size", [0.0, 1e-9, 0.0123, 1.0, 7.7])
def test_tensors_of_a_size_share_a_rate(size: float) -> None:
    assert tune._about(size) == pytest.approx(size, rel=0.1)
    assert tune._about(1.01 * tune._about(size)) == tune._about(size)


def test_noise_of_few_states_does_not_send_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that overshoot have a mean that is better than where they began, when none of them is."""
    found = []
    for averaged in (tune.AVERAGED, 0.0):
        monkeypatch.setattr(tune, "AVERAGED", averaged)
        torch.manual_seed(0)
        wanted, x = torch.randn(64, 64), torch.randn(72, 16, 64)
        linear = TunedLinear(Rows(wanted + 0.02 * torch.randn(64, 64), torch.zeros(64), "none"))
        noise = [0.5] * 64 + [0.0] * 8
        states = [
            State((one,), {}, (one @ wanted.T + spread * torch.randn(16, 64),), 1.0)
            for one, spread in zip(x, noise, strict=True)
        ]
        ticks = itertools.count()
        monkeypatch.setattr(tune.time, "monotonic", lambda ticks=ticks: next(ticks))
        effort = Effort(10_000, tune.LOOK_EVERY + 1, 2, 0, rate=0.02)  # time for the steps to the first look
        found.append(fit(linear, [linear], states[:64], states[64:], effort, no_progress))
    mean, last = found
    assert mean.after < mean.before == last.before == last.after


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_joined_states_count_as_they_do_alone(operand: str) -> None:
    found = []
    for kind in (None, "all"):
        block, linears, train, held_out = _problem(operand)
        weights = torch.linspace(1, 2, len(train)).tolist()
        train = [replace(s, kind=kind, rows=50, weight=w) for s, w in zip(train, weights, strict=True)]
        held_out = [replace(s, kind=kind, rows=50) for s in held_out]
        outcome = fit(block, linears, train, held_out, Effort(10, 1e9, 4, 0), no_progress)
        found.append((outcome.before, outcome.after, linears[0].rows().weight))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-4)
    assert torch.allclose(found[0][2], found[1][2], atol=1e-4)


def test_what_was_stopped_goes_on_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LOOK_EVERY", 5)
    monkeypatch.setattr(tune, "SAVE_EVERY", 0)
    saved: list[dict[str, torch.Tensor]] = []

    def run(shelf: Shelf, stop: int) -> tuple[Outcome, torch.Tensor]:
        def progress(what: str, done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        block, linears, train, held_out = _problem("weight")
        outcome = fit(block, linears, train, held_out, Effort(30, 1e9, 2, 0), progress, shelf)
        return outcome, linears[0].rows().weight

    shelf = Shelf(
        lambda: saved[-1] if saved else None,
        lambda tensors: saved.append({name: t.clone() for name, t in tensors.items()}),
    )
    whole, weight = run(NOWHERE, stop=0)
    with pytest.raises(KeyboardInterrupt):
        run(shelf, stop=13)
    assert len(saved) == 2
    again, same = run(shelf, stop=0)
    assert (again.before, again.after, again.steps) == (whole.before, whole.after, whole.steps)
    assert torch.equal(weight, same)


def test_time_that_is_up_ends_it() -> None:
    """Not at the next look only: 25 steps of a large block can take longer than all that there is."""
    block, linears, train, held_out = _problem("weight")
    shown: list[tuple[int, int]] = []
    effort = Effort(10_000, 0, 1, 0)
    outcome = fit(
        block, linears, train, held_out, effort, lambda what, done, total: shown.append((done, total))
    )
    assert outcome.steps == 1 and shown == [(1, 1)]


def test_the_same_seed_gives_the_same_weights() -> None:
    found = []
    for seed in (0, 0, 1):
        block, linears, train, held_out = _problem("weight")
        fit(block, linears, train, held_out, Effort(10, 1e9, 2, seed), no_progress)
        found.append(linears[0].rows().weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_states_count_by_their_weights() -> None:
    """Of two states that want opposite things the heavier one decides."""
    results = []
    for heavy in (1.0, -1.0):
        linear = TunedLinear(Rows(torch.zeros(4, 4), torch.zeros(4), "none"))
        x = torch.ones(1, 4)
        states = [
            State((x,), {}, (torch.full((1, 4), sign),), 9.0 if sign == heavy else 1.0)
            for sign in (1.0, -1.0)
        ]
        linear.weight.data.fill_(0.5)  # steps are relative to it
        fit(linear, [linear], states, states, Effort(1000, 1e9, 2, 0), no_progress)
        results.append(linear(x).mean().item())
    assert results == pytest.approx([0.8, -0.8], abs=0.2)
