# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile compare``: its figures against torch, its limits, and how it fails."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lynx_compile import cli
from lynx_compile.engine.manifest import Manifest
from lynx_compile.errors import InputError
from lynx_compile.files.float32 import float32_copy
from lynx_compile.files.progress import no_progress
from lynx_compile.models import prompts
from lynx_compile.ops.sparse_linear import sparse_linear
from lynx_compile.ops.sparse_weight_linear import sparse_weight_linear
from lynx_compile.recipe import Compare, load_recipe
from lynx_compile.tools import compare
from lynx_compile.tools.comparison import Comparison, Images, StepError, missed, over_budget
from lynx_compile.tools.held_out import _unpacked, draw, open_sampler
from lynx_compile.tools.metric import call_metric
from tests.conftest import open_dit

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(compiled_tiny: Path, tmp_path: Path) -> Path:
    """A copy; its dense ONNX stays where it was made."""
    shutil.copytree(compiled_tiny.parent, tmp_path / "out")
    return tmp_path / "out" / compiled_tiny.name


def limit(engine: Path, **values: Any) -> None:
    """What the recipe's section says, without compiling again."""
    path = engine.with_suffix(".cache") / "compiled.json"
    compiled = json.loads(path.read_text())
    compiled["recipe"]["compare"] |= {"samples": 2, "states": 1} | values
    path.write_text(json.dumps(compiled))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lynx-compile", "compare", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def first_state(tiny: Path) -> dict[str, torch.Tensor]:
    """What the model gets in step 0 from seed 1, by the pipeline itself."""
    recipe = load_recipe(tiny / "tiny.yaml")
    drawn = recipe.calibration.model_copy(update={"seed": 1, "samples": 2})
    dit, recording = open_dit(recipe.model_copy(update={"calibration": drawn}))
    state = recording.tensors(dit.calls.calls[0])
    assert torch.equal(state["timestep"], torch.ones(2)) and state["hidden_states"].shape == (2, 64, 4)
    return state


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def test_every_linear_is_compared_on_the_dense_models_input(engine: Path, tiny: Path) -> None:
    limit(engine)
    found = compare.compare(engine)
    manifest = Manifest.read(engine.with_suffix(".json"))
    module: Any = open_dit(load_recipe(tiny / "tiny.yaml"))[0].module
    module = module.half().float()  # the engine's weights
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path, linear in module.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_hook(lambda _, x, y, path=path: calls.update({path: (x[0], y)}))
    with torch.no_grad():
        module(**first_state(tiny), return_dict=False)
    tensors = load_file(engine.with_suffix(".safetensors"))
    measured = {linear.linear: linear for linear in found.linears}
    assert len(measured) == len(found.linears) == 17
    for node in manifest.sparse:
        assert node.operand == "weight"  # what is faster
        values, metadata, bias = (tensors[f"{node.layer}.{n}"] for n in ("values", "metadata", "bias"))
        x = calls[node.linears[0]][0]
        y = sparse_weight_linear(x, values.float(), metadata, bias.float(), metadata_layout=80)
        parts = y.split([calls[linear][1].shape[-1] for linear in node.linears], dim=-1)
        for linear, part, expected in zip(node.linears, parts, node.errors, strict=True):
            # A GELU that the node holds is off: the error is the linear's own.
            error = relative(part, calls[linear][1])
            assert measured[linear].error == pytest.approx(error, rel=0.02), linear
            assert measured[linear].worst == measured[linear].error  # one state
            assert measured[linear].expected == expected
    assert [x.error for x in found.linears] == sorted((x.error for x in found.linears), reverse=True)


def test_what_compensation_expects_is_what_compare_measures(engine: Path, tiny: Path) -> None:
    """One definition, from the moments there and from outputs here: on the calibration's own states they agree."""
    recipe = load_recipe(tiny / "tiny.yaml")
    limit(engine, samples=recipe.calibration.samples, states=10**3, seed=recipe.calibration.seed)
    found = compare.compare(engine)
    image = [x for x in found.linears if x.linear.startswith("transformer_blocks.0.ff.")]
    assert len(image) == 2
    for linear in found.linears:
        assert linear.error == pytest.approx(linear.expected, rel=0.05), linear.linear
        assert linear.worst >= linear.error


