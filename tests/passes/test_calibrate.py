# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.models import prompts
from lynx_compile.models.blocks import block_paths
from lynx_compile.models.dit import DiT
from lynx_compile.models.opened import open_model
from lynx_compile.models.streamed import has_room
from lynx_compile.models.structure import find_structure
from lynx_compile.ops.fp8 import round_rows
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.passes import record as passes_record
from lynx_compile.passes.calibrate import Measurement, Statistics, _measured, calibrate, measurements
from lynx_compile.passes.select import select
from lynx_compile.recipe import Recipe, Sparsity, load_recipe
from lynx_compile.solve.moments import PrunedStatistics
from tests.conftest import open_dit
from tests.passes.exact import SIZE, Layers, exact_plan


def _calibrate(recipe: Recipe, folder: Path, dit: DiT | None = None, **changes: object) -> Statistics:
    calibration = recipe.calibration.model_copy(update=changes)
    recipe = recipe.model_copy(update={"calibration": calibration})
    opened, recording = open_dit(recipe)
    dit = dit or opened
    return calibrate(dit, select(dit.groups, recipe.sparsity), recording, recipe, folder, lambda *_: None)


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    """With both operands where one tensor has several readers: the moments of pruned activations count too."""
    sparsity = Sparsity(operand={"*.to_q": "weight", "*": "activation"})
    return load_recipe(tiny / "tiny.yaml").model_copy(update={"sparsity": sparsity})


def test_moments_are_those_of_the_linears_input_over_the_whole_loop(recipe: Recipe, tmp_path: Path) -> None:
    dit, _ = open_dit(recipe)
    seen: list[torch.Tensor] = []
    linear = dit.module.get_submodule("transformer_blocks.0.ff.net.2")
    handle = linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, -2)))
    statistics = _calibrate(recipe, tmp_path, dit)
    handle.remove()
    x = torch.cat(seen).double()
    assert len(x) == 6 * 4 * 64  # samples x steps x image tokens
    pruned = x * keep_mask(x.float())
    moments = statistics.load("transformer_blocks.0.ff.net.2")
    assert isinstance(moments, PrunedStatistics)
    assert moments.tokens == len(x)
    cov = torch.cov(torch.cat((x, pruned), 1).T, correction=0)
    channels = x.shape[1]
    xx, xs, ss = cov[:channels, :channels], cov[:channels, channels:], cov[channels:, channels:]
    for got, want in ((moments.xx, xx), (moments.xs, xs), (moments.ss, ss)):
        assert (got.double() - want).norm() < 1e-4 * want.norm()
    assert torch.allclose(moments.x_mean.double(), x.mean(0), atol=1e-5)


def test_only_what_the_plan_needs_is_gathered(recipe: Recipe, tmp_path: Path) -> None:
    """Where every reader of a tensor has pruned weights, the moments of pruned activations are not."""
    sparsity = Sparsity(operand={"*.ff.net.2": "activation", "*.to_q": "activation", "*": "weight"})
    recipe = recipe.model_copy(update={"sparsity": sparsity})
    dit, _ = open_dit(recipe)
    plan = select(dit.groups, sparsity)
    statistics = _calibrate(recipe, tmp_path, dit)
    pruned = {name for name in statistics.groups if isinstance(statistics.load(name), PrunedStatistics)}
    assert pruned == {
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp",
    }  # fmt: skip
    assert len(statistics.groups) == len({group.name for group in plan.groups}) > len(pruned)
    sizes = {one.name: one.bytes for one in measurements(plan)}
    assert sizes["transformer_blocks.0.ff.net.2"] == 3 * sizes["transformer_blocks.0.ff_context.net.2"]
    for name in statistics.groups:  # what one tensor takes on disk, but for the means and the header
        size = (tmp_path / f"{name}.safetensors").stat().st_size
        assert sizes[name] < size < sizes[name] * 1.1 + 1000


