# SPDX-License-Identifier: Apache-2.0
"""Which recorded calls are held out, which may run as one, and which fit in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lynx_compile.files.progress import no_progress
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.passes.calibrate import replay
from lynx_compile.passes.states import (
    calls_within,
    drawn_calls,
    rows_are_alike,
    rows_of_a_part,
    samples_of,
    states_of,
)
from lynx_compile.passes.verify import HeldOut
from lynx_compile.recipe import load_recipe
from lynx_compile.solve.stacking import State, batches, joined, parted
from tests.conftest import open_dit


@pytest.fixture(scope="module")
def opened(tiny: Path) -> tuple[DiT, Recording]:
    return open_dit(load_recipe(tiny / "tiny.yaml"))


def test_joined_calls_return_what_each_returns(opened: tuple[DiT, Recording]) -> None:
    dit, recording = opened
    calls = dit.calls.calls[:5]
    (batch,) = batches([state for call in states_of(dit, recording, calls) for state in call], 10)
    args, kwargs = joined([(state.args, state.kwargs) for state in batch], 2)
    assert kwargs["hidden_states"].shape == (10, 64, 4) and kwargs["img_ids"].shape == (64, 3)
    with torch.no_grad():
        found = parted(dit.module(*args, **kwargs)[0], 5, 2)
    for call, made in zip(calls, found, strict=True):
        assert torch.allclose(made, replay(dit, recording.arguments(call))[0], atol=1e-5)


def test_a_call_of_a_batch_is_cut_into_parts_of_two(tiny: Path) -> None:
    """So that a step of tuning has many steps of the pipeline; what a part returns is its share of the whole's."""
    recipe = load_recipe(tiny / "tiny.yaml")
    calibration = recipe.calibration.model_copy(update={"samples": 6, "batch": 6})
    dit, recording = open_dit(recipe.model_copy(update={"calibration": calibration}))
    call = dit.calls.calls[0]
    (parts,) = states_of(dit, recording, [call])
    assert [part.rows for part in parts] == [2, 2, 2] and samples_of(recording, call) == 6
    assert all(part.kind == parts[0].kind is not None for part in parts)
    assert all(part.kwargs["img_ids"].shape == (64, 3) for part in parts)
    with torch.no_grad():
        found = torch.cat([dit.module(*part.args, **part.kwargs)[0] for part in parts])
    assert torch.allclose(found, replay(dit, recording.arguments(call))[0], atol=1e-5)


def test_a_call_stays_whole_where_its_parts_would_be_others(tiny: Path) -> None:
    """A batch of 4, and 4 tokens of text, whose positions nothing tells from what belongs to the batch."""
    recipe = load_recipe(tiny / "tiny.yaml")
    calibration = recipe.calibration.model_copy(update={"samples": 4, "batch": 4})
    dit, recording = open_dit(recipe.model_copy(update={"calibration": calibration}))
    ((whole,),) = states_of(dit, recording, dit.calls.calls[:1])
    assert (whole.rows, whole.kind) == (4, None)


def test_a_module_whose_blocks_come_first_may_be_streamed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first weights are on the meta device between two runs, and are no place to compute."""
    dit, recording = open_dit(load_recipe(tiny / "tiny.yaml"))
    monkeypatch.setattr("lynx_compile.models.dit.has_room", lambda *_: False)
    members = dit.module._modules
    for name in [name for name in members if name != "transformer_blocks"]:
        members[name] = members.pop(name)
    assert dit.is_streamed and next(dit.module.parameters()).is_meta
    assert HeldOut(dit, recording, no_progress).device.type == dit.device.type
    states = [state for call in states_of(dit, recording, dit.calls.calls[:2]) for state in call]
    assert len(batches(states, 4)) == 1, "they may run as one"


@pytest.mark.parametrize(("rows", "part"), [(1, 1), (2, 2), (3, 3), (7, 7), (10, 2), (15, 3), (64, 2)])
def test_parts_divide_a_call(rows: int, part: int) -> None:
    assert rows_of_a_part(rows) == part


def test_first_steps_count_more(opened: tuple[DiT, Recording]) -> None:
    states = [state for (state,) in states_of(*opened, opened[0].calls.calls[:4])]
    assert [state.weight for state in states] == sorted((state.weight for state in states), reverse=True)
    assert states[0].weight > states[3].weight > 0


def test_any_part_of_the_calls_has_both_kinds(opened: tuple[DiT, Recording]) -> None:
    calls = [call for call in opened[0].calls.calls for _ in range(10)]
    held_out = set(range(0, len(calls), 8))
    order = drawn_calls(calls, held_out, seed=0)
    assert sorted(order) == list(range(len(calls))) and order != sorted(order)
    for count in (2, 16, 64):
        part = [number in held_out for number in order[:count]]
        assert abs(sum(part) - count / 8) <= 1 and any(part) and not all(part)


def test_memory_holds_tensors_once(opened: tuple[DiT, Recording]) -> None:
    dit, recording = opened
    calls = dit.calls.calls
    assert calls_within(recording, calls, 1.0) == len(calls)
    one = 4 * 2 * 64 * 4 * 2  # latents of a call and what it returns
    shared = 4 * (
        2 * 4 * 32 + 2 * 16 + 64 * 3 + 4 * 3 + 4
    )  # and what all calls of the first sample are given
    assert calls_within(recording, calls, (3 * (one + 8) + shared) / 2**30) == 3
    assert calls_within(recording, calls, 1e-9) == 2


def _states(*kinds: str | None) -> list[State]:
    torch.manual_seed(0)
    return [State((torch.randn(2, 3),), {}, (), 1.0, kind, 2) for kind in kinds]


@pytest.mark.parametrize(
    ("module", "kinds", "alike"),
    [
        (torch.nn.Linear(3, 4), "aa", True),
        (lambda x: x - x.mean(0), "aa", False),  # a row hangs on the others
        (lambda x: x - x.mean(0), "ab", True),  # nothing to join
        (lambda x: x.reshape(2, 3) + 0, "aa", False),  # it raises
        (lambda x: x.sum(0), "aa", False),
    ],
)
def test_rows_that_hang_together_are_not_joined(module: torch.nn.Module, kinds: str, alike: bool) -> None:
    assert rows_are_alike(module, _states(*kinds)) is alike
