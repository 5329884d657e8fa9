# SPDX-License-Identifier: Apache-2.0
"""The errors beside the speeds in ``summary.json``: of every form, in an order that holds, and they come out again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from calib.digits_flux import forms, study


@pytest.fixture(scope="module")
def summary() -> dict[str, float]:
    found: dict[str, float] = json.loads(forms.SUMMARY.read_text())
    return found


def test_fp8_adds_to_2_of_4_like_an_independent_error(summary: dict[str, float]) -> None:
    for kind in ("layer", "output"):
        error = {form: summary[f"errors.{form}.{kind}"] for form in forms.FORMS}
        for operand in ("weight", "activation"):
            both = math.hypot(error[f"bf16_{operand}"], error["fp8_dense"])
            assert error[f"fp8_{operand}"] == pytest.approx(both, rel=0.1)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_committed_errors_come_out_again(summary: dict[str, float], tmp_path: Path) -> None:
    """Dense FP8, on fewer samples and steps."""
    found = forms.measure(study.set_up(tmp_path), ["fp8_dense"], 10, 8)
    assert found["errors.fp8_dense.layer"] == pytest.approx(summary["errors.fp8_dense.layer"], rel=0.02)
    assert found["errors.fp8_dense.output"] == pytest.approx(summary["errors.fp8_dense.output"], rel=0.3)
