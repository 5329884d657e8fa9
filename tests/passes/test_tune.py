# SPDX-License-Identifier: Apache-2.0
"""Tuning on the tiny FLUX: what it says against the model itself, and what stays as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.models.structure import Linear
from lynx_compile.ops.sparse_linear import sparse_linear
from lynx_compile.passes import end_to_end, lanes
from lynx_compile.passes import tune as passes_tune
from lynx_compile.passes.block_weights import all_linears, joined, node_linears, rows_of, split, tuned_linears
from lynx_compile.passes.calibrate import Statistics, Unkept, calibrate, replay
from lynx_compile.passes.compensate import SparseLinearWeights, compensate, load_weights, save_weights
from lynx_compile.passes.select import SparseGroup, SparsityPlan, select
from lynx_compile.passes.tune import Tuned, is_tuned, tune
from lynx_compile.recipe import Compensation, Recipe, Sparsity, load_recipe
from lynx_compile.solve import tune as solve_tune
from tests.conftest import open_dit

BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")
SAMPLES = 16  # noises of few prompts; two to a call, four calls to a sample, and one sample more is held out
FORMS = {  # not solved to the optimum, which leaves little to gain on a random model
    "weight": Sparsity(operand="weight", method="none"),
    "activation": Sparsity(operand="activation", method="paper", rank=16),
    "fp8": Sparsity(operand="weight", method="none", precision="fp8"),
}


@dataclass(frozen=True)
class Compensated:
    """What ``tune`` takes; ``run`` calls it with a folder, a key and what else differs."""

    recipe: Recipe
    dit: DiT
    recording: Recording
    plan: SparsityPlan
    statistics: Statistics
    weights: tuple[Path, ...]

    def run(self, folder: Path, progress: Progress = no_progress, key: str = "key", **changes: Any) -> Tuned:
        compensation = Compensation(**({"tune": "blockwise", "steps": 50, "minutes": 60.0} | changes))
        recipe = self.recipe.model_copy(update={"compensation": compensation})
        return tune(
            self.dit, self.plan, self.weights, self.statistics, self.recording, recipe, folder, key, progress
        )


@pytest.fixture(scope="module")
def compensated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compensated]:
    recipe = load_recipe(tiny / "tiny.yaml")
    calibration = recipe.calibration.model_copy(update={"samples": SAMPLES})
    recipe = recipe.model_copy(update={"calibration": calibration})
    dit, recording = open_dit(recipe)
    made: dict[str, Compensated] = {}

    def make(form: str) -> Compensated:
        if form not in made:
            folder = tmp_path_factory.mktemp(form)
            changed = recipe.model_copy(update={"sparsity": FORMS[form]})
            plan = select(dit.groups, FORMS[form], ("sm90",))
            statistics = calibrate(dit, plan, recording, changed, folder / "statistics", no_progress)
            weights = compensate(dit, plan, statistics, FORMS[form], folder / "weights", no_progress)
            made[form] = Compensated(changed, dit, recording, plan, statistics, weights)
        return made[form]

    return make


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two calls: the tiny model has few tokens, and would take all calls in every step."""
    monkeypatch.setitem(passes_tune.TOKENS_A_STEP, "cpu", 256)


@pytest.mark.parametrize("form", FORMS)
def test_tuning_lowers_the_held_out_error_within_the_masks(
    compensated: Callable[[str], Compensated], tmp_path: Path, form: str
) -> None:
    given = compensated(form)
    tuned = given.run(tmp_path)
    assert tuned.tuned_error < 0.93 * tuned.compensated_error
    assert [block.path for block in tuned.blocks] == list(BLOCKS)
    assert all(block.outcome.after < block.outcome.before for block in tuned.blocks)
    assert [path.name for path in tuned.weights] == [path.name for path in given.weights]
    assert not (tmp_path / "blocks").exists(), "they are in the weights now"
    for old_path, new_path in zip(given.weights, tuned.weights, strict=True):
        old, new = load_weights(old_path), load_weights(new_path)
        assert (old.linears, old.rank, old.operand, old.fp8) == (
            new.linears, new.rank, new.operand, new.fp8,
        )  # fmt: skip
        assert old.weight.shape == new.weight.shape and old.weight.dtype == new.weight.dtype
        assert not torch.equal(old.weight.float(), new.weight.float())
        if form == "activation":  # the paper's method trains its low rank alone
            assert torch.equal(old.weight[:, : old.in_channels], new.weight[:, : new.in_channels])
            assert not torch.equal(old.lora_down, new.lora_down)
        assert torch.equal(old.bias, new.bias) == (form == "activation")
        assert old.errors != new.errors and all(0 < error < 1 for error in new.errors)
        assert new.solved_errors == pytest.approx(old.errors, rel=1e-2), "but for rounding to 16 bits"
        assert old.solved_errors is None
        if old.operand == "weight":
            kept = new.weight.float() != 0
            assert kept.unflatten(-1, (-1, 4)).sum(-1).le(2).all()
            if form == "weight":
                assert not kept[old.weight == 0].any(), "the mask is the solved one"


