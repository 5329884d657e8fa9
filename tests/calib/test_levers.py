# SPDX-License-Identifier: Apache-2.0
"""The scripts that measure levers and steps, on the tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from calib import levers, step_weights
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.solve.tune import Rows

pytestmark = pytest.mark.slow


def test_every_lever_and_step_is_measured(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(levers, "RIDGES", (1e-3,))
    monkeypatch.setattr(levers, "RANKS", (16,))
    monkeypatch.setattr(levers, "CURVES", {"alike": lambda at: 1.0})
    levers.main(tiny / "tiny.yaml", tmp_path, steps=4)
    found = re.findall(
        r"(.+): (?:solved 0\.\d{4}(?:, )?)?(?:tuned 0\.\d{4}, \d+\.\d\d dB)?\n", capsys.readouterr().out
    )
    assert found == ["ridge 0.001", "as it is", "low rank K/16", "masks chosen anew", "steps weighed alike"]
    step_weights.main(tiny / "tiny.yaml", tmp_path, prompts=1)
    lines = capsys.readouterr().out.splitlines()[1:]
    numbers = [[float(value) for value in line.split()] for line in lines]
    assert [row[0] for row in numbers] == [0, 1, 2, 3], "the recipe's steps"
    assert all(value > 0 for row in numbers for value in row[1:])
    assert sum(row[-1] for row in numbers) == pytest.approx(4, abs=0.05)


def test_a_mask_is_chosen_anew_where_a_pruned_weight_has_grown() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 8)
    linear = levers.Reselecting(Rows(weight * keep_mask(weight), torch.zeros(4), "weight"))
    assert linear.choose() == 0
    x = torch.randn(3, 8)
    kept = linear(x)
    place = int((~keep_mask(weight)[0]).nonzero()[0])
    with torch.no_grad():
        linear.weight[0, place] = 100
    assert torch.equal(linear(x), kept), "pruned ones are not seen"
    linear(x).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad[0, place] != 0
    assert linear.choose() == 1 and not torch.equal(linear(x), kept)
