# SPDX-License-Identifier: Apache-2.0
"""The committed studies: pages show them, what docs/evidence.md says of them holds, and a part comes out again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lynx_compile.recipe import load_recipe
from lynx_compile.tools.study import results, run
from lynx_compile.tools.study.methods import METHODS
from lynx_compile.tools.study.results import Study

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "digits_flux": ROOT / "calib" / "digits_flux" / "study",
    "emoji_flux": ROOT / "calib" / "emoji_flux" / "study",
    "emoji_156m": ROOT / "calib" / "emoji_flux" / "study-156m",
    "emoji_156m_longer": ROOT / "calib" / "emoji_flux" / "study-156m-longer",
    "emoji_156m_first": ROOT / "calib" / "emoji_flux" / "study-156m-first",
}
NAMES = list(FOLDERS)
UNREPAIRED = ("magnitude", "wanda", "ria", "bawa", "activation_naive", "activation_norm")


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    found = {name: Study.read(folder / "study.json") for name, folder in FOLDERS.items()}
    return {name: study for name, study in found.items() if study is not None}


@pytest.fixture(scope="module")
def summary() -> dict[str, float | str]:
    found: dict[str, float | str] = json.loads((ROOT / "engines" / "bench" / "summary.json").read_text())
    return found


def of(study: Study, method: str, what: str = "output_error") -> float:
    row = study.row(method)
    assert row is not None
    return row.mean(what) or 0.0


@pytest.mark.parametrize("name", NAMES)
def test_pages_and_summary_show_a_study(
    name: str, studies: dict[str, Study], summary: dict[str, float | str]
) -> None:
    study, folder = studies[name], FOLDERS[name]
    table = results.markdown(study)
    assert study.name == name and (folder / "study.md").read_text() == f"{table}\n"
    page = (folder.parent / "README.md").read_text()
    assert table in page and f"({folder.name}/study.json)" in page and (folder / "study.png").is_file()
    shown = {key: value for key, value in summary.items() if key.startswith(f"quality.{name}.")}
    of_budget = {key for key in shown if ".budget." in key}
    assert {key: value for key, value in shown.items() if key not in of_budget} == results.summary(study)


def test_the_evidence_shows_all_of_them(studies: dict[str, Study]) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    for method, described in METHODS.items():
        cells = []
        for study in studies.values():
            there = study.row(method) is not None
            error, images = (of(study, method, what) if there else 0 for what in ("output_error", "psnr"))
            cells.append(f"{error:.4f}, {images:.1f} dB" if there else "not measured")
        if method != "dense":
            assert f"| {described.title} | {' | '.join(cells)} |" in page, method


def test_the_evidence_shows_what_a_budget_made(summary: dict[str, float | str]) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    for name in ("digits_flux", "emoji_flux", "emoji_156m", "emoji_945m"):
        error, images, speed = (
            summary[f"quality.{name}.budget.{what}"] for what in ("output_error", "psnr", "speed")
        )
        assert f"| {error} | {images:.1f} dB | {speed:.2f}x |" in page
        is_over = name == "emoji_156m"
        assert (float(error) <= 0.015) != is_over, "of which the page says that it is over"
    images, speed = (summary[f"quality.emoji_flux.budget.{what}"] for what in ("psnr", "speed"))
    assert f"({images:.0f} dB; {speed:.2f}x on its small linears" in (ROOT / "README.md").read_text()
    inside = (ROOT / "docs" / "how-it-works.md").read_text()
    assert f"[{images:.0f} and {summary['quality.digits_flux.budget.psnr']:.0f} dB]" in inside


@pytest.mark.parametrize("name", NAMES)
def test_repaired_alike_weights_err_less_and_both_less_than_the_paper(
    name: str, studies: dict[str, Study]
) -> None:
    study = studies[name]
    measured = {row.method for row in study.rows}
    assert of(study, "weight") < of(study, "weight_solved")
    if name not in ("emoji_156m", "emoji_156m_longer"):  # which have none of these
        assert of(study, "weight_solved") < of(study, "activation_solved") < of(study, "paper")
        assert of(study, "weight_solved") < of(study, "sparsegpt")
        assert min(of(study, method) for method in measured.intersection(UNREPAIRED)) > of(study, "paper")
    for better, worse in (
        ("weight", "activation"), ("activation", "activation_solved"), ("activation", "paper_trained"),
        ("paper_trained", "paper"), ("weight_fp8", "weight_fp8_solved"), ("weight", "weight_fp8"),
    ):  # fmt: skip
        if measured.issuperset((better, worse)):
            assert of(study, better) < of(study, worse), (better, worse)


def test_images_of_emoji_flux_speak_for_activations_before_tuning(studies: dict[str, Study]) -> None:
    emoji, digits = studies["emoji_flux"], studies["digits_flux"]
    assert of(emoji, "activation_solved", "psnr") > of(emoji, "weight_solved", "psnr")
    assert of(emoji, "activation", "psnr") < of(emoji, "weight", "psnr")
    for solved in ("", "_solved"):
        assert of(digits, f"activation{solved}", "psnr") < of(digits, f"weight{solved}", "psnr")


def test_slim_errs_more_than_the_paper_on_digits_and_less_on_emoji(studies: dict[str, Study]) -> None:
    digits, emoji = studies["digits_flux"], studies["emoji_flux"]
    assert of(digits, "slim") > of(digits, "paper") > of(digits, "paper_trained")
    assert of(emoji, "slim") < of(emoji, "paper_trained")
    assert of(emoji, "slim", "psnr") < of(emoji, "paper", "psnr")


def test_the_evidence_says_how_many_times_and_how_much(studies: dict[str, Study]) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    times = [
        of(studies[name], "paper") / of(studies[name], "weight_solved")
        for name in ("digits_flux", "emoji_flux", "emoji_156m_first")
    ]
    off = [1 - of(studies[name], "weight") / of(studies[name], "weight_solved") for name in NAMES]
    digits, emoji, larger = (f"{factor:.1f} times" for factor in times)
    assert f"{digits} as much as our solved weights on digits-flux" in page
    assert f"{larger} on the other 156 M" in page and f"{emoji} on emoji-flux" in page
    digits, emoji, larger, longer, other = (f"{100 * share:.0f} %" for share in off)
    assert (
        f"{digits} off the error of 2:4 weights on digits-flux, {emoji} on emoji-flux and {larger} on 156 M "
        f"({longer} where it went on for longer, {other} of the other)"
    ) in page
    wanted = of(studies["emoji_156m_longer"], "weight"), of(studies["emoji_156m"], "weight_fp8")
    assert wanted[0] <= 0.016 and wanted[1] <= 0.020, "which the page says are met"


@pytest.mark.parametrize("name", ["digits_flux", "emoji_flux"])
def test_fp8_adds_to_solved_2_of_4_like_an_independent_error(name: str, studies: dict[str, Study]) -> None:
    for what in ("layer_error", "output_error"):
        fp8 = of(studies[name], "fp8_dense", what)
        for alone, both in (
            ("weight_solved", "weight_fp8_solved"),
            ("activation_refit", "activation_fp8_solved"),
        ):
            expected = math.hypot(of(studies[name], alone, what), fp8)
            assert of(studies[name], both, what) == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_committed_figures_come_out_again(studies: dict[str, Study], tmp_path: Path) -> None:
    """What is solved and not tuned, and dense FP8, calibrated as committed and measured on fewer images."""
    methods = ["dense", "weight_solved", "paper", "activation_solved", "fp8_dense"]
    recipe = run.with_choices(
        load_recipe(ROOT / "engines" / "digits-flux.yaml"), batch=studies["digits_flux"].batch, samples=10
    )
    found = run.study(recipe, "digits_flux", tmp_path, methods=methods)
    for method in methods[1:]:
        committed = studies["digits_flux"]
        assert of(found, method, "layer_error") == pytest.approx(
            of(committed, method, "layer_error"), rel=0.05
        )
        assert of(found, method) == pytest.approx(of(committed, method), rel=0.15)
        assert of(found, method, "psnr") == pytest.approx(of(committed, method, "psnr"), abs=2)