def test_output_errors_are_those_of_the_very_files(engine: Path, tiny: Path) -> None:
    """The 16-bit files themselves in ONNX Runtime, which has fp16 kernels for them."""
    limit(engine)
    found = compare.compare(engine)
    assert [step.step for step in found.output] == [0, 1, 2, 3]
    assert [step.timestep for step in found.output] == [1.0, 0.75, 0.5, 0.25]
    state = first_state(tiny)
    half = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    feed = {name: (value.half() if name in half else value).numpy() for name, value in state.items()}
    dense, lynx = (
        torch.from_numpy(ort.InferenceSession(path).run(None, feed)[0]).float()
        for path in (engine.with_suffix(".cache") / "dense" / "dense.onnx", engine.with_suffix(".onnx"))
    )
    assert found.output[0].error == pytest.approx(relative(lynx, dense), rel=0.1)


def test_prompts_that_calibration_did_not_see(tiny: Path, tmp_path: Path) -> None:
    many = {"prompt_embeds": torch.randn(20, 4, 32), "pooled_prompt_embeds": torch.randn(20, 16)}
    save_file(many, tmp_path / "many.safetensors")
    recipe = load_recipe(tiny / "tiny.yaml")
    calibration = recipe.calibration.model_copy(update={"prompts": str(tmp_path / "many.safetensors")})
    sampler = open_sampler(recipe.model_copy(update={"calibration": calibration}), tmp_path)
    assert sampler is not None and sampler.held_out
    split = prompts.split(prompts.read(tmp_path / "many.safetensors"))
    assert len(split.held_out) == 2 and sampler.numbers.tolist() == [*split.held_out] * 4
    for place, row in zip(sampler.numbers, sampler.rows, strict=True):
        assert torch.equal(row["prompt_embeds"][0], many["prompt_embeds"][place])


def test_it_writes_what_it_found(engine: Path) -> None:
    limit(engine, samples=3)
    found = compare.compare(engine)
    assert Comparison.read(engine.with_suffix(".compare.json")) == found
    assert found.images is not None and len(found.images.psnr) == 3
    assert found.not_measured == {
        "other prompts": "the recipe has too few to hold some out; errors are on other noise of the same ones",
        "metric": "the recipe names none",
        "LPIPS": "the Python package lpips is not installed",
        "engines": "there is no GPU here",
    }
    with Image.open(engine.with_suffix(".compare.png")) as sheet:
        assert sheet.width * 3 == sheet.height * 3  # three images in three rows
        pixels = np.asarray(sheet, dtype=float)
    third = len(pixels) // 3
    assert np.abs(pixels[:third] - pixels[third : 2 * third]).mean() < 5 < pixels[:third].mean()
    assert "data:image/png;base64," in engine.with_suffix(".html").read_text()
    assert not list(engine.with_suffix(".cache").glob("compare-*"))


def test_limits_decide_the_exit_code(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(engine, max_layer_error=0.9, max_output_error=0.9, min_psnr=10)
    assert run(monkeypatch, str(engine)) == 0
    shown = capsys.readouterr()
    assert "missed" not in shown.err and "single_transformer_blocks.0.proj_out" in shown.out
    limit(engine, max_layer_error=1e-4, max_output_error=0.9, min_psnr=90, max_lpips=0.1)
    assert run(monkeypatch, str(engine)) == 1
    errors = " ".join(capsys.readouterr().err.split())
    assert "compare.max_layer_error is 0.0001" in errors and "compare.min_psnr is 90" in errors
    assert "compare.max_lpips is 0.1, but it was not measured" in errors
    assert "max_output_error" not in errors
    found = Comparison.read(engine.with_suffix(".compare.json"))
    assert found is not None and len(found.missed) == 17 + 2


@pytest.mark.parametrize(
    ("limits", "said"), [({"min_psnr": 10}, "no limit of the recipe is missed"), ({}, "sets no limit")]
)
def test_the_page_says_whether_there_are_limits(engine: Path, limits: dict[str, float], said: str) -> None:
    limit(engine, **limits)
    compare.compare(engine)
    page = engine.with_suffix(".html").read_text()
    assert said in page and ("is missed" in page) == bool(limits)


METRIC = """
from pathlib import Path
def count(dense, lynx, prompts):
    Path("called").write_text("")
    assert dense.shape == lynx.shape == (2, 1, 16, 16) and dense.min() >= 0 and dense.max() <= 1
    return {"images": len(dense), "last": prompts[-1]}
def fail(dense, lynx, prompts):
    raise ValueError("no such thing")
def infinite(dense, lynx, prompts):
    return {"x": float("inf")}
"""


def test_the_recipes_metric_runs_only_if_it_is_allowed(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_metric.py").write_text(METRIC)
    monkeypatch.chdir(tmp_path)
    limit(engine, metric="my_metric:count", min_metric={"images": 3})
    assert run(monkeypatch, str(engine)) == 1
    assert not (tmp_path / "called").exists()
    shown = capsys.readouterr()
    assert "my_metric:count is code; allow it with --metric" in " ".join(shown.out.split())
    assert "compare.min_metric.images is 3, but it was not measured" in " ".join(shown.err.split())
    assert run(monkeypatch, str(engine), "--metric") == 1
    assert "images is 2, compare.min_metric.images is 3" in " ".join(capsys.readouterr().err.split())
    found = Comparison.read(engine.with_suffix(".compare.json"))
    assert found is not None and found.metric == {"images": 2, "last": 1}
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_metric:fail", r"my_metric:fail' failed \(ValueError: no such thing\)"),
        ("my_metric:none", "failed \\(AttributeError"),
        ("no_module:f", "failed \\(ModuleNotFoundError"),
        ("my_metric:infinite", "no finite 'x'"),
    ],
)
def test_a_wrong_metric_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "my_metric.py").write_text(METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metric", raising=False)
    images = np.zeros((2, 1, 16, 16), np.float32)
    with pytest.raises(InputError, match=message):
        call_metric(name, images, images, np.arange(2))


def lose_cache(engine: Path) -> None:
    shutil.rmtree(engine.with_suffix(".cache"))


def lose_onnx(engine: Path) -> None:
    engine.with_suffix(".onnx").unlink()


def lose_weights(engine: Path) -> None:
    engine.with_suffix(".safetensors").unlink()


def cut_weights(engine: Path) -> None:
    path = engine.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:2000])


