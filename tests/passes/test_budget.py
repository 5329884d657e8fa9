# SPDX-License-Identifier: Apache-2.0
"""The knapsack on errors made up here: what it takes, in which order, and what it refuses."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from lynx_compile.errors import InputError
from lynx_compile.files.tensors import save_tensors
from lynx_compile.models.structure import Linear, LinearGroup
from lynx_compile.passes.budget import TUNED, Selection, choose, require_speed
from lynx_compile.passes.describe import _budget
from lynx_compile.passes.select import Candidates, candidates
from lynx_compile.passes.sensitivity import Sensitivities, columns_of
from lynx_compile.passes.speed_table import Form, roofline
from lynx_compile.passes.verify import AtSteps, Verified
from lynx_compile.recipe import Budget, Sparsity

TOKENS, CHANNELS = 128, 64
SIZES = {"a": 64, "b": 128, "c": 192, "d": 256, "e": 320, "f": 384}
FP8_DENSE, FP8_WEIGHT = Form("none", fp8=True), Form("weight", fp8=True)
ROWS = 4000  # of random signs: errors of different nodes are then as good as independent
STEPS = 4


def _found(tmp_path: Path, sparsity: dict[str, object] | None = None) -> Candidates:
    """Six nodes of one linear each: dense, FP8 at 1.8x, and 2:4 in FP8 at 2.4x."""
    gains = {"bf16_weight": 1.4, "fp8_dense.all": 1.8, "fp8_weight.all": 2.4, "fp8_activation.all": 2.4}
    results = [
        {"shape": {"tokens": TOKENS, "channels": CHANNELS, "out_channels": size}, "ratios": gains}
        for size in SIZES.values()
    ]
    (tmp_path / "gpu.json").write_text(json.dumps({"results": results}))
    groups = tuple(
        LinearGroup(name, (Linear(name, CHANNELS, size, True, None),), TOKENS) for name, size in SIZES.items()
    )
    asked = Sparsity.model_validate({"costs": str(tmp_path / "gpu.json")} | (sparsity or {}))
    return candidates(groups, asked, ("sm90",))


def _measured(tmp_path: Path, found: Candidates, errors: dict[tuple[str, Form], float]) -> Sensitivities:
    """Rows in which every node and form has its error, and twice that at the last step; one sign a node and row."""
    choice = torch.Generator().manual_seed(0)
    columns = columns_of(found.nodes)
    signs = {n: torch.randint(0, 2, (ROWS,), generator=choice, dtype=torch.float64) * 2 - 1 for n in SIZES}
    steps = torch.arange(ROWS) % STEPS
    adds = torch.stack(
        [
            errors[path, found.nodes[node].form] * signs[path] * torch.where(steps == STEPS - 1, 2.0, 1.0)
            for node, path in columns
        ],
        1,
    )
    path = tmp_path / "rows.safetensors"
    save_tensors(path, {"adds": adds, "weights": torch.ones(ROWS, dtype=torch.float64), "steps": steps})
    return Sensitivities(path, columns)


ERRORS = {
    (name, form): error * factor
    for name, error in zip(SIZES, (0.009, 0.002, 0.004, 0.003, 0.006, 0.001), strict=True)
    for form, factor in ((FP8_DENSE, 0.5), (FP8_WEIGHT, 2.0))
}


def _select(tmp_path: Path, errors: dict[tuple[str, Form], float] = ERRORS, **budget: float) -> Selection:
    found = _found(tmp_path)
    return choose(found, _measured(tmp_path, found, errors), Budget(**budget))


def test_candidates_are_what_nothing_better_is_as_fast_as(tmp_path: Path) -> None:
    found = _found(tmp_path)
    for open_ in found.open.values():
        assert [option.form for option in open_.options] == [Form("none"), FP8_DENSE, FP8_WEIGHT]
        assert {option.form for option in open_.beaten} == {Form("weight"), Form("activation", fp8=True)}
    assert {node.form for node in found.nodes} == {FP8_DENSE, FP8_WEIGHT}
    assert len(found.nodes) == 2 * len(SIZES)


@pytest.mark.parametrize("most", [0.002, 0.006, 0.012, 0.5])
def test_the_plan_is_as_fast_as_the_error_allows(tmp_path: Path, most: float) -> None:
    """Held against all 729 plans: the error stays below the limit, and next to no plan that does is faster."""
    chosen = _select(tmp_path, max_output_error=most)
    taken = len(chosen.steps)
    assert 0 < chosen.error(taken) <= most
    best = 0.0
    dense = sum(SIZES.values())
    for forms in product((None, FP8_DENSE, FP8_WEIGHT), repeat=len(SIZES)):
        names = zip(SIZES, forms, strict=True)
        square = 1.75 * sum(
            ERRORS[name, form] ** 2 for name, form in names if form
        )  # three steps once, one twice
        if square <= most**2:
            gains = {None: 1.0, FP8_DENSE: 1.8, FP8_WEIGHT: 2.4}
            time = sum(size / gains[form] for size, form in zip(SIZES.values(), forms, strict=True))
            best = max(best, dense / time)
    assert 0.93 * best <= chosen.speed(taken) <= 1.01 * best
    worths = [step.worth for step in chosen.steps]
    assert worths == sorted(worths, reverse=True)
    if most == 0.5:
        assert {decision.form for decision in chosen.plan(taken).decisions} == {FP8_WEIGHT}


def test_every_step_back_is_slower_and_safer(tmp_path: Path) -> None:
    chosen = _select(tmp_path, max_output_error=0.5)
    steps = range(1, len(chosen.steps) + 1)
    assert [chosen.speed(n) for n in steps] == sorted(chosen.speed(n) for n in steps)
    assert [chosen.error(n) for n in steps] == sorted(chosen.error(n) for n in steps)
    assert chosen.speed(len(chosen.steps)) == pytest.approx(2.4)
    with pytest.raises(InputError, match=r"No linear would become sparse .*\('a': dense FP8 would be 1.80x"):
        chosen.plan(0)


def test_where_weights_will_be_tuned_they_may_err_more_at_first(tmp_path: Path) -> None:
    found = _found(tmp_path)
    made = _measured(tmp_path, found, ERRORS)
    solved, tuned = (choose(found, made, Budget(max_output_error=0.006), tuned=t) for t in (False, True))
    taken = len(tuned.steps)
    assert tuned.error(taken) > 0.006 >= tuned.expected(taken)
    assert solved.expected(len(solved.steps)) == solved.error(len(solved.steps)) <= 0.006
    assert tuned.speed(taken) > solved.speed(len(solved.steps))
    fewer = tuned.fewer(taken, 0.7)
    assert tuned.expected(fewer) <= 0.7 * tuned.expected(taken) < tuned.expected(fewer + 1)
    assert tuned.fewer(1, 0.001) == 0
    assert tuned.speed_at(0.006) == tuned.speed(taken)


def test_tuning_is_not_expected_to_mend_what_fp8_rounds(tmp_path: Path) -> None:
    found = _found(tmp_path)
    made = _measured(tmp_path, found, ERRORS)
    tuned = choose(found, made, Budget(max_output_error=0.5), tuned=True)
    squares = {form: sum(ERRORS[name, form] ** 2 for name in SIZES) for form in (FP8_DENSE, FP8_WEIGHT)}
    rounded, whole = (1.75 * squares[form] for form in (FP8_DENSE, FP8_WEIGHT))  # three steps once, one twice
    taken = len(tuned.steps)
    assert tuned.error(taken) == pytest.approx(whole**0.5, rel=0.02)
    expected = (rounded + TUNED**2 * (whole - rounded)) ** 0.5
    assert tuned.expected(taken) == pytest.approx(expected, rel=0.02)
    assert tuned.steps[0].after.form == FP8_DENSE and tuned.expected(1) == pytest.approx(tuned.error(1))


def test_errors_that_cancel_are_cheaper_together(tmp_path: Path) -> None:
    """What the plan adds is not the sum of what its nodes add alone."""
    found = _found(tmp_path)
    made = _measured(tmp_path, found, dict.fromkeys(ERRORS, 0.01))
    rows = made.load()
    against = torch.tensor([(-1.0) ** list(SIZES).index(path) for _, path in made.columns])
    adds = rows.adds[:, :1].abs() * against
    save_tensors(made.path, {"adds": adds, "weights": rows.weights, "steps": rows.steps})
    chosen = choose(found, made, Budget(max_output_error=0.02))
    assert len(chosen.steps) == len(SIZES) and chosen.speed(len(chosen.steps)) == pytest.approx(2.4)
    assert chosen.error(len(chosen.steps)) < 1e-9
    assert chosen.alone("a", FP8_WEIGHT) == pytest.approx(0.01 * 1.75**0.5)
    assert chosen.alone("a", Form("none")) == 0 and chosen.alone("a", Form("weight")) is None


def test_a_speed_is_reached_with_the_least_error(tmp_path: Path) -> None:
    chosen = _select(tmp_path, min_speed=1.9)
    taken = len(chosen.steps)
    assert chosen.speed(taken) >= 1.9 > chosen.speed(taken - 1)
    assert chosen.error(taken) < _select(tmp_path, max_output_error=0.5).error(taken + 2)
    found = _found(tmp_path)
    require_speed(found, Budget(min_speed=2.39))
    with pytest.raises(
        InputError, match="min_speed is 2.5, and the fastest .* linears 2.40x as fast as dense"
    ):
        require_speed(found, Budget(min_speed=2.5))


def test_what_the_recipe_fixes_counts_and_may_be_too_much(tmp_path: Path) -> None:
    found = _found(tmp_path, {"operand": {"a": "weight", "b": "none"}})
    assert found.open.keys() == {"c", "d", "e", "f"}
    made = _measured(tmp_path, found, ERRORS)
    chosen = choose(found, made, Budget(max_output_error=0.0245))
    fixed = [d.form for d in chosen.plan(len(chosen.steps)).decisions[:2]]
    assert fixed == [FP8_WEIGHT, FP8_DENSE] and chosen.error(0) == pytest.approx(1.75**0.5 * 0.018, rel=0.01)
    with pytest.raises(
        InputError,
        match=r"What the recipe fixes adds 0.02.* by itself, more than budget.max_output_error \(0.01\)",
    ):
        choose(found, made, Budget(max_output_error=0.01))


def test_two_engines_share_the_error_otherwise(tmp_path: Path) -> None:
    """The last step errs twice as much: an engine for the first half may be faster, the other must be slower."""
    chosen = _select(tmp_path, max_output_error=0.006)
    taken = len(chosen.steps)
    (first, faster), (last, slower) = chosen.halves(taken)
    assert (first, last) == (range(2), range(2, 4))
    assert faster > chosen.speed(taken) > slower
    assert chosen.ranges(4) == [range(n, n + 1) for n in range(4)]
    assert chosen.error(taken, range(3, 4)) == pytest.approx(2 * chosen.error(taken, range(1)), rel=0.1)


def test_reasons_say_what_was_weighed(tmp_path: Path) -> None:
    chosen = _select(tmp_path, max_output_error=0.008)
    reasons = {d.linear.path: d.reason for d in chosen.plan(len(chosen.steps)).decisions}
    assert reasons["f"] == "2.40x as fast as dense (128 x 64 -> 384, gpu.json), adds 0.0026 at the output"
    assert reasons["a"] == "dense FP8 would be 1.80x and add 0.0060" or reasons["a"].startswith(
        "1.80x as fast"
    )


def test_the_manifest_tells_what_was_weighed(tmp_path: Path) -> None:
    chosen = _select(tmp_path, max_output_error=0.008)
    taken = len(chosen.steps)
    told = _budget(chosen, Verified(taken, (), AtSteps(0, 3, 0.007, 0.0072, None), (), 5, None, ("a",)))
    assert (told.error.predicted, told.error.solved, told.error.tuned, told.calls) == (0.007, 0.0072, None, 5)
    assert told.stepped_back == ("a",) and [choice.linear for choice in told.linears] == list(SIZES)
    left = 0.0
    for choice in told.linears:
        dense = roofline(TOKENS, CHANNELS, SIZES[choice.linear], 0).dense
        assert choice.microseconds == pytest.approx(dense)
        assert [c.gain for c in choice.candidates] == sorted(c.gain for c in choice.candidates)
        errors = {(c.operand, c.fp8): c.error for c in choice.candidates}
        assert errors["none", False] == 0 and errors["activation", True] is None
        assert errors["weight", True] == chosen.alone(choice.linear, FP8_WEIGHT)
        left += choice.microseconds / choice.candidates[choice.chosen].gain
    assert sum(choice.microseconds for choice in told.linears) / left == pytest.approx(told.speed)
