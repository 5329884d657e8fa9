# SPDX-License-Identifier: Apache-2.0
"""diffusers' own pipelines with engines in the place of their transformers: what comes out is what torch gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lynx_compile
from lynx_compile.engine.module import EngineModule
from lynx_compile.errors import InputError
from lynx_compile.models.calls import recorded_call
from lynx_compile.models.capture import capture
from lynx_compile.passes.export import export_module
from lynx_compile.passes.rewrite import LynxOnnx
from lynx_compile.tools.support.pipelines import Prepared, prepare
from tests.engine.conftest import Stage, set_stage
from tests.engine.fakes import FakeCuda

pytestmark = pytest.mark.slow


def latents(prepared: Prepared, prompt: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    arguments = prepared.call | {"output_type": "latent", "return_dict": False, "generator": generator}
    return torch.as_tensor(prepared.pipe(**prepared.inputs[prompt] | arguments)[0])


@pytest.fixture
def put_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compile what a pipeline calls, and put the engines in its place."""

    def put(prepared: Prepared) -> list[Stage]:
        # Pipelines work where and in what their modules are; these graphs are in float32, for ONNX Runtime.
        monkeypatch.setattr(EngineModule, "device", torch.device("cpu"))
        monkeypatch.setattr(EngineModule, "dtype", torch.float32)
        recording = capture(prepared.pipe, prepared.inputs, tmp_path / "recording", call=prepared.call)
        stages = []
        for name in recording.components:
            component, group = recording.component(name), recording.groups(name)[0]
            arguments = recording.arguments(group.calls[0])
            path = tmp_path / name / "model.onnx"
            path.parent.mkdir()
            known = {parameter.name for parameter in component.parameters}
            traced = arguments | ({"return_dict": True} if "return_dict" in known else {})
            dense = export_module(prepared.pipe.components[name], traced, path)
            assert dense.output is not None
            s = set_stage(monkeypatch, LynxOnnx(path, path, (), (), ()), FakeCuda())
            call = recorded_call(component, group, arguments, dense.output, dense.baked)
            s.change(call=call.model_dump(), source={"config": component.config})
            setattr(prepared.pipe, name, lynx_compile.load(s.path))
            stages.append(s)
        return stages

    return put


# LTX-2's further kinds of guidance call the transformer with other constants: other graphs.
CHANGES = {
    "LTX2": {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
}


@pytest.mark.parametrize("name", ["Flux2", "LTX", "LTX2", "Wan22", "DiT", "HunyuanImage", "QwenImage"])
def test_a_pipeline_gives_what_torch_gives(name: str, put_engines: Any) -> None:
    prepared = prepare(name)
    prepared.call.update(CHANGES.get(name, {}))
    expected = [latents(prepared, prompt) for prompt in range(2)]
    stages = put_engines(prepared)
    assert len(stages) == (2 if name == "Wan22" else 1)
    for prompt in range(2):
        found = latents(prepared, prompt)
        torch.testing.assert_close(found, expected[prompt], rtol=1e-4, atol=1e-4)
    assert all("execute" in s.trt.log for s in stages)
    assert not torch.allclose(expected[0], expected[1])


def test_another_size_is_refused(put_engines: Any) -> None:
    prepared = prepare("LTX")
    put_engines(prepared)
    prepared.call["height"] = 128
    with pytest.raises(
        InputError, match=r"compiled for 'height' = \d+, and this call has \d+. Call it as it"
    ):
        latents(prepared)