def garble_record(engine: Path) -> None:
    (engine.with_suffix(".cache") / "compiled.json").write_text("{}")


def export_again(engine: Path) -> None:
    path = engine.with_suffix(".cache") / "export.stamp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "another"}))


def other_engine(engine: Path) -> None:
    path = engine.with_suffix(".json")
    values = json.loads(path.read_text())
    values["engine"]["sha256"] = "0" * 64
    path.write_text(json.dumps(values))


def rename_node(engine: Path) -> None:
    model = onnx.load(engine.with_suffix(".onnx"), load_external_data=False)
    next(node for node in model.graph.node if node.domain == "lynx").name = "other"
    onnx.save(model, engine.with_suffix(".onnx"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_cache, "compiled.json cannot be read"),
        (lose_onnx, "tiny.onnx cannot be read"),
        (lose_weights, "The weights of .*tiny.onnx cannot be read"),
        (cut_weights, "The weights of .*tiny.onnx cannot be read"),
        (garble_record, "does not tell how the engine was compiled"),
        (export_again, "belongs to another run"),
        (other_engine, "belongs to another run"),
        (rename_node, "its Lynx nodes are not the manifest's layers"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_spoiled_files_are_one_clear_error(engine: Path, spoil: Callable[[Path], None], message: str) -> None:
    limit(engine)
    spoil(engine)
    with pytest.raises(InputError, match=message):
        compare.compare(engine)
    assert not engine.with_suffix(".compare.json").exists()


class FakeEngine:
    """Runs the ONNX file that the engine was built from; takes what the manifest says, in its dtypes."""

    sessions: dict[str, Path]

    def __init__(self, path: Path) -> None:
        self.manifest = Manifest.read(path.with_suffix(".json"))
        assert path.read_bytes()[:4] == b"vtrt"
        self.inputs = self.manifest.inputs
        self.session = ort.InferenceSession(self.sessions[path.name])

    @classmethod
    def open(cls, path: Path) -> FakeEngine:
        return cls(path)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output.sample": self.session.run(None, inputs)[0]}


def test_both_engines_run_where_there_is_a_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense engine is really built; running takes a GPU, so that is ONNX Runtime's work here."""
    limit(engine)
    runtime: Any = ModuleType("lynx_compile.engine.runtime")
    runtime.Engine = FakeEngine
    dense = engine.with_suffix(".cache") / "dense" / "dense.onnx"
    FakeEngine.sessions = {"dense.engine": dense, "tiny.engine": engine.with_suffix(".onnx")}
    monkeypatch.setitem(sys.modules, "lynx_compile.engine.runtime", runtime)
    monkeypatch.setattr("lynx_compile.engine.trt.gpu", lambda: "sm86")
    found = compare.compare(engine)
    assert [run.kind for run in found.engines] == ["dense", "lynx"]
    on_dense, on_lynx = found.engines
    assert len(on_dense.steps) == len(on_lynx.steps) == 4
    assert all(0 < step.error < 0.005 for step in on_dense.steps)  # the rounding of fp16
    for step, reference in zip(on_lynx.steps, found.output, strict=True):
        assert step.error == pytest.approx(reference.error, rel=0.3)
    assert "engines" not in found.not_measured
    assert "lynx engine" in engine.with_suffix(".html").read_text()


def test_float32_copy_of_bf16_with_external_weights(tmp_path: Path) -> None:
    from tests.engine.conftest import _write_onnx

    embedded, external = (
        float32_copy(_write_onnx(tmp_path / name, external=name == "b").path, tmp_path / f"{name}32.onnx")
        for name in ("a", "b")
    )
    feed = {"x": np.random.default_rng(0).standard_normal((1, 32, 64), np.float32)}
    results = [ort.InferenceSession(path).run(None, feed)[0] for path in (embedded, external)]
    np.testing.assert_array_equal(results[0], results[1])
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    x = torch.from_numpy(feed["x"])
    for name in ("blocks.0.proj", "blocks.1.proj"):
        weight, down, bias = (tensors[f"{name}.{key}"].float() for key in ("weight", "lora_down", "bias"))
        x = sparse_linear(x, weight, down, bias, rank=16, norm_scale=False).relu()
    np.testing.assert_allclose(results[0], x.numpy(), rtol=1e-3, atol=1e-2)


def test_a_vae_decodes_what_has_one(tiny: Path, tmp_path: Path) -> None:
    """Without one the latents are the pixels, in their places; with one, the pipeline's own images."""
    from diffusers import AutoencoderKL

    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    recipe = load_recipe(tmp_path / "tiny.yaml")
    recipe = recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"samples": 3})})
    plain = open_sampler(recipe, tmp_path)
    assert plain is not None
    pixels = draw(plain, no_progress)
    assert pixels is not None and pixels.shape == (3, 1, 16, 16) and 0 <= pixels.min() < pixels.max() <= 1
    tokens = np.arange(4, dtype=np.float32)[None, None] + 4 * np.arange(64, dtype=np.float32)[None, :, None]
    (placed,) = _unpacked(plain, torch.from_numpy(tokens))
    assert placed[0, :2, :4].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=1, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "model" / "vae")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}))
    call = {"height": 32, "width": 32, "num_inference_steps": 2}
    decoding = open_sampler(recipe.model_copy(update={"call": call}), tmp_path)
    assert decoding is not None
    images = draw(decoding, no_progress)
    assert images is not None and images.shape == (3, 3, 32, 32)


