# SPDX-License-Identifier: Apache-2.0
"""Whole models in their forms, tiny and on a CPU: the same checks as on a GPU, no times."""

from __future__ import annotations

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lynx_compile.errors import InputError, StageError
from lynx_compile.passes.speed_table import Form
from lynx_compile.recipe import Sparsity
from lynx_compile.tools import bench_model, full_size, model_forms, model_results, timing
from lynx_compile.tools.model_checks import TOLERANCE, check_blocks, check_ops
from lynx_compile.tools.model_results import FormResult, ModelResult
from lynx_compile.tools.step_model import StepModel, turned
from lynx_compile.torch_ops import operators
from lynx_compile.torch_ops.definitions import COMPILED
from lynx_compile.torch_ops.readers import Merged

SMALL: dict[str, dict[str, Any]] = {"num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 2}  # type: ignore[dict-item]
TINY: dict[str, dict[str, Any]] = {
    "flux1_dev": {
        **SMALL, "num_single_layers": 3, "joint_attention_dim": 64, "pooled_projection_dim": 32,
        "axes_dims_rope": (16, 24, 24), "guidance_embeds": True,
    },
    "qwen_image": {**SMALL, "joint_attention_dim": 64, "axes_dims_rope": (16, 24, 24)},
    "z_image": {
        "dim": 384, "n_heads": 6, "n_kv_heads": 6, "n_layers": 3, "n_refiner_layers": 1, "cap_feat_dim": 64,
        "axes_dims": [16, 24, 24], "axes_lens": [128, 64, 64],
    },
    "flux2_klein": {
        **SMALL, "num_single_layers": 3, "joint_attention_dim": 64, "axes_dims_rope": (16, 16, 16, 16),
        "guidance_embeds": False,
    },
}  # fmt: skip
GATES = {"flux2_klein": 3 * 2 + 3, "z_image": 3 + 2}  # SwiGLU in an epilogue; the two refiners' blocks too
GROUPS = {
    "flux1_dev": {1, 3, 4}, "qwen_image": {1, 3}, "z_image": {1, 2, 3}, "flux2_klein": {1, 3},
}  # fmt: skip


@dataclasses.dataclass
class Built:
    model: StepModel
    dense: nn.Module
    call: dict[str, Any]
    observed: model_forms.Observed
    output: torch.Tensor


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "metadata_layout", lambda dtype: 90)


def tiny_model(name: str) -> StepModel:
    known = full_size.find(name)
    return full_size.step_model(dataclasses.replace(known, config=TINY[name], size=full_size.Size(8, 8, 64)))


@pytest.fixture(scope="module", params=list(TINY))
def built(request: pytest.FixtureRequest) -> Built:
    model = tiny_model(request.param)
    dense = model.build("cpu")
    call = {**model.step("cpu"), "return_dict": False}
    observed = model_forms.observe(dense, call)
    with torch.no_grad():
        output = bench_model._first(dense(**call))
    sizes = {len(group) for groups in observed.groups.values() for group in groups}
    assert sizes == GROUPS[request.param]
    model_forms.merge_dense(dense, observed)
    return Built(model, dense, call, observed, output)


def test_merging_changes_nothing(built: Built) -> None:
    with torch.no_grad():
        assert torch.equal(bench_model._first(built.dense(**built.call)), built.output)
    linears = [path for path, each in built.dense.named_modules() if isinstance(each, nn.Linear)]
    blocks = tuple(model_forms.blocks_of(built.dense))
    left = [path for path in linears if path.startswith(blocks)]
    assert all("norm" in path or "mod" in path for path in left)  # those that see one token


@pytest.mark.parametrize(
    "form",
    [*(pytest.param(form, marks=pytest.mark.nightly) for form in ("bf16_weight", "fp8_dense")), "fp8_weight"],
)
def test_a_form_is_checked_compiled_and_smaller(built: Built, form: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    calls = built.observed.calls
    with torch.no_grad():
        module = model_forms.Forms(built.dense).make(form)
        eager, error = check_ops(form, module, calls)
        assert error is not None and 0 < error < TOLERANCE
        module.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=counter)  # type: ignore[operator]
        check_blocks(form, module, calls, eager)
        found = bench_model._first(module(**built.call)).float()
    # Blocks of a kind share their code; FLUX's second single block gets its tokens in other strides than the first.
    assert counter.frame_count <= len(calls) + (built.dense.__class__.__name__.startswith("Flux"))
    assert counter.frame_count < len(model_forms.blocks_of(module))
    difference = float((found - built.output.float()).norm() / built.output.float().norm())
    assert 1e-3 < difference < (0.1 if form == "fp8_dense" else 0.8)
    assert model_forms.weight_bytes(module) < model_forms.weight_bytes(built.dense)
    assert all(not each._held for each in module.modules() if isinstance(each, Merged))
    gates = sum(isinstance(each, COMPILED) and each.epilogue.gated for each in module.modules())
    assert gates == (GATES.get(built.model.name, 0) if form == "bf16_weight" else 0)


def test_a_wrong_product_is_not_timed(built: Built) -> None:
    module = model_forms.Forms(built.dense).make("fp8_weight")
    linear = next(each.linear for each in module.modules() if isinstance(each, Merged))
    parts = type(linear).parts
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(linear), "parts", lambda self, x, sizes: [1.02 * y for y in parts(self, x, sizes)])
        with pytest.raises(StageError, match="is off by"):
            check_ops("fp8_weight", module, built.observed.calls)


