# SPDX-License-Identifier: Apache-2.0
"""The claims of docs/evidence.md: its table is the study's, and they hold when a part of the study is run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calib.digits_flux import study

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
PAPER = "+ norm scale + low rank (the paper)"
JOINT = "activations 2:4, joint refit + low rank"


@pytest.fixture(scope="module")
def facts() -> dict:  # type: ignore[type-arg]
    """What the committed study measured."""
    return json.loads((study.FOLDER / "study.json").read_text())


def test_the_page_shows_the_committed_study(facts: dict) -> None:  # type: ignore[type-arg]
    assert study.table(facts) in PAGE.read_text()
    assert [row["method"] for row in facts["rows"]] == list(study.ROWS)
    assert (facts["samples"], facts["steps"]) == (500, 20)
    for row in facts["rows"]:
        assert (study.FOLDER / row["sheet"]).is_file() and f"study/{row['sheet']}" in PAGE.read_text()


def test_joint_keeps_the_accuracy_and_halves_the_papers_error(facts: dict) -> None:  # type: ignore[type-arg]
    rows = {row["method"]: row for row in facts["rows"]}
    assert rows[JOINT]["accuracy"] >= rows["dense"]["accuracy"] - 0.01
    assert rows[JOINT]["output_error"] <= rows[PAPER]["output_error"] / 2


@pytest.mark.slow
@pytest.mark.nightly
def test_the_committed_figures_come_out_again(facts: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """Dense, the paper's and the joint form on fewer samples and steps, end to end."""
    samples, steps = 100, 8
    setup = study.set_up(tmp_path)
    rows = {
        r.method: r for r in study.measure(setup, ["dense", PAPER, JOINT], samples, steps, tmp_path / "study")
    }
    assert rows[JOINT].accuracy >= rows["dense"].accuracy - 0.01
    assert rows[JOINT].output_error <= rows[PAPER].output_error / 2
    committed = {row["method"]: row for row in facts["rows"]}
    for method in (PAPER, JOINT):
        assert rows[method].layer_error == pytest.approx(committed[method]["layer_error"], rel=0.02)
        assert rows[method].output_error == pytest.approx(committed[method]["output_error"], rel=0.5)
