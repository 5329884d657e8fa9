# SPDX-License-Identifier: Apache-2.0
"""Probes of the tiny FLUX against one linear at a time, and what is measured of a plan that they chose."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lynx_compile.errors import InputError
from lynx_compile.files.progress import no_progress
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.models.structure import Linear
from lynx_compile.passes import sensitivity as passes_sensitivity
from lynx_compile.passes.block_weights import KernelLinear, kernel_linears, node_linears, substituted
from lynx_compile.passes.budget import Selection, choose
from lynx_compile.passes.calibrate import calibrate, replay
from lynx_compile.passes.compensate import compensate, load_weights, save_weights
from lynx_compile.passes.describe import _budget
from lynx_compile.passes.select import SparseGroup, SparsityPlan, candidates, select
from lynx_compile.passes.sensitivity import Sensitivities, probed_calls, sensitivity
from lynx_compile.passes.states import weight_of
from lynx_compile.passes.verify import (
    HeldOut,
    Verified,
    linears_of,
    verify,
    warn_of_long_sums,
    within_error,
    within_psnr,
)
from lynx_compile.recipe import Budget, NodeOperand, Recipe, Sparsity, load_recipe
from lynx_compile.solve.tune import TunedLinear
from lynx_compile.tools.drawn import Drawn
from lynx_compile.tools.images import BEST_PSNR
from lynx_compile.torch_ops.modules import Fp8Linear
from tests.conftest import open_dit

CPU = torch.device("cpu")
FEWER = ("*_context*", "*.add_*", "*.to_add_out")
OTHER_FORMS = (
    Sparsity(operand="activation", rank=16, method="paper", exclude=FEWER),
    Sparsity(operand="none", precision="fp8", exclude=FEWER),
    Sparsity(operand="activation", precision="fp8", exclude=FEWER),
    Sparsity(operand="weight", precision="fp8", exclude=FEWER),
)


@dataclass(frozen=True)
class Probed:
    """2:4 weights of every open linear, and nodes of other forms behind them."""

    recipe: Recipe
    dit: DiT
    recording: Recording
    nodes: tuple[SparseGroup, ...]
    weights: Mapping[SparseGroup, Path]
    sensitivities: Sensitivities
    selection: Selection

    def probe(self, folder: Path, key: str = "key", **changes: Any) -> Sensitivities:
        given = (self.nodes, tuple(self.weights.values()))
        nodes, paths = (part[: changes.get("nodes", len(part))] for part in given)
        progress = changes.get("progress", no_progress)
        return sensitivity(self.dit, nodes, paths, self.recording, self.recipe, folder, key, progress)


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    folder = tmp_path_factory.mktemp("probed")
    recipe = load_recipe(tiny / "tiny.yaml")
    dit, recording = open_dit(recipe)
    found = candidates(dit.groups, Sparsity(), ("sm80",))
    nodes, paths = list(found.nodes), []
    for sparsity in (Sparsity(), *OTHER_FORMS):
        own = found.nodes if not paths else select(dit.groups, sparsity, ("sm90",)).groups
        plan = SparsityPlan((), own)
        changed = recipe.model_copy(update={"sparsity": sparsity})
        statistics = calibrate(dit, plan, recording, changed, folder / f"{len(paths)}", no_progress)
        nodes = list(found.nodes) if not paths else [*nodes, *own]
        paths += compensate(dit, plan, statistics, sparsity, folder / f"w{len(paths)}", no_progress)
    measured = sensitivity(dit, nodes, paths, recording, recipe, folder / "probed", "key", no_progress)
    first = tuple(column for column in measured.columns if column[0] < len(found.nodes))
    selection = choose(found, Sensitivities(measured.path, first), Budget(max_output_error=0.5))
    weights = dict(zip(nodes, paths, strict=True))
    return Probed(recipe, dit, recording, tuple(nodes), weights, measured, selection)


def test_probes_tell_what_each_linear_and_form_adds(made: Probed) -> None:
    """Against the model run anew with one linear changed at a time, for all linears and forms."""
    rows, exact = made.sensitivities.load(), _one_at_a_time(made)
    found = torch.tensor([rows.error(column) for column in rows.adds.T], dtype=torch.float64)
    told = exact > 1e-5  # what is smaller drowns in float32
    found, exact = found[told], exact[told]
    ratio = found / exact
    assert len(exact) > 40 and float(exact.max() / exact.min()) > 100, "they differ by far"
    assert (
        float((ratio.log().square().mean()).sqrt()) < 0.08
        and 0.75 < float(ratio.min()) < float(ratio.max()) < 1.3
    )
    ranks = torch.stack([found.argsort().argsort(), exact.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.98


def _one_at_a_time(made: Probed) -> torch.Tensor:
    """Relative error at the output of every column, on the calls that were probed."""
    calls = probed_calls(made.recording, made.dit.calls.calls, made.recipe.calibration.seed, 128)
    weights = torch.tensor([weight_of(call, 3) for call in calls], dtype=torch.float64)
    arguments = [made.recording.arguments(call) for call in calls]
    dense = [replay(made.dit, one)[0] for one in arguments]
    found = []
    for node, path in made.sensitivities.columns:
        linear = node_linears(made.weights[made.nodes[node]], CPU)[path]
        squares = []
        with substituted(made.dit.module, {path: linear}):
            for one, y in zip(arguments, dense, strict=True):
                squares.append(((replay(made.dit, one)[0] - y).norm() / y.norm()) ** 2)
        found.append(float((weights * torch.stack(squares)).sum() / weights.sum()) ** 0.5)
    return torch.tensor(found, dtype=torch.float64)


def test_a_plan_adds_what_was_predicted(made: Probed) -> None:
    selection = made.selection
    apart = HeldOut(made.dit, made.recording, no_progress).calls
    assert {call.sample for call in apart} == {3} and len(apart) == 4
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # so few tokens were solved on that other samples err by far more
        patch.setattr(
            Recording, "held_out", lambda _, calls: {n for n, call in enumerate(calls) if call.sample == 2}
        )
        held_out = HeldOut(made.dit, made.recording, no_progress)
    for taken in (len(selection.steps) // 2, len(selection.steps)):
        linears = linears_of(selection, taken, made.weights, CPU)
        squares = held_out.squares(linears)
        assert selection.error(taken) == pytest.approx(held_out.error(squares), rel=0.25)
        early, late = (held_out.error(squares, steps) for steps in (range(2), range(2, 4)))
        assert held_out.error(squares) == pytest.approx(
            ((3.67 * early**2 + 2.33 * late**2) / 6) ** 0.5, rel=0.05
        )
    module = made.dit.module
    assert all("forward" not in vars(module.get_submodule(path)) for path in linears), "put back"
    assert not any(m._forward_hooks for m in module.modules()), "no hook is left"


def test_rows_of_a_batch_are_those_of_its_samples(
    made: Probed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the batch's samples in one row the same probes tell the same, but for their noise."""
    monkeypatch.setattr(passes_sensitivity, "ROWS", 8)
    apart = made.probe(tmp_path / "apart", nodes=2).load()
    by_samples = passes_sensitivity._by_samples
    monkeypatch.setattr(
        passes_sensitivity, "_by_samples", lambda found, n, batch: by_samples(found, n, batch + 1)
    )
    together = made.probe(tmp_path / "together", nodes=2).load()
    assert len(apart.weights) == 24 and len(together.weights) == 12, "one of two samples, one probe a call"
    summed = apart.adds.reshape(12, 2, -1).sum(1) / 2**0.5
    assert torch.allclose(summed, together.adds, rtol=1e-6, atol=1e-12)
    assert float(apart.weights.sum()) == pytest.approx(float(together.weights.sum()))