@pytest.mark.parametrize(("form", "way"), [("weight", "end_to_end"), ("activation", "blockwise")])
def test_the_errors_are_those_of_the_model_with_these_weights(
    compensated: Callable[[str], Compensated], tmp_path: Path, form: str, way: str
) -> None:
    """Run anew on the calls held out, with the weights from the files in the model's own linears."""
    given = compensated(form)
    tuned = given.run(tmp_path, steps=20, tune=way)
    assert (tuned.whole is not None) == (way == "end_to_end")
    calls = given.dit.calls.calls
    held_out = [calls[number] for number in given.recording.held_out(calls)]
    arguments = [given.recording.arguments(call) for call in held_out]
    dense = torch.cat([replay(given.dit, one)[0] for one in arguments])
    for paths, expected in ((given.weights, tuned.compensated_error), (tuned.weights, tuned.tuned_error)):
        with pytest.MonkeyPatch.context() as patch:
            for path in paths:
                _put(patch, given.dit, load_weights(path))
            y = torch.cat([replay(given.dit, one)[0] for one in arguments])
        # Files hold weights in 16 bits, and a little less can flip a choice of activations.
        assert float((y - dense).norm() / dense.norm()) == pytest.approx(expected, rel=5e-3)


def _put(patch: pytest.MonkeyPatch, dit: DiT, weights: SparseLinearWeights) -> None:
    """Let the linears compute what the node does, each its own channels."""

    def node(x: torch.Tensor) -> torch.Tensor:
        if weights.operand == "weight":
            return torch.nn.functional.linear(x, weights.weight, weights.bias)
        return sparse_linear(
            x,
            weights.weight,
            weights.lora_down,
            weights.bias,
            rank=weights.rank,
            norm_scale=weights.norm_scale,
        )

    first = 0
    for path, size in zip(weights.linears, weights.out_channels, strict=True):
        rows = slice(first, first + size)
        patch.setattr(
            dit.module.get_submodule(path), "forward", lambda x, rows=rows: node(x)[..., rows], raising=False
        )
        first += size


