# SPDX-License-Identifier: Apache-2.0
"""Which stages a changed recipe runs again, up to the build (``test_cli`` has that)."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from lynx_compile import pipeline
from lynx_compile.engine import trt
from lynx_compile.errors import StageError
from lynx_compile.functions import DOMAIN
from lynx_compile.recipe import load_recipe


@pytest.fixture
def project(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny recipe; its build is refused, as by a TensorRT that can not build it."""

    def refuse(*arguments: object, **options: object) -> None:
        raise StageError("build", "there is none here.", "Do without.")

    monkeypatch.setattr(pipeline, "build", refuse)
    return Path(shutil.copytree(tiny, tmp_path, dirs_exist_ok=True))


def _stages_run(project: Path, more: str = "") -> list[str]:
    path = project / "run.yaml"
    path.write_text((project / "tiny.yaml").read_text() + more)
    with pytest.raises(StageError, match="there is none here"):
        pipeline.compile(load_recipe(path), project / "out" / "tiny.engine")
    lines = (project / "out" / "tiny.log").read_text().splitlines()
    return [line.split()[-2].rstrip(":") for line in lines if line.endswith(": started")]


def _ops(project: Path) -> set[tuple[str, int]]:
    model = onnx.load(project / "out" / "tiny.cache" / "lynx" / "tiny.onnx", load_external_data=False)
    return {
        (node.op_type, next((a.i for a in node.attribute if a.name == "metadata_layout"), 0))
        for node in model.graph.node
        if node.domain == DOMAIN
    }


def test_another_operand_compensates_and_rewrites_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _stages_run(project) == ["calibrate", "compensate", "export", "rewrite", "build"]
    assert _ops(project) == {("LynxSparseLinear", 0)}
    weight = "sparsity: {operand: weight}\n"
    assert _stages_run(project, weight) == ["compensate", "rewrite", "build"]
    assert _ops(project) == {("LynxSparseWeightLinear", 80)}
    assert _stages_run(project, weight) == ["build"]
    monkeypatch.setattr(trt, "metadata_layout", lambda backend: 90)
    assert _stages_run(project, weight) == ["rewrite", "build"]
    assert _ops(project) == {("LynxSparseWeightLinear", 90)}
    mixed = "sparsity: {operand: {'*.ff.*': weight}}\n"
    assert _stages_run(project, mixed) == ["compensate", "rewrite", "build"]
    assert _ops(project) == {("LynxSparseLinear", 0), ("LynxSparseWeightLinear", 90)}
    dense = "sparsity: {operand: {'*.ff.*': none}}\n"  # other tensors are measured: others take part
    assert _stages_run(project, dense) == ["calibrate", "compensate", "rewrite", "build"]
