# SPDX-License-Identifier: Apache-2.0
"""An engine as the transformer of a real ``FluxPipeline``, on a fake GPU: the images are those of its ONNX file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import load_file

import lynx_compile
from lynx_compile.engine import cuda as cuda_module
from lynx_compile.engine import trt
from lynx_compile.engine.module import EngineModule
from lynx_compile.errors import EngineError, InputError
from lynx_compile.models.dit import DiT
from lynx_compile.passes.describe import call_of
from lynx_compile.passes.export import DenseOnnx, export
from lynx_compile.passes.rewrite import LynxOnnx
from lynx_compile.pipeline import compile
from lynx_compile.recipe import load_recipe
from tests.conftest import TINY, open_dit
from tests.engine.conftest import Stage, set_stage
from tests.engine.fakes import FakeCuda, FakeTensorRT

STEPS = 3
Open = Callable[[Any], Any]


@pytest.fixture(scope="module")
def dit(tiny: Path) -> DiT:
    return open_dit(load_recipe(tiny / "tiny.yaml"))[0]


@pytest.fixture(scope="module")
def dense(dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> DenseOnnx:
    """The tiny FLUX as ONNX in fp16, which ONNX Runtime runs too."""
    return export(dit, tmp_path_factory.mktemp("flux") / "flux.onnx")


@pytest.fixture
def flux(dense: DenseOnnx, dit: DiT, monkeypatch: pytest.MonkeyPatch) -> Stage:
    lynx = LynxOnnx(dense.path, dense.path.with_suffix(".safetensors"), (), (), ())
    s = set_stage(monkeypatch, lynx, FakeCuda())
    s.change(source={"config": dict(dit.checkpoint.config)}, call=call_of(dit, dense).model_dump())
    return s


def pipeline(transformer: Any) -> Any:
    """A pipeline of tiny random parts; prompts are given as embeddings, so that it needs no text encoders."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=1, sample_size=16,
        shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.half(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=None,
    )  # fmt: skip
    pipe.transformer = transformer
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **changes: Any) -> np.ndarray[Any, Any]:
    random = torch.Generator().manual_seed(3)
    arguments: dict[str, Any] = {
        "prompt_embeds": torch.randn(2, 4, 32, generator=random).half(),
        "pooled_prompt_embeds": torch.randn(2, 16, generator=random).half(),
        "height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": 3.5, "output_type": "np",
        "generator": torch.Generator().manual_seed(4),
    }  # fmt: skip
    return pipe(**arguments | changes).images


class OnnxTransformer(torch.nn.Module):
    """The reference: the same ONNX file, fed by hand, behind diffusers' own class's config."""

    def __init__(self, path: Path, weights: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.weights = weights or {}
        self.config = FluxTransformer2DModel(**TINY).config
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.dtype, self.device = torch.float16, torch.device("cpu")
        self.calls: list[dict[str, Any]] = []

    def cache_context(self, name: str) -> Any:
        return EngineModule.cache_context(self, name)  # type: ignore[arg-type]

    def forward(self, return_dict: bool = True, **given: Any) -> Any:
        self.calls.append(given)
        types = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int32)": np.int32}
        given = {
            name: value.numpy() for name, value in given.items() if torch.is_tensor(value)
        } | self.weights
        feed = {i.name: given[i.name].astype(types[i.type]) for i in self.session.get_inputs()}
        return (torch.from_numpy(self.session.run(None, feed)[0]),)


