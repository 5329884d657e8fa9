# SPDX-License-Identifier: Apache-2.0
"""What is foreseen of a compilation, beside what one has left on the disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel

from lynx_compile import cli
from lynx_compile.errors import DiskFullError, InputError, OutOfMemoryError
from lynx_compile.files.outputs import Outputs
from lynx_compile.models.checkpoint import open_checkpoint
from lynx_compile.models.dit import find_groups
from lynx_compile.passes import forecast as forecasts
from lynx_compile.passes.durations import Calls
from lynx_compile.passes.forecast import forecast
from lynx_compile.passes.select import candidates
from lynx_compile.passes.target import Target, target_of
from lynx_compile.recipe import Budget, Recipe, load_recipe
from lynx_compile.tools import flagship
from lynx_compile.tools.full_size import find
from tests.conftest import FLUX_DEV, open_dit


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    return load_recipe(tiny / "tiny.yaml")


@pytest.mark.slow
def test_the_disk_is_what_a_compilation_leaves(recipe: Recipe, compiled_tiny: Path) -> None:
    dit, _ = open_dit(recipe)
    target = target_of(recipe.engine)
    linears = candidates(dit.groups, recipe.sparsity, target.gpus, by_speed=recipe.budget is None)
    outputs = Outputs.of(compiled_tiny.parent / "other.engine")
    found = forecast(recipe, dit.checkpoint, target, outputs, linears)
    cache = compiled_tiny.with_suffix(".cache")
    left = {
        "calibrate": _size(cache / "statistics"),
        "compensate": _size(cache / "weights"),
        "rewrite": _size(compiled_tiny.with_suffix(".safetensors")),
    }
    for need in found.needs:
        if need.stage in left:
            assert need.disk == pytest.approx(left[need.stage], rel=0.3)
    most = forecast(recipe, dit.checkpoint, target, outputs)
    assert most.changed > found.changed and most.disk > found.disk
    again = forecast(recipe, dit.checkpoint, target, Outputs.of(compiled_tiny), linears)
    assert all(need.is_done for need in again.needs) and again.disk < 0.2 * found.disk
    text = "\n".join(again.describe())
    assert (
        text.count("an earlier run has done it") == len(again.needs)
        and "that an earlier run has left" in text
    )


def test_what_this_machine_has_not_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    dit, _ = open_dit(recipe)
    found = forecast(recipe, dit.checkpoint, target_of(recipe.engine), Outputs.of(tmp_path / "x.engine"))
    found.require(tmp_path)
    with pytest.raises(DiskFullError, match="of disk, and 0.0 GiB are free"):
        replace(found, free_disk=1000).require(tmp_path)
    left = tuple(replace(need, there=need.disk) for need in found.needs)
    replace(found, needs=left, free_disk=0).require(tmp_path)  # an earlier run's
    with pytest.raises(OutOfMemoryError, match="Stage '.*' takes about .* GiB of memory"):
        replace(found, free_host=1000).require(tmp_path)
    assert [need.stage for need in found.needs] == ["calibrate", "compensate", "export", "rewrite", "build"]


def test_moments_that_are_not_kept_take_no_disk_and_a_block_of_memory(recipe: Recipe, tmp_path: Path) -> None:
    dit, recording = open_dit(recipe)
    target, outputs = target_of(recipe.engine), Outputs.of(tmp_path / "x.engine")
    linears = candidates(dit.groups, recipe.sparsity, target.gpus, by_speed=True)
    calls = Calls.of(recording, dit.calls, dit.groups)
    kept = forecast(recipe, dit.checkpoint, target, outputs, linears, calls)
    less = recipe.calibration.model_copy(update={"memory_gib": 1e-4})
    recipe = recipe.model_copy(update={"calibration": less, "budget": Budget()})
    fixed = forecast(recipe, dit.checkpoint, target, outputs, linears, calls)
    assert [need.stage for need in fixed.needs] == ["compensate", "export", "rewrite", "build"]
    linears = candidates(dit.groups, recipe.sparsity, target.gpus, by_speed=False)
    unkept = forecast(recipe, dit.checkpoint, target, outputs, linears, calls)
    assert linears.open and [need.stage for need in unkept.needs] == [
        "compensate", "sensitivity", "verify", "export", "rewrite", "build",
    ]  # fmt: skip
    assert kept.needs[0].disk > 0 and unkept.disk == kept.disk - kept.needs[0].disk
    assert all(need.seconds for need in unkept.needs[:-1]) and unkept.needs[-1].seconds is None
    assert unkept.describe()[-1].endswith(" in all, and what build takes")
    twice = replace(calls, fitted=2 * calls.fitted)
    longer = forecast(recipe, dit.checkpoint, target, outputs, linears, twice).needs[0]
    assert longer.seconds is not None and unkept.needs[0].seconds is not None
    assert unkept.needs[0].seconds < longer.seconds < 2 * unkept.needs[0].seconds  # the solves are the same


def test_tuning_takes_its_minutes_and_the_runs_to_its_blocks(recipe: Recipe, tmp_path: Path) -> None:
    dit, recording = open_dit(recipe)
    target, outputs = target_of(recipe.engine), Outputs.of(tmp_path / "x.engine")
    linears = candidates(dit.groups, recipe.sparsity, target.gpus, by_speed=True)
    calls = Calls.of(recording, dit.calls, dit.groups)
    tuned = recipe.compensation.model_copy(update={"tune": "blockwise", "minutes": 1.0})

    def seconds(calls: Calls, memory_gib: float) -> float:
        moments = recipe.calibration.model_copy(update={"memory_gib": memory_gib})
        own = recipe.model_copy(update={"calibration": moments, "compensation": tuned})
        needs = forecast(own, dit.checkpoint, target, outputs, linears, calls).needs
        return next(need.seconds or 0.0 for need in needs if need.stage == "tune")

    twice = replace(calls, fitted=2 * calls.fitted)
    assert 60 < seconds(calls, 8.0) < seconds(twice, 8.0)
    assert seconds(calls, 8.0) < seconds(calls, 1e-4)  # whose moments are measured again


@pytest.mark.parametrize(("tune", "precision", "of_a_weight"), [
    ("blockwise", "bf16", 4), ("blockwise", "fp8", 1), ("end_to_end", "bf16", 4 + 40)
])  # fmt: skip
def test_tuning_keeps_its_blocks_on_disk_and_what_it_could_go_on_with(
    recipe: Recipe, tmp_path: Path, tune: str, precision: str, of_a_weight: int
) -> None:
    """Float32 or e4m3 of a block that is done; weights, mean, best and Adam's two moments, twice, end to end."""
    dit, _ = open_dit(recipe)
    own = recipe.model_copy(
        update={
            "compensation": recipe.compensation.model_copy(update={"tune": tune}),
            "sparsity": recipe.sparsity.model_copy(update={"operand": "weight", "precision": precision}),
        }
    )
    found = forecast(own, dit.checkpoint, target_of(own.engine), Outputs.of(tmp_path / "x.engine"))
    needs = {need.stage: need for need in found.needs}
    assert needs["tune"].disk == needs["compensate"].disk + of_a_weight * found.changed