def test_every_limit_that_was_not_measured_is_missed() -> None:
    limits = Compare(max_layer_error=0.1, min_psnr=30, min_metric={"a": 1}, max_metric={"b": 2})
    found = missed(limits, (), (), None, {"a": 1.0, "b": 2.5})
    assert found == (
        "compare.min_psnr is 30, but it was not measured",
        "b is 2.5, compare.max_metric.b is 2",
    )


@pytest.mark.parametrize(
    ("limit", "value", "errors", "psnr", "said"),
    [
        (
            "max_output_error",
            0.015,
            (0.01, 0.02),
            None,
            "errs by 0.0158, and budget.max_output_error is 0.015",
        ),
        ("max_output_error", 0.016, (0.01, 0.02), None, None),
        ("min_psnr", 35.0, (0.1,), (33.0, 34.0), "PSNR is 33.5 dB, and budget.min_psnr is 35"),
        ("min_psnr", 33.0, (0.1,), (33.0, 34.0), None),
        ("min_psnr", 33.0, (0.1,), None, None),
        ("min_speed", 2.0, (0.1,), (10.0,), None),
    ],
)
def test_what_is_over_the_budget_is_said_with_the_budget_to_ask_for(
    limit: str, value: float, errors: tuple[float, ...], psnr: tuple[float, ...] | None, said: str | None
) -> None:
    budget: Any = SimpleNamespace(limit=limit, value=value)
    steps = [StepError(step=i, timestep=1.0, error=e, worst=e) for i, e in enumerate(errors)]
    images = None if psnr is None else Images(psnr=psnr, lpips=None, sheet="x.png")
    found = over_budget(budget, steps, images)
    if said is None:
        assert found is None
    else:
        assert found is not None and said in found
        asked = float(found.rpartition("=")[2].rstrip("."))
        assert asked == pytest.approx(0.0142 if limit == "max_output_error" else 36.5, abs=1e-3)
    assert over_budget(None, steps, images) is None