@pytest.fixture
def torch_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline works where its transformer is; here torch knows of no GPU, and the engine is given CPU tensors."""
    monkeypatch.setattr(EngineModule, "device", torch.device("cpu"))


@pytest.mark.usefixtures("torch_without_gpu")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_pipeline_makes_the_same_images(flux: Stage, cuda_graph: bool) -> None:
    expected = generate(pipeline(OnnxTransformer(flux.lynx.path)))
    with_engine = pipeline(transformer := lynx_compile.load(flux.path, cuda_graph=cuda_graph))
    images = generate(with_engine)
    assert images.shape == (2, 16, 16, 3)
    assert images.std() > 0.01
    np.testing.assert_array_equal(images, expected)
    assert flux.trt.log.count("execute") == (2 if cuda_graph else STEPS)
    transformer.close()
    assert flux.cuda.leaks() == []
    with pytest.raises(EngineError, match="is closed"):
        generate(with_engine)


@pytest.mark.usefixtures("torch_without_gpu")
def test_true_guidance_runs_twice_a_step(flux: Stage) -> None:
    random = torch.Generator().manual_seed(5)
    negative = {
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": torch.randn(2, 4, 32, generator=random).half(),
        "negative_pooled_prompt_embeds": torch.randn(2, 16, generator=random).half(),
    }
    expected = generate(pipeline(OnnxTransformer(flux.lynx.path)), **negative)
    images = generate(pipeline(lynx_compile.load(flux.path)), **negative)
    np.testing.assert_array_equal(images, expected)
    assert flux.trt.log.count("execute") == 2 * STEPS


def test_it_is_near_the_torch_model(flux: Stage, dit: DiT) -> None:
    """The reference above is not of the same making as the original: this is."""
    with torch.no_grad():
        expected = dit.module(**{name: value.float() for name, value in dit.inputs.items()}).sample
        found = lynx_compile.load(flux.path)(**dit.inputs).sample
    assert found.dtype == torch.float16
    assert (found - expected).norm() / expected.norm() < 0.01


def test_a_pipeline_of_another_dtype(flux: Stage) -> None:
    """Inputs are converted to what the engine takes, and its output to what the pipeline has."""
    transformer = lynx_compile.load(flux.path)
    given = inputs(torch.bfloat16)
    velocity = transformer(**given, return_dict=False)[0]
    assert velocity.dtype == torch.bfloat16
    exact = {
        name: value.float() if "ids" in name or value.ndim == 1 else value.half()
        for name, value in given.items()
    }
    torch.testing.assert_close(
        velocity, transformer(**exact, return_dict=False)[0].bfloat16(), rtol=0, atol=0
    )


def inputs(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 64, 4).to(dtype),
        "encoder_hidden_states": torch.randn(2, 4, 32).to(dtype),
        "pooled_projections": torch.randn(2, 16).to(dtype),
        "timestep": torch.full((2,), 0.5).to(dtype),
        "img_ids": torch.zeros(64, 3).to(dtype),
        "txt_ids": torch.zeros(4, 3).to(dtype),
        "guidance": torch.full((2,), 3.5),
    }


def test_what_a_pipeline_sees(flux: Stage) -> None:
    transformer = lynx_compile.load(flux.path)
    assert transformer.config.in_channels == 4
    assert transformer.config.guidance_embeds is True
    assert (transformer.dtype, transformer.device) == (torch.float16, torch.device("cuda:0"))
    assert list(transformer.parameters()) == []
    with transformer.cache_context("cond"):
        output = transformer(**inputs())
    assert isinstance(output, Transformer2DModelOutput)
    assert output.sample.shape == (2, 64, 4)
    assert isinstance(transformer(**inputs(), return_dict=False), tuple)
    assert pipeline(transformer).transformer is transformer
    assert pipeline(transformer).config.transformer is not None


def test_torch_compile_passes_it_by(flux: Stage) -> None:
    """Alone, in place, and in a module around it whose other work is compiled."""

    class Around(torch.nn.Module):
        def __init__(self, transformer: torch.nn.Module) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, hidden_states: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
            return self.transformer(hidden_states * 0.5, **others).sample.float() + 1

    given = inputs()
    around = Around(lynx_compile.load(flux.path))
    expected = around(**given)
    torch._dynamo.reset()
    compiled = torch.compile(around, backend="eager")
    torch.testing.assert_close(compiled(**given), expected, rtol=0, atol=0)
    alone = torch.compile(around.transformer, backend="eager")
    halved = given | {"hidden_states": given["hidden_states"] * 0.5}
    torch.testing.assert_close(alone(**halved).sample.float() + 1, expected, rtol=0, atol=0)
    around.transformer.compile(backend="eager")
    torch.testing.assert_close(around(**given), expected, rtol=0, atol=0)


def test_moving_it(flux: Stage) -> None:
    transformer = lynx_compile.load(flux.path)
    for arguments in (
        ("cuda",),
        ("cuda:0",),
        (torch.float16,),
        ("cuda", torch.float16),
        (torch.device("cuda", 0),),
    ):
        assert transformer.to(*arguments) is transformer
    assert transformer.eval() is transformer
    with pytest.raises(
        InputError, match=r"The engine is on cuda:0 and cannot move to cpu. Move the pipeline"
    ):
        transformer.to("cpu")
    with pytest.raises(InputError, match="cannot move to cuda:1"):
        transformer.to(device="cuda:1")
    with pytest.raises(InputError, match=r"computes in torch.float16 and cannot turn to torch.bfloat16"):
        transformer.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"joint_attention_kwargs": {"scale": 0.5}},
            r"compiled for 'joint_attention_kwargs.scale' = None, and this call has 0.5. .* adapters are merged",
        ),
        ({"controlnet_block_samples": [1]}, "'controlnet_block_samples.0' = None, and this call has 1"),
        ({"controlnet_blocks_repeat": True}, "'controlnet_blocks_repeat' = False, and this call has True"),
        ({"guidance": None}, "'guidance' = a tensor, and this call has None. Call it as it was recorded"),
        ({"encoder_hidden_states": None}, "'encoder_hidden_states' = a tensor, and this call has None"),
        (
            {"shift": 3},
            r"The call does not fit its module: got an unexpected .* 'shift'. It takes hidden_states",
        ),
        (
            {"hidden_states": torch.zeros(2, 65, 4)},
            r"'hidden_states' is fp16 \[2, 65, 4\], and the engine has fp16",
        ),
        (
            {"hidden_states": torch.zeros(1, 64, 4)},
            r"\[1, 64, 4\], and .* Give the shapes that the recipe names",
        ),
        ({"img_ids": torch.zeros(2, 64, 3)}, r"'img_ids' is fp32 \[2, 64, 3\], and the engine has"),
    ],
)
def test_what_it_refuses(flux: Stage, change: dict[str, Any], message: str) -> None:
    transformer = lynx_compile.load(flux.path)
    with pytest.raises(InputError, match=message):
        transformer(**inputs() | change)
    assert "execute" not in flux.trt.log
    transformer(**inputs(), joint_attention_kwargs={})


@pytest.mark.slow
@pytest.mark.usefixtures("torch_without_gpu")
def test_from_recipe_to_images(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler really writes: plan with the plugin library in it, manifest, sparse linears' weights."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe.read_text() + "engine:\n  backend: tensorrt_rtx\n  weights: external\n")
    output = tmp_path / "out" / "tiny.engine"
    (manifest,) = compile(load_recipe(recipe), output)
    assert manifest.weights.tensors
    cuda = FakeCuda()
    monkeypatch.setattr(cuda_module, "bindings", lambda: cuda)
    if trt.gpu() is None:  # the real TensorRT gets as far as that
        with pytest.raises(EngineError, match=r"TensorRT cannot (start|load) .*TensorRT says: .*driver"):
            lynx_compile.load(output)
        assert cuda.leaks() == []
    fake = FakeTensorRT(cuda, output.with_suffix(".onnx"))
    backend = replace(trt.backend("tensorrt_rtx"), module=fake)  # type: ignore[arg-type]
    monkeypatch.setattr(trt, "backend", lambda name: backend)
    transformer = lynx_compile.load(output)
    assert fake.deserialized[0] == output.read_bytes()
    images = generate(pipeline(transformer))
    transformer.close()
    assert cuda.leaks() == []
    weights = {name: value.numpy() for name, value in load_file(output.with_suffix(".safetensors")).items()}
    np.testing.assert_array_equal(images, generate(pipeline(OnnxTransformer(fake.model, weights))))


def test_an_engine_of_no_torch_module(flux: Stage) -> None:
    flux.change(call=None)
    with pytest.raises(InputError, match="was not compiled from a torch module"):
        lynx_compile.load(flux.path)
    assert flux.cuda.leaks() == []


def test_progress_and_path_pass_through(flux: Stage) -> None:
    seen: list[str] = []
    lynx_compile.load(str(flux.path), progress=lambda what, done, total: seen.append(what))
    assert set(seen) == {"engine"}


def test_in_torchs_stream(flux: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU tensor would do, as far as a machine without one can show it: the current stream is handed on."""
    transformer = lynx_compile.load(flux.path)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: torch.zeros(*shape, dtype=dtype))
    monkeypatch.setattr(
        transformer._ways[0]._context, "run", lambda inputs, outputs, stream: seen.update(stream=stream)
    )
    transformer._ways[0]._run(inputs(), torch.device("cuda", 0))
    assert seen == {"stream": 77}


def test_the_package_stays_light() -> None:
    code = "import sys, lynx_compile; print({'torch', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