def test_what_rounding_makes_wrong_in_x_is_measured_where_fp8_reads_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    sparsity = Sparsity(
        precision="fp8", operand={"*.ff.net.2": "activation", "*": "weight"}, exclude=("*_context.*",)
    )
    recipe = recipe.model_copy(update={"sparsity": sparsity})
    dit, _ = open_dit(recipe)
    seen: list[torch.Tensor] = []
    linear = dit.module.get_submodule("transformer_blocks.0.ff.net.2")
    handle = linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, -2)))
    statistics = _calibrate(recipe, tmp_path, dit)
    handle.remove()
    x = torch.cat(seen).float()
    wrong = round_rows(x).dequantized() - x
    pruned = statistics.load("transformer_blocks.0.ff.net.2")
    assert (
        isinstance(pruned, PrunedStatistics)
        and pruned.x_rounding is not None
        and pruned.s_rounding is not None
    )
    torch.testing.assert_close(pruned.x_rounding, wrong.square().mean(0))
    torch.testing.assert_close(pruned.s_rounding, (wrong * keep_mask(x)).square().mean(0))
    weights = statistics.load("transformer_blocks.0.attn.to_q")
    assert not isinstance(weights, PrunedStatistics) and weights.x_rounding is not None
    assert (
        1e-5 < float(weights.x_rounding.sum() / weights.xx.trace()) < 1e-3
    )  # e4m3 has 3 bits behind the point
    assert not any(one.rounded for one in measurements(select(dit.groups, Sparsity())))


def test_same_seed_same_bytes_and_another_seed_others(recipe: Recipe, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        _calibrate(recipe, folder, seed=seed)
    first, second, third = (sorted(folder.iterdir()) for folder in folders)
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]
    other = {c.name: c.read_bytes() for c in third}
    assert other["single_transformer_blocks.0.proj_out.safetensors"] != first[0].read_bytes()
    assert (
        sum(a.read_bytes() != other[a.name] for a in first) >= len(first) - 1
    )  # block 0's text sees no noise


def test_several_passes_give_what_one_gives(recipe: Recipe, tmp_path: Path) -> None:
    one = _calibrate(recipe, tmp_path / "one")
    many = _calibrate(recipe, tmp_path / "many", memory_gib=0.0003)
    for group in one.groups:
        assert torch.equal(one.load(group).xx, many.load(group).xx)


def test_block_by_block_from_disk_gives_what_one_pass_gives(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With no more than one block's weights in memory; and a run that was stopped is gone on with."""
    one = _calibrate(recipe, tmp_path / "one")
    dit, recording = open_dit(recipe)
    monkeypatch.setattr("lynx_compile.models.streamed.free_memory", lambda device: dit.checkpoint.bytes // 2)
    assert has_room(dit.checkpoint, torch.float32, "cpu")  # mapped as it is
    assert not has_room(dit.checkpoint, torch.bfloat16, "cpu")
    monkeypatch.setattr("lynx_compile.models.dit.has_room", lambda *_: False)
    assert dit.is_streamed
    plan, blocks, held = select(dit.groups, recipe.sparsity), block_paths(dit.module), []
    for path in blocks:
        block = dit.module.get_submodule(path)
        assert all(parameter.is_meta for parameter in block.parameters())

        def note(*_: object) -> None:
            held.append([p for p in blocks if not next(dit.module.get_submodule(p).parameters()).is_meta])

        next(iter(block.children())).register_forward_hook(note)

    def run(key: str, progress: Progress = no_progress) -> Statistics:
        return calibrate(dit, plan, recording, recipe, tmp_path / "many", progress, key)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "many").glob("*.safetensors")}

    def stop(what: str, done: int, total: int) -> None:
        if "single" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("a", stop)
    first = times()
    many = run("a")
    assert {tuple(paths) for paths in held} == {(path,) for path in blocks}
    for group in one.groups:
        assert torch.equal(one.load(group).xx, many.load(group).xx)
    assert 0 < len(first) < len(times()) == len(one.groups) and first.items() <= times().items()
    whole = times()
    run("a")  # what is done is asked for again where it is damaged
    assert not whole.items() & times().items()
    few = recipe.calibration.model_copy(update={"memory_gib": 1e-6})
    recipe = recipe.model_copy(update={"calibration": few})
    with caplog.at_level(logging.INFO):
        assert (
            run("b").load("single_transformer_blocks.0.proj_out").tokens == 2 * 68
        )  # image and text tokens of a call of two samples
    assert "measuring on 1 of 12 calls" in caplog.text
    dit.release()
    assert "_streamed" not in vars(dit)