def test_an_interrupted_run_goes_on_to_the_same_rows(
    made: Probed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes_sensitivity, "ROWS", 8)

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.probe(tmp_path / "parts", nodes=2, progress=interrupt)
    assert torch.is_grad_enabled() and len(list((tmp_path / "parts" / "calls").iterdir())) == 5
    runs: list[int] = []
    output = passes_sensitivity._output
    monkeypatch.setattr(passes_sensitivity, "_output", lambda *given: runs.append(1) or output(*given))
    parts = made.probe(tmp_path / "parts", nodes=2).load()
    assert len(runs) == 12 - 5
    whole = made.probe(tmp_path / "whole", nodes=2).load()
    assert torch.equal(parts.adds, whole.adds)
    runs.clear()
    made.probe(tmp_path / "parts", key="another", nodes=2)
    assert len(runs) == 12, "what another key wrote is not taken"


def test_weights_that_memory_does_not_hold_are_read_anew_and_probed_once(
    made: Probed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes_sensitivity, "AT_ONCE", 1)
    little = made.recipe.calibration.model_copy(update={"memory_gib": 1e-6})
    small = replace(made, recipe=made.recipe.model_copy(update={"calibration": little}))
    once = small.probe(tmp_path / "little", nodes=2).load()
    monkeypatch.setattr(passes_sensitivity, "ROWS", 8)
    assert torch.equal(once.adds, made.probe(tmp_path / "enough", nodes=2).load().adds)


