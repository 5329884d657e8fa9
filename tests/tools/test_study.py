# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile study`` on the tiny model: what it says against the model itself, and what is not done again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from lynx_compile import cli
from lynx_compile.errors import InputError
from lynx_compile.files.progress import no_progress
from lynx_compile.recipe import Recipe, load_recipe
from lynx_compile.tools.images import BEST_PSNR, psnr, ssim
from lynx_compile.tools.study import methods, results, run, show
from lynx_compile.tools.study.measure import hold_out, measure
from lynx_compile.tools.study.methods import METHODS, Workshop, chosen
from lynx_compile.tools.study.results import Row, Run, Study

FEW = ("--samples", "2")


def command(monkeypatch: pytest.MonkeyPatch, recipe: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "study", str(recipe), *FEW, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.fixture(scope="module")
def studied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of two methods and two seeds, by the command."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        choice = ("--methods", "wanda, weight_solved", "--seeds", "2", "--summary", str(folder / "all.json"))
        (folder / "all.json").write_text('{"linears.torch_fp8": 1.9, "quality.tiny.wanda.psnr": 1.0}')
        command(patch, tiny / "tiny.yaml", "--out", str(folder), *choice)
    return folder


def test_a_study_is_written_whole(studied: Path) -> None:
    found = Study.read(studied / "study.json")
    assert found is not None and [row.method for row in found.rows] == ["dense", "wanda", "weight_solved"]
    dense, wanda, ours = found.rows
    assert [one.seed for one in wanda.runs] == [0, 1] and wanda.runs[0] != wanda.runs[1]
    assert dense.mean("output_error") == dense.mean("layer_error") == 0 and dense.mean("psnr") == BEST_PSNR
    for what in ("output_error", "layer_error"):
        assert 0 < (ours.mean(what) or 0) < (wanda.mean(what) or 0) < 1
    assert (wanda.mean("psnr") or 0) < (ours.mean("psnr") or 0) < BEST_PSNR
    assert len(found.timesteps) == len(wanda.by_step()) == 4 and found.linears == 17
    summary = json.loads((studied / "all.json").read_text())
    assert summary["linears.torch_fp8"] == 1.9, "what is not the study's stays"
    assert summary["quality.tiny.wanda.psnr"] == pytest.approx(wanda.mean("psnr"), rel=1e-2)
    assert summary["quality.tiny.weight_solved.output_error_std"] > 0
    assert "quality.tiny.dense.output_error" not in summary and summary["quality.tiny.date"] == found.date
    for name in ("study.png", "sheet.png"):
        with Image.open(studied / name) as picture:
            assert picture.width > 300


def test_what_is_done_is_not_done_again(
    studied: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Study.read(studied / "study.json")
    made: list[methods.Method] = []
    real = Workshop.make
    monkeypatch.setattr(Workshop, "make", lambda self, method: made.append(method) or real(self, method))
    command(monkeypatch, tiny / "tiny.yaml", "--out", str(studied), "--methods", "wanda", "--seeds", "2")
    assert made == [] and Study.read(studied / "study.json") == before
    command(monkeypatch, tiny / "tiny.yaml", "--out", str(studied), "--methods", "wanda,ria")
    assert made == [METHODS["ria"]]
    after = Study.read(studied / "study.json")
    assert after is not None and [row.method for row in after.rows] == [
        "dense",
        "wanda",
        "ria",
        "weight_solved",
    ]
    assert "weights 2:4, RIA" in capsys.readouterr().out


def test_a_study_of_other_choices_loses_none_of_this_one(studied: Path, tiny: Path, tmp_path: Path) -> None:
    """Nor does another name."""
    path = Path(shutil.copy(studied / "study.json", tmp_path))
    before = Study.read(path)
    recipe = run.with_choices(load_recipe(tiny / "tiny.yaml"), samples=2)
    assert before is not None

    def begun(recipe: Recipe, name: str) -> run._Studies:
        return run._Studies(recipe, name, tmp_path, run_metric=False, display=run.silent)

    other = begun(run.with_choices(recipe, samples=3), "tiny")
    assert other._study is None
    before.model_copy(update={"key": other._key, "rows": ()}).write(path)
    assert begun(recipe, "renamed")._study == before.model_copy(update={"name": "renamed"})


def test_pictures_of_another_study_do_not_stay(studied: Path, tmp_path: Path) -> None:
    found = Study.read(studied / "study.json")
    assert found is not None
    for name in ("study.png", "sheet.png"):
        shutil.copy(studied / name, tmp_path)
    show.draw_chart(found.model_copy(update={"rows": found.rows[:1]}), tmp_path / "study.png")
    show.draw_sheet(found, tmp_path / "no images", tmp_path / "sheet.png")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.filterwarnings("error")  # matplotlib warns of a legend of nothing
def test_the_chart_by_step_shows_what_there_is(studied: Path, tmp_path: Path) -> None:
    found = Study.read(studied / "study.json")
    assert found is not None
    show.draw_chart(found.model_copy(update={"rows": found.rows[:2]}), tmp_path / "study.png")
    assert (tmp_path / "study.png").exists()


@pytest.fixture(scope="module")
def workshop(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, run.HeldOut]:
    """What methods are made from and measured on."""
    recipe = run.with_choices(load_recipe(tiny / "tiny.yaml"), samples=2)
    compensation = recipe.compensation.model_copy(update={"steps": 1})
    recipe = recipe.model_copy(update={"compensation": compensation})
    folder = tmp_path_factory.mktemp("workshop")
    studies = run._Studies(recipe, "tiny", folder, run_metric=False, display=run.silent)
    recording = studies._record(recipe, folder / "recording", no_progress)
    calls = run._calls(recording)
    dit = run.find_dit(studies._opened.of(calls.component), recording, calls, torch.float16)
    held_out = hold_out(studies._sampler_of(recipe, dit), calls.component, folder / "held-out", no_progress)
    return Workshop(dit, recording, recipe, folder, "key", no_progress), held_out


def test_errors_are_those_of_the_module_with_these_weights(workshop: tuple[Workshop, run.HeldOut]) -> None:
    """Against weights put into a copy of the module by hand, without any of our linears."""
    made_by, held_out = workshop
    made = made_by.make(METHODS["magnitude"])
    found = measure(held_out, made.rows, torch.float32, 8, None, no_progress)
    module = held_out.module
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    try:
        for path, rows in made.rows.items():
            module.get_submodule(path).weight.data.copy_(rows.weight)
        lost = whole = 0.0
        for state, dense in zip(held_out.states, held_out.outputs, strict=True):
            with torch.no_grad():
                y = module(**state.arguments).sample
            (y_dense,) = dense.values()
            lost += float((y - y_dense).double().square().sum())
            whole += float(y_dense.double().square().sum())
    finally:
        module.load_state_dict(kept)
    assert found.output_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert found.images is not None and held_out.images is not None
    pairs = list(zip(held_out.images, found.images, strict=True))
    assert found.psnr == pytest.approx(np.mean([psnr(*pair) for pair in pairs]))
    assert not any("forward" in vars(module.get_submodule(path)) for path in made.rows), (
        "nothing stays behind"
    )


@pytest.mark.parametrize("name", ["slim", "paper_trained", "weight_fp8_solved", "fp8_dense"])
def test_methods_are_of_their_form(workshop: tuple[Workshop, run.HeldOut], name: str) -> None:
    made_by, held_out = workshop
    made = made_by.make(METHODS[name])
    assert set(made.rows) == set(made_by.linears), "all methods change the same linears"
    for path, rows in made.rows.items():
        dense = made_by.dit.module.get_submodule(path)
        is_sparse = rows.weight.float().ne(0).unflatten(-1, (-1, 4)).sum(-1).le(2).all()
        assert bool(is_sparse) == (rows.operand == "weight") == (name in ("slim", "weight_fp8_solved"))
        assert (rows.weight_scale is not None) == (name in ("weight_fp8_solved", "fp8_dense"))
        assert (rows.lora_down is not None) == (name in ("slim", "paper_trained"))
        if rows.lora_down is not None:
            assert len(rows.lora_down) == 16, "equal rank"
        assert rows.norm_scale == (name == "paper_trained")
        if name == "paper_trained":
            stored = dense.weight.to(made_by.dit.dtype).float()
            assert torch.equal(rows.weight, stored) and torch.equal(rows.bias, dense.bias)
    assert measure(held_out, made.rows, torch.float16, 8, None, no_progress).output_error < 0.5


def test_a_table_says_spread_where_there_is_one() -> None:
    common = {
        "by_step": (0.1,),
        "lpips": None,
        "metric": {"read": 0.5},
        "solved_seconds": 1.0,
        "tuned_seconds": 2.0,
    }
    runs = tuple(
        Run(seed=seed, layer_error=0.2, output_error=0.1 * (1 + seed), psnr=30.0 + seed, ssim=None, **common)  # type: ignore[arg-type]
        for seed in (0, 1)
    )
    several = Row(method="weight", key="", minutes=1.0, runs=runs)
    one = Row(method="wanda", key="", minutes=None, runs=runs[:1])
    assert results.cells(several, ["read"])[1:] == [
        "0.200 ± 0.000", "0.1500 ± 0.0707", "30.5 ± 0.7", "–", "0.5", "3",
    ]  # fmt: skip
    assert results.cells(one, [])[1:] == ["0.200", "0.1000", "30.0", "–", "3"]


def test_an_engine_of_a_budget_joins_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(sha256="a")
    manifest = SimpleNamespace(engine=engine, budget=SimpleNamespace(speed=2.034))
    steps = [SimpleNamespace(error=error) for error in (0.01, 0.02)]
    comparison = SimpleNamespace(engine_sha256="a", output=steps, images=SimpleNamespace(mean_psnr=36.123))
    monkeypatch.setattr(results.Manifest, "read", lambda path: manifest)
    monkeypatch.setattr(results.Comparison, "read", lambda path: comparison)
    assert results.of_budget("tiny", tmp_path / "x.engine") == {
        "quality.tiny.budget.output_error": 0.0158,
        "quality.tiny.budget.psnr": 36.12,
        "quality.tiny.budget.speed": 2.03,
    }
    engine.sha256 = "b"
    with pytest.raises(InputError, match="was not compared"):
        results.of_budget("tiny", tmp_path / "x.engine")
    manifest.budget = None
    with pytest.raises(InputError, match="No budget decided"):
        results.of_budget("tiny", tmp_path / "x.engine")


def test_wrong_choices_are_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no method 'wand' to study"):
        chosen("wand")
    with pytest.raises(InputError, match="--methods names none"):
        chosen(" ,")
    assert chosen(" ria") == ("dense", "ria") and chosen(None) == tuple(METHODS)
    recipe = load_recipe(tiny / "tiny.yaml")
    calibration = recipe.calibration.model_copy(update={"prompts": None, "recording": "somewhere"})
    with pytest.raises(InputError, match="this recipe has a recording instead"):
        run.study(recipe.model_copy(update={"calibration": calibration}), "tiny", tmp_path)
    (tmp_path / "study.json").write_text('{"format_version": 1}')
    with pytest.raises(InputError, match=r"study.json is damaged"):
        Study.read(tmp_path / "study.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "inf"), "--minutes is inf."),
        (("--budget", "x.engine"), "--budget says what goes into --summary"),
        (("--budget", "x.engine", "--summary", "all.json"), "x.json does not exist"),
        (("--summary", "."), "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    arguments: tuple[str, ...],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "study", str(tiny / "tiny.yaml"), *arguments])
    monkeypatch.setattr(run, "study", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_psnr_is_over_the_dense_images_peak_and_ssim_its_definition() -> None:
    generator = np.random.default_rng(0)
    dense = generator.random((3, 20, 24), dtype=np.float32) * 0.8
    other = np.clip(dense + 0.1 * generator.standard_normal(dense.shape), 0, 1).astype(np.float32)
    error = np.square(dense - other).mean()
    assert psnr(dense, other) == pytest.approx(10 * np.log10(dense.max() ** 2 / error), rel=1e-5)
    assert psnr(dense, dense) == BEST_PSNR and ssim(dense, dense) == pytest.approx(1)
    assert ssim(dense[:, :8], other[:, :8]) is None, "smaller than a window"
    # One window of one colour, written out.
    x, y = (torch.from_numpy(image[0, :11, :11]).double() for image in (dense, other))
    at = torch.arange(11) - 5.0
    weight = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2)).double()
    weight /= weight.sum()
    mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
    of_x, of_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
    both = (weight * (x - mean_x) * (y - mean_y)).sum()
    index = (2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)
    index /= (mean_x**2 + mean_y**2 + 1e-4) * (of_x + of_y + 9e-4)
    assert ssim(dense[:1, :11, :11], other[:1, :11, :11]) == pytest.approx(float(index), rel=1e-6)
    assert functional.mse_loss(x, y) > 0
