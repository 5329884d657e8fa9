# SPDX-License-Identifier: Apache-2.0
"""``compare`` through torch: the module, dense and with compiled linears in it, against ONNX Runtime's figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lynx_compile import cli, pipeline
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError
from lynx_compile.recipe import load_recipe
from lynx_compile.tools import compare
from lynx_compile.tools.comparison import Comparison
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.modules import SparseWeightLinear


@pytest.fixture(scope="module")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with ``backend: torch``."""
    output = tmp_path_factory.mktemp("torch") / "tiny.engine"
    recipe = load_recipe(tiny / "tiny.yaml")
    parts: dict[str, Any] = {
        "engine": recipe.engine.model_copy(update={"backend": "torch", "weights": "external"}),
        "compare": recipe.compare.model_copy(update={"samples": 2, "states": 2}),
    }
    pipeline.compile(recipe.model_copy(update=parts), output)
    return output


@pytest.fixture(scope="module")
def through_torch(engine: Path) -> Comparison:
    return compare.compare(engine)


def test_its_figures_are_those_of_onnx_runtime(engine: Path, through_torch: Comparison) -> None:
    # Chosen without being asked for.
    assert through_torch.not_measured["engines"] == "torch ran the models; --with onnx times them"
    assert Comparison.read(engine.with_suffix(".compare.json")) == through_torch
    onnx = compare.compare(engine, through="onnx")
    assert "torch" not in onnx.not_measured["engines"]
    assert [step.step for step in through_torch.output] == [0, 1, 2, 3]
    for found, wanted in zip(through_torch.output, onnx.output, strict=True):
        assert found.timestep == pytest.approx(wanted.timestep, abs=1e-3)
        assert found.error == pytest.approx(wanted.error, rel=0.15)
    by_linear = {x.linear: x for x in onnx.linears}
    assert len(through_torch.linears) == len(by_linear) == 17
    for x in through_torch.linears:
        assert x.error == pytest.approx(by_linear[x.linear].error, rel=0.1), x.linear
        assert x.expected == by_linear[x.linear].expected
    assert through_torch.images is not None and onnx.images is not None
    assert through_torch.images.psnr == pytest.approx(onnx.images.psnr, abs=3)


def test_a_wrong_op_shows_in_every_figure(
    engine: Path, through_torch: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = SparseWeightLinear.rows
    monkeypatch.setattr(SparseWeightLinear, "rows", lambda self, x: rows(self, x) * 1.5)
    wrong = compare.compare(engine, through="torch")
    assert wrong.output[0].error > 1.5 * through_torch.output[0].error
    assert min(x.error for x in wrong.linears) > 0.3
    assert wrong.images is not None and through_torch.images is not None
    assert wrong.images.mean_psnr < through_torch.images.mean_psnr


def test_what_runs_the_models(engine: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, manifest = load_recipe(tiny / "tiny.yaml"), Manifest.read(engine.with_suffix(".json"))
    backend = manifest.backend.model_copy(update={"name": "tensorrt"})
    built = manifest.model_copy(update={"backend": backend})
    calibration = recipe.calibration.model_copy(update={"prompts": None, "recording": "recorded"})
    recorded = recipe.model_copy(update={"calibration": calibration})
    assert compare._takes_torch("auto", manifest, recipe)
    assert not compare._takes_torch("onnx", manifest, recipe)
    assert not compare._takes_torch("auto", manifest, recorded)
    with pytest.raises(InputError, match="no diffusers pipeline"):
        compare._takes_torch("torch", manifest, recorded)
    for runs in (False, True):
        monkeypatch.setattr(compare, "kernels_run", lambda dtype, runs=runs: runs)
        assert compare._takes_torch("auto", built, recipe) is runs
    if not torch.cuda.is_available():
        assert not operators.kernels_run(torch.bfloat16)


def test_the_command_takes_it_and_tells_programs_what_is_over(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = []

    def record(*_: Any, through: str, **__: Any) -> SimpleNamespace:
        taken.append(through)
        return SimpleNamespace(missed=(), over_budget="It errs.")

    monkeypatch.setattr(compare, "compare", record)
    monkeypatch.setattr("lynx_compile.cli.compare._show_comparison", lambda found: None)
    monkeypatch.setattr(
        "sys.argv", ["lynx-compile", "compare", str(engine), "--with", "onnx", "--progress", "json"]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and taken == ["onnx"]
    assert {"event": "over_budget", "message": "It errs."} in map(
        json.loads, capsys.readouterr().err.splitlines()
    )