def test_calls_are_spread_over_steps_and_none_is_held_out(made: Probed) -> None:
    calls = made.dit.calls.calls
    chosen = probed_calls(made.recording, calls, 0, most=4)
    assert sorted(call.step for call in chosen) == [0, 1, 2, 3]
    out = [calls[number] for number in made.recording.held_out(calls)]
    assert not any(call in out for call in probed_calls(made.recording, calls, 0, 128))
    assert probed_calls(made.recording, calls[:1], 0, 128) == [calls[0]], "better than none"


def test_what_is_measured_is_spread_over_steps_too(made: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs keep four calls each: every fourth one would be the first of each run."""
    monkeypatch.setattr(Recording, "held_out", lambda _, calls: set(range(len(calls))))
    calls = made.dit.calls.calls
    assert len(calls) == 16 and [call.step for call in calls[:5]] == [0, 1, 2, 3, 0]
    few = HeldOut(made.dit, made.recording, no_progress, 4)
    assert sorted(call.step for call in few.calls) == [0, 1, 2, 3]
    assert len({call.sample for call in few.calls}) > 1
    everything = HeldOut(made.dit, made.recording, no_progress)
    assert sorted((call.sample, call.step) for call in everything.calls) == [
        (a, b) for a in range(4) for b in range(4)
    ]


def test_steps_of_which_no_call_was_measured_have_no_error(
    made: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Recording, "held_out", lambda _, calls: {n for n, call in enumerate(calls) if call.step == 1}
    )
    tuned = {group: made.weights[group] for group in made.selection.plan(len(made.selection.steps)).groups}
    found = _verify(made, made.selection, tuned=tuned)
    assert [at.solved is None for at in found.steps] == [True, False, True, True]
    assert [at.tuned is None for at in found.steps] == [True, False, True, True]
    assert found.whole.solved is not None and all(at.predicted for at in found.steps)
    assert _budget(made.selection, found).steps[0].solved is None


def _verify(made: Probed, selection: Selection, **changes: Any) -> Verified:
    given = {"taken": len(selection.steps), "tuned": None, "psnr": None} | changes
    return verify(
        made.dit, selection, given["taken"], made.weights, given["tuned"], made.recording, given["psnr"],
        no_progress,
    )  # fmt: skip


def test_what_holds_is_left_as_it_is(made: Probed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = _verify(made, made.selection)
    taken = len(made.selection.steps)
    assert found.taken == taken and found.stepped_back == () and found.whole.tuned is None
    assert found.weights == tuple(made.weights[group] for group in made.selection.plan(taken).groups)
    assert found.whole.predicted == made.selection.error(taken)
    assert [(at.first, at.last) for at in found.steps] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    budget = _budget(made.selection, found)
    assert budget.error.solved == found.whole.solved and len(budget.linears) == 17
    assert {linear.candidates[linear.chosen].form for linear in budget.linears} == {"2:4 weights"}
    assert all(linear.candidates[0].error == 0 or linear.candidates[0].gain < 1 for linear in budget.linears)
    assert "two engines would be" in caplog.text and "over the budget" not in caplog.text


def test_what_kernels_add_on_long_sums_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def groups(*given: tuple[str, int, NodeOperand, bool]) -> list[SparseGroup]:
        return [
            SparseGroup(name, (Linear(name, channels, 64, True, None),), 16, operand, fp8=fp8)
            for name, channels, operand, fp8 in given
        ]

    short = groups(
        ("0.up", 4096, "weight", True), ("0.down", 8192, "weight", True), ("1.up", 6144, "weight", False)
    )
    warn_of_long_sums(short)
    assert not caplog.text
    long = groups(("2.up", 6144, "weight", True), ("3.up", 4224, "none", True))
    warn_of_long_sums([*short, *long])
    assert "2 nodes in FP8" in caplog.text and "(2.up, 3.up)" in caplog.text
    warn_of_long_sums(long * 2)
    assert "4 nodes in FP8" in caplog.text and "(2.up, 3.up, 2.up, ...)" in caplog.text


def test_fp8_is_measured_by_the_kernels_where_they_run(made: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tuple(group for group in made.nodes if group.fp8)
    assert {group.operand for group in groups} == {"none", "activation", "weight"}
    held_out = HeldOut(made.dit, made.recording, no_progress)
    assert not held_out.by_kernels, "there is no GPU here"
    for operand in ("none", "activation", "weight"):
        plan = SparsityPlan((), tuple(group for group in groups if group.operand == operand))
        selection: Any = SimpleNamespace(plan=lambda taken, plan=plan: plan)
        held_out.by_kernels = False
        emulated = held_out.squares(held_out.linears_of(selection, 0, made.weights))
        held_out.by_kernels = True
        linears = held_out.linears_of(selection, 0, made.weights)
        assert {type(linear) for linear in linears.values()} == {KernelLinear}
        found = held_out.squares(linears)
        assert held_out.error(found) == pytest.approx(held_out.error(emulated), rel=0.05)
        with monkeypatch.context() as patch:
            exact = Fp8Linear.rows
            patch.setattr(Fp8Linear, "rows", lambda linear, x, exact=exact: 0.7 * exact(linear, x))
            assert held_out.error(held_out.squares(linears)) > held_out.error(emulated)


def test_a_kernel_is_its_definition_for_every_operand(made: Probed) -> None:
    torch.manual_seed(0)
    for group in (group for group in made.nodes if group.fp8):
        emulated = node_linears(made.weights[group], CPU)
        for path, linear in kernel_linears(made.weights[group], CPU, torch.float32).items():
            x = torch.randn(3, 5, group.in_channels)
            wanted = emulated[path](x)
            assert float((linear(x) - wanted).norm() / wanted.norm()) < 1e-5, (path, group.operand)


def test_over_the_budget_is_stepped_back_and_tuned_weights_stay(
    made: Probed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = len(made.selection.steps)
    most = 0.8 * _verify(made, made.selection).whole.solved  # type: ignore[operator]
    tuned = {
        group: Path(shutil.copy(made.weights[group], tmp_path)) for group in made.selection.plan(whole).groups
    }
    selection = replace(made.selection, limit=("max_output_error", most))
    found = _verify(made, selection, tuned=tuned)
    assert 0 < found.taken < whole and found.whole.tuned == found.whole.solved
    assert found.whole.tuned <= most  # type: ignore[operator]
    assert found.stepped_back and "over the budget when measured" in caplog.text
    assert {path.parent for path in found.weights} == {tmp_path}
    dropped = {step.group for step in selection.steps[found.taken :]}
    assert set(found.stepped_back) == dropped
    assert not dropped & {group.name for group in selection.plan(found.taken).groups}
    assert found.whole.tuned > 0.5 * most, "and not further than needed"  # type: ignore[operator]


def test_after_stepping_back_the_solved_weights_are_taken_where_they_err_less(
    made: Probed, tmp_path: Path
) -> None:
    """Weights tuned together with others make up for errors that are no longer there."""
    whole = len(made.selection.steps)
    tuned = {}
    for group in made.selection.plan(whole).groups:
        tuned[group] = tmp_path / made.weights[group].name
        solved = load_weights(made.weights[group])
        save_weights(tuned[group], replace(solved, weight=1.02 * solved.weight), made.dit.dtype)
    most = 0.8 * _verify(made, made.selection).whole.solved  # type: ignore[operator]
    found = _verify(made, replace(made.selection, limit=("max_output_error", most)), tuned=tuned)
    assert 0 < found.taken < whole and found.whole.tuned is None and 0.5 * most < found.whole.solved <= most  # type: ignore[operator]
    assert found.weights == tuple(made.weights[group] for group in made.selection.plan(found.taken).groups)
    assert _verify(made, made.selection, tuned=tuned).whole.tuned is not None, "of the whole plan they stay"


def test_a_budget_that_nothing_fits_is_an_error(made: Probed) -> None:
    with pytest.raises(InputError, match="No linear would become sparse"):
        _verify(made, replace(made.selection, limit=("max_output_error", 1e-9)))


@pytest.mark.parametrize(("share", "is_whole"), [(1.0, True), (0.5, False)])
def test_what_will_be_tuned_may_err_as_much_as_tuning_mends(
    made: Probed, caplog: pytest.LogCaptureFixture, share: float, is_whole: bool
) -> None:
    caplog.set_level("INFO")
    whole = len(made.selection.steps)
    most = share * _verify(made, made.selection).whole.solved  # type: ignore[operator]
    selection = replace(made.selection, limit=("max_output_error", most), remains=0.65)
    taken = within_error(made.dit, selection, made.weights, made.recording, no_progress)
    assert (taken == whole) == is_whole and "expected when tuned" in caplog.text
    assert selection.expected(taken) == pytest.approx(0.65 * selection.error(taken)), "nothing is rounded"
    solved = _verify(made, replace(selection, limit=("max_output_error", 1.0)), taken=taken).whole.solved
    assert 0.3 * most < 0.65 * solved <= most  # type: ignore[operator]


def test_more_than_was_predicted_is_expected_after_tuning_too(made: Probed) -> None:
    """Of predictions that are a tenth of what they should be."""
    whole = len(made.selection.steps)
    most = 0.5 * _verify(made, made.selection).whole.solved  # type: ignore[operator]
    selection = replace(made.selection, limit=("max_output_error", most), remains=0.65)
    adds = selection._adds
    tenth = {key: 0.1 * value for key, value in adds.nodes.items()}
    vars(selection)["_adds"] = replace(adds, fixed=0.1 * adds.fixed, nodes=tenth)
    assert selection.expected(whole) < 0.2 * most
    taken = within_error(made.dit, selection, made.weights, made.recording, no_progress)
    solved = _verify(made, replace(selection, limit=("max_output_error", 1.0)), taken=taken).whole.solved
    assert 0 < taken < whole and 0.65 * solved <= most  # type: ignore[operator]


def test_images_decide_where_they_are_asked(made: Probed) -> None:
    """A made-up pipeline, whose images lose a decibel with each linear."""
    drawn: list[int] = []

    def psnr(linears: Mapping[str, TunedLinear]) -> float:
        drawn.append(len(linears))
        return 40.0 - len(linears)

    selection = replace(made.selection, limit=("min_psnr", 33.0))
    taken = within_psnr(selection, made.weights, psnr, no_progress)
    sizes = [len(linears_of(selection, n, made.weights, CPU)) for n in range(1, len(selection.steps) + 1)]
    assert sizes[taken - 1] <= 7 < sizes[taken] and len(drawn) <= 4
    found = _verify(made, selection, taken=taken + 2, psnr=psnr)
    assert (
        0 < found.taken <= taken and found.psnr == 40.0 - sizes[found.taken - 1] >= 33 and found.stepped_back
    )


def test_the_pipeline_draws_with_other_linears(made: Probed, tmp_path: Path) -> None:
    """The same images with none, worse ones with more of them; and the pipeline's own linears are put back."""
    compare = made.recipe.compare.model_copy(update={"samples": 2})
    drawn = Drawn(made.recipe.model_copy(update={"compare": compare}), tmp_path, made.dit.component)
    few, all_ = (linears_of(made.selection, n, made.weights, CPU) for n in (3, len(made.selection.steps)))
    assert drawn({}) == BEST_PSNR
    assert BEST_PSNR > (worst := drawn(all_)) > 20 and BEST_PSNR > drawn(few) > worst
    assert drawn._sampler is not None
    transformer = weakref.ref(drawn._sampler.pipe.transformer)
    drawn.release()
    assert transformer() is None, "tuning needs its memory"
    assert drawn(all_) == worst and drawn({}) == BEST_PSNR
