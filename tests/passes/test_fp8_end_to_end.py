# SPDX-License-Identifier: Apache-2.0
"""A recipe with precision fp8 through all stages up to the ONNX file, which ONNX Runtime runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from lynx_compile.models.dit import DiT
from lynx_compile.ops.functions import DOMAIN
from lynx_compile.passes.calibrate import Statistics, calibrate
from lynx_compile.passes.compensate import compensate
from lynx_compile.passes.export import DenseOnnx, export
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.passes.select import select
from lynx_compile.recipe import Recipe, load_recipe
from tests.conftest import RECIPE, open_dit

GLOBS = "{'*.ff.net.0.proj': none, '*.proj_out': activation, '*': weight}"


@dataclass(frozen=True)
class Measured:
    """The tiny model, its moments for all forms, and its dense ONNX file."""

    dit: DiT
    folder: Path
    statistics: Statistics
    dense: DenseOnnx

    def compile(self, recipe: Recipe, name: str) -> LynxOnnx:
        plan = select(self.dit.groups, recipe.sparsity, ("sm90",))
        weights = compensate(
            self.dit, plan, self.statistics, recipe.sparsity, self.folder / name, lambda *_: None
        )
        return rewrite(self.dense, plan, weights, self.folder / f"{name}.onnx", metadata_layout=90)

    def error(self, lynx: LynxOnnx) -> float:
        """Relative, of the model's output on its recorded call."""
        feed = {name: value.float().numpy() for name, value in self.dit.inputs.items()}
        got, wanted = (
            ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0]
            for path in (lynx.path, self.dense.path)
        )
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def _recipe(tiny: Path, sparsity: str) -> Recipe:
    """``tiny.yaml`` with a section of its own."""
    path = tiny / "fp8.yaml"
    path.write_text(f"{RECIPE}sparsity: {{{sparsity}}}\n")
    try:
        return load_recipe(path)
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("fp8")
    recipe = _recipe(tiny, "precision: fp8, operand: activation")
    dit, recording = open_dit(recipe)
    plan = select(dit.groups, recipe.sparsity)
    statistics = calibrate(dit, plan, recording, recipe, folder / "statistics", lambda *_: None)
    return Measured(dit, folder, statistics, export(dit, folder / "dense.onnx", torch.float32))


def test_every_fp8_form_runs_and_errs_as_little_as_it_should(measured: Measured, tiny: Path) -> None:
    """FP8's error adds to that of 2:4 like an independent one."""
    errors = {}
    for precision, operands in (
        ("fp8", ("none", "weight", "activation")),
        ("fp16", ("weight", "activation")),
    ):
        for operand in operands:
            rank = ", rank: 0" if precision == "fp16" and operand == "activation" else ""
            recipe = _recipe(tiny, f"precision: {precision}, operand: {operand}{rank}")
            lynx = measured.compile(recipe, f"{precision}-{operand}")
            assert {(node.operand, node.fp8) for node in lynx.sparse} == {(operand, precision == "fp8")}
            errors[precision, operand] = measured.error(lynx)
    assert 0.001 < errors["fp8", "none"] < 0.03
    for operand in ("weight", "activation"):
        both = math.hypot(errors["fp8", "none"], errors["fp16", operand])
        assert 0.6 * both < errors["fp8", operand] < 1.4 * both


def test_forms_mix_in_one_file(measured: Measured, tiny: Path) -> None:
    recipe = _recipe(tiny, f"precision: fp8, operand: {GLOBS}, exclude: '*_context.*'")
    lynx = measured.compile(recipe, "mixed")
    forms = {linear: node for node in lynx.sparse for linear in node.linears}
    block = "transformer_blocks.0."
    assert [(forms[path].operand, forms[path].fp8) for path in (
        f"{block}ff.net.0.proj", f"{block}attn.to_q", "single_transformer_blocks.0.proj_out",
    )] == [("none", True), ("weight", True), ("activation", True)]  # fmt: skip
    reasons = {linear.path: linear.reason for linear in lynx.dense}
    assert reasons[f"{block}ff_context.net.2"] == "excluded by the recipe ('*_context.*')"
    assert all(path not in forms for path in reasons)
    model = onnx.load(lynx.path, load_external_data=False)
    assert sum(node.domain == DOMAIN for node in model.graph.node) == len(lynx.sparse)
    assert measured.error(lynx) < 0.3