def test_what_gets_worse_stays_as_it_was(
    compensated: Callable[[str], Compensated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = compensated("weight")
    monkeypatch.setattr(solve_tune, "LOOK_EVERY", 2)
    monkeypatch.setattr(passes_tune, "RATE", 1e5)
    monkeypatch.setattr(passes_tune, "END_RATE", 1e5)
    tuned = given.run(tmp_path, steps=2, tune="end_to_end")
    assert all(block.outcome.after == block.outcome.before for block in tuned.blocks)
    assert tuned.whole is not None and tuned.whole.outcome.after == tuned.whole.outcome.before
    assert tuned.tuned_error == tuned.compensated_error
    assert "weights stay as they were" in caplog.text
    for old, new in zip(given.weights, tuned.weights, strict=True):
        assert old.read_bytes() == new.read_bytes()


def test_a_block_that_gains_nothing_is_left_out_alone(
    compensated: Callable[[str], Compensated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = compensated("weight")
    fit, (first, _) = passes_tune.fit, BLOCKS
    number = iter(range(len(BLOCKS)))

    def first_only(*arguments: Any) -> Any:
        outcome = fit(*arguments)
        return outcome if next(number) == 0 else replace(outcome, after=outcome.before)

    monkeypatch.setattr(passes_tune, "fit", first_only)
    tuned = given.run(tmp_path)
    assert tuned.tuned_error < tuned.compensated_error
    for old, new in zip(given.weights, tuned.weights, strict=True):
        same = torch.equal(load_weights(old).weight, load_weights(new).weight)
        assert same != old.name.startswith(first)
        assert (load_weights(new).solved_errors is None) == same


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    compensated: Callable[[str], Compensated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = compensated("fp8")
    whole = given.run(tmp_path / "whole", steps=10)

    def interrupt(what: str, done: int, total: int) -> None:
        if BLOCKS[1] in what and done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given.run(tmp_path / "parts", interrupt, steps=10)
    assert torch.is_grad_enabled()
    assert [path.stem for path in (tmp_path / "parts" / "blocks").iterdir()] == [BLOCKS[0]]
    fit, tuned = passes_tune.fit, []
    monkeypatch.setattr(passes_tune, "fit", lambda *arguments: tuned.append(arguments) or fit(*arguments))
    parts = given.run(tmp_path / "parts", steps=10)
    assert len(tuned) == 1, "the first block was there"
    for a, b in zip(whole.weights, parts.weights, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert (whole.tuned_error, whole.compensated_error) == (parts.tuned_error, parts.compensated_error)


def test_end_to_end_goes_on_from_the_blocks(
    compensated: Callable[[str], Compensated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, stopped there, from where it was: to the same bytes, and no block is tuned again."""
    given = compensated("fp8")
    monkeypatch.setattr(solve_tune, "SAVE_EVERY", 0)
    monkeypatch.setattr(solve_tune, "LOOK_EVERY", 10)
    whole = given.run(tmp_path / "whole", steps=10, tune="end_to_end")
    assert whole.whole is not None
    assert whole.tuned_error == whole.whole.tuned_error < whole.whole.given_error < whole.compensated_error
    assert whole.whole.outcome.steps == 10 * passes_tune.END_STEPS

    def interrupt(what: str, done: int, total: int) -> None:
        if "end to end" in what and done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given.run(tmp_path / "parts", interrupt, steps=10, tune="end_to_end")
    assert "forward" not in vars(given.dit.module.get_submodule(f"{BLOCKS[0]}.attn.to_q")), (
        "the model is as it was"
    )
    steps = []
    parts = given.run(tmp_path / "parts", lambda what, *_: steps.append(what), steps=10, tune="end_to_end")
    assert steps.count("steps end to end") == 10 * passes_tune.END_STEPS - 20
    assert not [what for what in steps if "transformer_blocks" in what]
    for a, b in zip(whole.weights, parts.weights, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert [path.suffix for path in (tmp_path / "parts").iterdir()] == [".safetensors"] * len(given.weights)


@pytest.mark.parametrize("damage", ["another key", "half a file"])
def test_a_block_of_another_run_is_not_taken(
    compensated: Callable[[str], Compensated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    given = compensated("weight")
    where = passes_tune.where
    monkeypatch.setattr(passes_tune, "where", _only_once(where))
    with pytest.raises(KeyboardInterrupt):
        given.run(tmp_path, steps=2)
    monkeypatch.setattr(passes_tune, "where", where)
    (path,) = (tmp_path / "blocks").iterdir()
    if damage == "half a file":
        path.write_bytes(path.read_bytes()[:1000])
    fit, tuned = passes_tune.fit, []
    monkeypatch.setattr(passes_tune, "fit", lambda *arguments: tuned.append(arguments) or fit(*arguments))
    given.run(tmp_path, steps=2, key="other" if damage == "another key" else "key")
    assert len(tuned) == 2


def _only_once(where: Callable[..., str | None]) -> Callable[..., str | None]:
    seen: list[str | None] = []

    def stop(calls: Any) -> str | None:
        if seen:
            raise KeyboardInterrupt
        seen.append(where(calls))
        return seen[0]

    return stop


def test_calls_that_part_are_refused(compensated: Callable[[str], Compensated]) -> None:
    given = compensated("weight")
    with lanes.lanes(given.dit, given.recording, given.recipe) as calls:
        assert lanes.where(calls) == BLOCKS[0]
        state = calls[0].dense.at
        assert state is not None
        calls[0].dense.go_on((torch.zeros_like(state.kwargs["hidden_states"]),) * 2)
        with pytest.raises(StageError, match=r"do not run the same blocks.*compensation.tune to false"):
            lanes.where(calls)


def test_as_many_calls_as_memory_holds_and_both_kinds(compensated: Callable[[str], Compensated]) -> None:
    given = compensated("weight")
    with lanes.lanes(given.dit, given.recording, given.recipe) as calls:
        assert len(calls) == len(given.dit.calls.calls) == 36
        assert sum(lane.is_held_out for lane in calls) == 4, "a sample's"
    little = given.recipe.calibration.model_copy(update={"memory_gib": 1e-9})
    recipe = given.recipe.model_copy(update={"calibration": little})
    with lanes.lanes(given.dit, given.recording, recipe) as calls:
        assert sorted(lane.is_held_out for lane in calls) == [False, True]


def _shared_between_blocks() -> SparseLinearWeights:
    torch.manual_seed(0)
    return SparseLinearWeights(
        ("a.0.k", "a.1.k"), (8, 16), torch.randn(24, 64), torch.randn(16, 32), torch.randn(24), 16, False, (0.1, 0.2)
    )  # fmt: skip


def test_errors_come_of_fewer_calls_where_moments_are_not_kept(
    compensated: Callable[[str], Compensated], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = compensated("weight")
    files = dict(zip(given.plan.groups, given.weights, strict=True))
    rows = {name: replace(part, bias=part.bias + 0.1) for name, part in rows_of(files, BLOCKS[0]).items()}
    calibration = given.recipe.calibration.model_copy(update={"memory_gib": 5e-4})
    recipe = given.recipe.model_copy(update={"calibration": calibration})
    unkept = Unkept(given.dit, given.plan, given.recording, recipe, sampled=True)
    with caplog.at_level("INFO"):
        found = passes_tune._written(given.dit, files, rows, unkept, tmp_path / "few", no_progress)
    assert caplog.text.count(" calls, which fit calibration.memory_gib") == 1, "one pass of them"
    expected = passes_tune._written(given.dit, files, rows, given.statistics, tmp_path, no_progress)
    for old, few, every in zip(given.weights, found, expected, strict=True):
        before, one, other = map(load_weights, (old, few, every))
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
        assert one.errors == pytest.approx(other.errors, rel=0.2)
        moved = one.linears[0].startswith(BLOCKS[0])
        assert moved == (one.solved_errors is not None)
        if one.solved_errors is not None:  # of as few calls, so that they lie side by side
            assert one.solved_errors == pytest.approx(before.errors, rel=0.2)
            assert one.solved_errors != other.solved_errors
            assert all(new > was for new, was in zip(one.errors, one.solved_errors, strict=True))


def test_weights_of_all_blocks_are_never_in_memory_together(
    compensated: Callable[[str], Compensated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where tuning goes on end to end, which is for models that fit."""
    given = compensated("weight")
    read: list[weakref.ref[Any]] = []
    output_errors, written, load_block = (
        passes_tune._output_errors,
        passes_tune._written,
        passes_tune.load_block,
    )

    def noted(*arguments: Any) -> Any:
        found = load_block(*arguments)
        read.extend(weakref.ref(part) for part in found[0].values())
        return found

    def blocks_are_done(*arguments: Any) -> Any:
        monkeypatch.setattr(passes_tune, "load_block", noted)
        monkeypatch.setattr(passes_tune, "split", lambda weights: pytest.fail("of all nodes"))
        return output_errors(*arguments)

    def written_from_files(*arguments: Any) -> Any:
        assert not read
        rows = arguments[2]
        for linear in rows:
            assert rows[linear].weight.shape[0] and linear in rows
            assert sum(part() is not None for part in read) <= 12, "a block's"
        return written(*arguments)

    monkeypatch.setattr(passes_tune, "_output_errors", blocks_are_done)
    monkeypatch.setattr(passes_tune, "_written", written_from_files)
    tuned = given.run(tmp_path, steps=10)
    assert tuned.tuned_error < tuned.compensated_error and len(read) == 2 * 17, "both blocks, twice"


def test_nothing_of_another_plan_is_left(compensated: Callable[[str], Compensated], tmp_path: Path) -> None:
    given = compensated("weight")
    assert len(given.run(tmp_path, steps=1).weights) == len(given.weights) > 3
    plan = SparsityPlan(given.plan.decisions, given.plan.groups[:3])
    tuned = replace(given, plan=plan, weights=given.weights[:3]).run(tmp_path, steps=1, key="another")
    assert set(tmp_path.iterdir()) == set(tuned.weights) and len(tuned.weights) == 3


def test_weights_split_and_join() -> None:
    weights = _shared_between_blocks()
    blank = replace(weights, weight=weights.weight.clone())
    blank.weight[:, 34::4] = blank.weight[:, 35::4] = 0  # what the low rank leaves free
    again = joined(blank, split(blank))
    assert torch.equal(again.weight, blank.weight) and torch.equal(again.lora_down, blank.lora_down)
    rows = {"a.1.k": replace(split(blank)["a.1.k"], weight=torch.ones(16, 32), bias=torch.ones(16))}
    changed = joined(blank, rows)
    assert torch.equal(changed.weight[:8], blank.weight[:8]) and torch.equal(changed.bias[:8], blank.bias[:8])
    assert changed.weight[8:, :32].eq(1).all() and changed.bias[8:].eq(1).all()
    assert torch.equal(changed.weight[8:, 32:], blank.weight[8:, 32:]), "the low rank"


def test_what_blocks_share_is_not_tuned_in_one_of_them(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", _shared_between_blocks())
    linears = (Linear("a.0.k", 32, 8, True, None), Linear("a.1.k", 32, 16, True, None))
    files = {SparseGroup("a.0.k", linears, 4, "activation"): tmp_path / "w.safetensors"}
    for block, whole in (("a.0", False), ("a", True)):
        rows = rows_of(files, block)
        made = list(tuned_linears(files, block, rows, torch.device("cpu")).values())
        assert len({id(linear.lora_down) for linear in made}) == 1
        assert made[0].lora_down is not None and made[0].lora_down.requires_grad == whole
        assert made[0].weight.requires_grad


@pytest.mark.parametrize("of_block", [True, False])
def test_modules_are_made_where_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_block: bool
) -> None:
    """Masks of a large model's weights take a CPU seconds a block."""
    save_weights(tmp_path / "w.safetensors", _shared_between_blocks())
    linears = (Linear("a.0.k", 32, 8, True, None), Linear("a.1.k", 32, 16, True, None))
    files = {SparseGroup("a.0.k", linears, 4, "weight"): tmp_path / "w.safetensors"}
    rows = {path: replace(part, operand="weight") for path, part in rows_of(files, "a").items()}
    masked: list[str] = []
    real = solve_tune.keep_mask
    monkeypatch.setattr(solve_tune, "keep_mask", lambda z: masked.append(z.device.type) or real(z))
    meta = torch.device("meta")
    made = tuned_linears(files, "a", rows, meta) if of_block else all_linears(files, rows, meta)
    assert masked == ["meta"] * 2
    assert {tensor.device.type for linear in made.values() for tensor in linear.state_dict().values()} == {
        "meta"
    }


def test_left_to_us_small_models_are_tuned_on_a_cpu(
    compensated: Callable[[str], Compensated], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = compensated("weight")

    def asked(mode: Any) -> bool:
        recipe = given.recipe.model_copy(update={"compensation": Compensation(tune=mode)})
        return is_tuned(given.dit, given.plan, recipe)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [asked(mode) for mode in ("auto", "off", "blockwise")] == [True, False, True]
    monkeypatch.setattr(passes_tune, "SMALL", 100)
    assert [asked(mode) for mode in ("auto", "off", "blockwise")] == [False, False, True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [asked(mode) for mode in ("auto", "off", "blockwise")] == [True, False, True]


def test_what_a_stopped_run_goes_on_with_is_copied_a_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off a GPU, which is played here: all of it at once is five times the float32 weights."""
    copies: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        copies.append(weakref.ref(made))
        alive.append(sum(copy() is not None for copy in copies))
        return made

    tensors = {f"now.{number}": torch.full((4, 4), float(number)) for number in range(8)}
    shelf = end_to_end._on_disk(tmp_path / "shelf.safetensors", "key")
    assert shelf.load() is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", copied)
        shelf.save(tensors)
    assert len(copies) == 8 and max(alive) <= 2
    found = shelf.load()
    assert found is not None and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert end_to_end._on_disk(tmp_path / "shelf.safetensors", "another").load() is None


def test_what_fits_is_what_the_model_leaves(
    compensated: Callable[[str], Compensated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is not loaded yet, since the stages before were taken from the cache."""
    plan = compensated("weight").plan
    free = [3 * solve_tune.BYTES_A_WEIGHT * sum(group.weights for group in plan.groups) / 2 + 100]

    class OnGpu:
        device = torch.device("cuda")

        @cached_property
        def module(self) -> torch.nn.Module:
            free[0] -= 200
            return torch.nn.Linear(1, 1)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2 * free[0]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    dit: Any = OnGpu()
    assert not end_to_end.fits(dit, plan)
    free[0] += 200
    assert end_to_end.fits(dit, plan)


@pytest.mark.parametrize("form", FORMS)
def test_linears_that_are_not_tuned_hold_their_weights_once(
    compensated: Callable[[str], Compensated], form: str
) -> None:
    """In the dtype that is asked for: those of a whole model are held beside it."""
    path = max(compensated(form).weights, key=lambda path: path.stat().st_size)

    def held() -> dict[int, int]:
        gc.collect()
        found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in found if not tensor.is_meta]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    before = held()
    linears = node_linears(path, torch.device("cpu"), torch.bfloat16)
    taken = sum(size for place, size in held().items() if place not in before)
    weights = sum(linear.weight.numel() for linear in linears.values())
    rest = sum(t.nbytes for linear in linears.values() for t in linear.state_dict().values()) - 2 * weights
    assert 2 * weights <= taken <= 2 * weights + rest + 4096 and rest < weights, taken / weights
