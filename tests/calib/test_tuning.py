# SPDX-License-Identifier: Apache-2.0
"""The script that measures tuning, on the tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calib.digits_flux import tuning


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_both_errors_are_printed(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    operand: str,
) -> None:
    monkeypatch.setattr(tuning, "RECIPE", tiny / "tiny.yaml")
    monkeypatch.setattr(tuning, "SAMPLES", 2)
    tuning.main(operand, steps=2, folder=tmp_path)
    found = re.findall(rf"{operand}, (solved|tuned): output error (\d\.\d{{4}})\n", capsys.readouterr().out)
    assert [name for name, _ in found] == ["solved", "tuned"]
    assert all(0 < float(error) < 0.1 for _, error in found)