def test_no_pipeline_is_in_memory_when_the_model_asks_for_room(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers' pipelines are in cycles: one with text encoders, on a GPU, would have had the model streamed."""
    opened, rows = (
        open_model(recipe, tmp_path / "converted"),
        prompts.read(Path(recipe.calibration.prompts or "")),
    )
    made: list[weakref.ref[torch.nn.Module]] = []
    open_pipeline = passes_record.open_pipeline

    def noted(*given: Any) -> Any:
        pipe = open_pipeline(*given)
        made.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr(passes_record, "open_pipeline", noted)
    passes_record.record(recipe, opened, rows, tmp_path / "recording", no_progress)
    assert [module() for module in made] == [None]


def test_tokens_per_call_limits_the_tokens(recipe: Recipe, tmp_path: Path) -> None:
    statistics = _calibrate(recipe, tmp_path, tokens_per_call=5)
    assert statistics.load("transformer_blocks.0.attn.to_q").tokens == 6 * 4 * 5
    assert statistics.load("transformer_blocks.0.attn.add_q_proj").tokens == 6 * 4 * 4  # 4 text tokens


def test_too_few_tokens_are_one_warning_with_the_number_needed(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _calibrate(recipe, tmp_path)
    assert caplog.text.count("on too few tokens") == 1
    assert "on 96, its 256 channels need at least 2560" in caplog.text and "26.7-fold" in caplog.text


def test_hooks_are_gone_even_after_an_error(recipe: Recipe, tmp_path: Path) -> None:
    dit, _ = open_dit(recipe)
    dit.module.get_submodule("transformer_blocks.0.ff.net.0.proj").weight[0, 0] = torch.nan
    with pytest.raises(StageError, match="'transformer_blocks.0.ff.net.2' is not finite.*bf16"):
        _calibrate(recipe, tmp_path, dit)
    assert not any(module._forward_pre_hooks for module in dit.module.modules())


def test_calls_and_convolutions_of_one_linear_add_up(recipe: Recipe) -> None:
    """A linear that image and text share is measured on both; of a convolution the pixels are the tokens."""
    torch.manual_seed(0)
    module = Layers().eval().requires_grad_(False)
    inputs = {"step": torch.ones(1), "image": torch.randn(2, 8, SIZE), "text": torch.randn(2, 3, SIZE)}
    wanted = measurements(exact_plan(find_structure(module, inputs).groups))
    read: dict[str, list[torch.Tensor]] = defaultdict(list)
    for path in ("blocks.0.up", "blocks.1.wide"):
        module.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: read[path].append(x[0]))
    with _measured(module, wanted, recipe, torch.Generator()) as moments, torch.inference_mode():
        module(**inputs)
        module(**inputs | {"image": torch.randn(2, 8, SIZE), "text": torch.randn(2, 0, SIZE)})
    image, text, image_again, nothing = read["blocks.0.up"]
    assert nothing.numel() == 0
    tokens = torch.cat([x.flatten(0, -2) for x in (image, text, image_again)])
    pixels = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in read["blocks.1.wide"]])
    for name, x in (("blocks.0.up", tokens), ("blocks.1.wide", pixels)):
        found = moments[name].finish()
        assert found.tokens == len(x)
        torch.testing.assert_close(found.xx, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)


def test_one_sample_without_a_batch_is_limited_as_one(recipe: Recipe) -> None:
    calibration = recipe.calibration.model_copy(update={"tokens_per_call": 5})
    recipe = recipe.model_copy(update={"calibration": calibration})
    module = Layers().eval().requires_grad_(False)
    one = Measurement("up", "blocks.0.up", SIZE, pruned=False)
    with _measured(module, (one,), recipe, torch.Generator()) as moments, torch.inference_mode():
        module.get_submodule("blocks.0.up")(torch.randn(40, SIZE))
    assert moments["up"].tokens == 5