def test_check_says_it_before_and_after_the_calls_are_recorded(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tiny.engine"
    cli.app(["check", str(tiny / "tiny.yaml"), "-o", str(output)], standalone_mode=False)
    assert "No call is recorded yet" in capsys.readouterr().out
    recipe = load_recipe(tiny / "tiny.yaml")
    _, recording = open_dit(recipe)
    shutil.copytree(recording.folder, output.with_suffix(".cache") / "recording")
    cli.app(["check", str(tiny / "tiny.yaml"), "-o", str(output)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "No call" not in shown and "of disk in all" in shown and "about 1 s" in shown
    assert all(f"\n{stage} " in shown for stage in ("calibrate", "compensate", "export", "rewrite", "build"))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.cache"]  # nothing else is written
    monkeypatch.setattr("lynx_compile.passes.forecast.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFullError):
        cli.app(["check", str(tiny / "tiny.yaml"), "-o", str(output)], standalone_mode=False)
    assert "\nbuild " in capsys.readouterr().out, "what it takes is said before"


@pytest.mark.parametrize(
    "setting", ["calibration.prompts=none.txt", "sparsity.costs=none.json", "engine.plugin=none.so"]
)
@pytest.mark.parametrize("command", ["check", "compile"])
def test_a_file_that_is_missing_is_said_before_the_model_is_opened(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, setting: str
) -> None:
    for module in ("lynx_compile.pipeline", "lynx_compile.tools.check"):
        monkeypatch.setattr(f"{module}.open_model", lambda *_: pytest.fail("the model was opened"))
    given = [str(tiny / "tiny.yaml"), "-o", str(tmp_path / "tiny.engine"), "--set", setting]
    with pytest.raises(InputError, match=r"none\.\w+ (does not exist|cannot be read)"):
        cli.app([command, *given], standalone_mode=False)


def _save_with_a_hole(module: torch.nn.Module, folder: Path) -> None:
    """A checkpoint of bf16 weights that are nowhere on the disk."""
    module.save_config(folder)
    header, end = {}, 0
    for name, tensor in module.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "on_gpu", lambda: True)
    monkeypatch.setattr(forecasts, "has_room", lambda *_: True)
    monkeypatch.setattr(forecasts, "free_memory", lambda _: 80 * 10**9)


TUNED_ON_GPU = {
    "sparsity": {"precision": "fp8", "operand": "weight"},
    "compensation": {"tune": "blockwise", "minutes": 2},
    "engine": {"backend": "torch"},
}
PRUNED_ON_CPU = {
    "sparsity": {"method": "magnitude", "operand": "weight"},
    "engine": {"backend": "tensorrt_rtx", "weights": "external"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sections", "seen"),
    [
        (
            "flux1_dev",
            TUNED_ON_GPU,
            {"compensate": (2.72, 30.6), "tune": (2.92, 40.7), "export": (1.62, 0), "rewrite": (1.71, 0)},
        ),
        (
            "flux1_dev",
            PRUNED_ON_CPU,
            {"compensate": (1.20, 0), "export": (0.61, 0), "rewrite": (1.66, 0), "build": (2.27, 0)},
        ),
        (
            "qwen_image",
            PRUNED_ON_CPU,
            {"compensate": (0.87, 0), "export": (0.79, 0), "rewrite": (1.40, 0), "build": (3.74, 0)},
        ),
    ],
)
def test_what_full_sizes_were_seen_to_take_is_foreseen(
    name: str,
    sections: dict[str, Any],
    seen: dict[str, tuple[float, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GiB of the host and of the GPU, as docs/benchmarks.md has them."""
    model = find(name)
    with torch.device("meta"):
        _save_with_a_hole(getattr(diffusers, model.class_name)(**model.config), tmp_path / "model")
    recording = flagship.write_recording(model, tmp_path / "recording", 1)
    recipe = load_recipe(flagship.write_recipe(tmp_path, sections))
    on_gpu = sections is TUNED_ON_GPU
    target = Target(recipe.engine.backend, "2", ("sm90" if on_gpu else "sm80",), 90 if on_gpu else 80, None)
    (way,) = recording.ways()
    checkpoint = open_checkpoint(tmp_path / "model", None)
    groups = find_groups(checkpoint, recording, way, torch.bfloat16)
    found = candidates(groups, recipe.sparsity, target.gpus, by_speed=False)
    calls = replace(Calls.of(recording, way, groups), fitted=28, held_out=4)  # of the run on a GPU
    if on_gpu:
        _pretend_a_gpu(monkeypatch)
    outputs = Outputs.of(tmp_path / "x.engine")
    needs = {need.stage: need for need in forecast(recipe, checkpoint, target, outputs, found, calls).needs}
    for stage, (host, gpu) in seen.items():
        assert needs[stage].host / 2**30 == pytest.approx(host, rel=0.2), stage
        assert not gpu or needs[stage].gpu / 2**30 == pytest.approx(gpu, rel=0.2), stage


def test_what_flux_takes_is_what_its_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1-dev's recipe for torch on an H100, before calls are recorded: from the headers of a file with a hole."""
    root = Path(__file__).parents[2]
    with torch.device("meta"):
        module = FluxTransformer2DModel(**FLUX_DEV)
    _save_with_a_hole(module, tmp_path / "transformer")
    _pretend_a_gpu(monkeypatch)
    recipe = load_recipe(root / "engines" / "flux.yaml")
    target = Target("torch", "2", ("sm90",), 90, None)
    outputs = Outputs.of(tmp_path / "flux.engine")
    found = forecast(recipe, open_checkpoint(tmp_path, "transformer"), target, outputs)
    page = (root / "docs" / "flux1-dev.md").read_text()
    gpu, disk = max(need.gpu for need in found.needs) / 2**30, found.disk / 2**30
    assert f"| {gpu:.0f} GiB: 22 of the model" in page
    assert f"| {round(disk, -1):.0f} GiB beside the download" in page
    readme = (root / "README.md").read_text()
    assert (
        f"{gpu:.0f} GiB while calibrating" in readme and f"up to {round(disk, -1):.0f} GiB of cache" in readme
    )