MIXED = {
    "*.attn.to_q": Form("activation"),
    "*.attn.to_k": Form("weight", fp8=True),
    "transformer_*.attn.to_v": Form("activation", fp8=True),
    "*.ff.*": Form("none", fp8=True),
    "single_*.proj_mlp": Form("weight"),
}


def test_a_plan_mixes_forms_even_of_linears_that_read_one_tensor(built: Built) -> None:
    if built.model.name != "flux1_dev":
        pytest.skip("one is enough")
    paths = [path for linear in model_forms.dense_linears(built.dense) for path in linear.group.linears]
    plan = {path: form for path in paths for glob, form in MIXED.items() if fnmatchcase(path, glob)}
    forms = model_forms.Forms(built.dense, plan, Sparsity(norm_scale=True))
    assert forms.uniform() is None  # else its figures are that form's
    everywhere = dict.fromkeys(paths, Form("weight", fp8=True))
    assert model_forms.Forms(built.dense, everywhere).uniform() == "fp8_weight"
    with torch.no_grad():
        module = forms.make("plan")
        _, error = check_ops("plan", module, built.observed.calls)
        assert error is not None and error < TOLERANCE
        found = bench_model._first(module(**built.call)).float()
    assert 1e-3 < float((found - built.output.float()).norm() / built.output.float().norm()) < 0.8
    products = [p for each in module.modules() if isinstance(each, model_forms.Mixed) for p in each.products]
    assert {type(product).__name__ for product in products} == {
        "SparseActivationLinear", "SparseWeightLinear", "Fp8Linear", "DenseLinear",
    }  # fmt: skip
    assert bench_model.mixture_of(plan, paths)["2:4 activations"] == 3 + 3


def test_a_step_is_measured_and_so_is_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: everything but the graphs."""
    monkeypatch.setattr(timing, "STEADY_SECONDS", 0.001)
    small = TINY["flux1_dev"] | {"num_layers": 1, "num_single_layers": 1}
    known = dataclasses.replace(full_size.find("flux1_dev"), config=small, size=full_size.Size(8, 8, 64))
    sparsity = Sparsity(operand={"transformer_*": "weight", "*": "none"}, precision="fp8")
    model = full_size.step_model(known, sparsity=sparsity)
    result = bench_model.bench_model(
        model,
        forms=["fp8_weight", "plan"],
        settings=bench_model.Settings(rounds=2, backend="eager"),
        device="cpu",
    )
    assert list(result.forms) == ["bf16_dense", "fp8_weight", "plan"]
    dense, plan = result.forms["bf16_dense"], result.forms["plan"]
    assert dense.ratio == dense.steady_ratio == 1 and dense.output_difference == 0
    assert all(form.ms > 0 and form.steady_ms > 0 for form in result.forms.values())
    assert plan.same_as is None and plan.output_difference < result.forms["fp8_weight"].output_difference
    assert result.plan == {"2:4 weights in FP8": 12, "dense FP8": 5}
    assert not result.cuda_graph and result.device == "the CPU"
    model_results.save(result, tmp_path)
    table = (tmp_path / "the-cpu-model.md").read_text()
    assert "- flux1_dev: 128x128 pixels, 64 text tokens, batch 1, random weights" in table
    assert f"| the plan ({', '.join(f'{n} {words}' for words, n in result.plan.items())}) |" in table
    assert json.loads((tmp_path / "summary.json").read_text())["step.flux1_dev.plan"] == round(plan.ratio, 3)


def test_results_lie_beside_those_of_before(tmp_path: Path) -> None:
    def form(ratio: float) -> FormResult:
        return FormResult(100 / ratio, 1, 2, ratio, ratio, 3, 4, 5, 1e-3, 1e-2, 0.1)

    def result(model: str, forms: dict[str, FormResult]) -> ModelResult:
        return ModelResult(model, "C", 1, "flash", True, forms, "A GPU", "2", "0", "2026-01-01", {})

    (tmp_path / "summary.json").write_text('{"linears.torch_fp8": 1.9}')
    model_results.save(result("flux1_dev", {"bf16_dense": form(1), "fp8_weight": form(1.6)}), tmp_path)
    model_results.save(result("z_image", {"bf16_dense": form(1), "torch_fp8": form(1.3)}), tmp_path)
    model_results.save(result("flux1_dev", {"bf16_dense": form(1), "bf16_weight": form(1.25)}), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["linears.torch_fp8"] == 1.9 and summary["step.flux1_dev.dense_ms"] == 100
    assert summary["step.flux1_dev.fp8_weight"] == 1.6 and summary["step.flux1_dev.bf16_weight"] == 1.25
    assert summary["step.z_image.torch_fp8"] == 1.3
    table = (tmp_path / "a-gpu-model.md").read_text()
    assert "| flux1_dev | FP8, 2:4 weights | 62.5 | 1.60x |" in table
    assert (tmp_path / "a-gpu-model.png").read_bytes().startswith(b"\x89PNG")


def test_real_numbers_turn_as_complex_ones() -> None:
    x, freqs = torch.randn(2, 5, 3, 8).bfloat16(), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    complex_x = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    wanted = torch.view_as_real(complex_x * freqs[:, None]).flatten(3)
    assert torch.allclose(turned(x, freqs, use_real=False).float(), wanted, rtol=2**-7, atol=2**-7)


def test_an_unknown_model_and_a_missing_gpu_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="flux1_dev, qwen_image.*or a recipe"):
        full_size.find("flux9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU"):
        bench_model.bench_model(tiny_model("z_image"))
