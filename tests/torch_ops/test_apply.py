# SPDX-License-Identifier: Apache-2.0
"""Compiled linears in a tiny FLUX on a CPU, against the same weights' ONNX file in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

import lynx_compile
from lynx_compile.engine.manifest import BackendVersion, EngineFile, Manifest, Plugin, Source, Weights
from lynx_compile.errors import InputError
from lynx_compile.files.digest import written
from lynx_compile.models.structure import find_structure
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.passes.compensate import load_weights, save_weights
from lynx_compile.passes.describe import _sparse
from lynx_compile.passes.export import DenseOnnx, export_module
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.passes.select import Decision, SparseGroup, SparsityPlan
from lynx_compile.torch_ops import apply as apply_module
from lynx_compile.torch_ops.modules import Fp8Linear
from lynx_compile.torch_ops.readers import Merged, Reader
from tests.conftest import TINY
from tests.passes.exact import fp8_plan, fp8_weights, pruned_weights

CONFIG = TINY | {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
}
FORMS = ("activation", "weight", "fp8 none", "fp8 weight", "fp8 activation")
SHA = "0" * 64


def arguments(side: int = 4, text: int = 8, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).half()

    ids = torch.zeros(side * side, 3)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    return {
        "hidden_states": normal(batch, side * side, CONFIG["in_channels"]),
        "encoder_hidden_states": normal(batch, text, CONFIG["joint_attention_dim"]),
        "pooled_projections": normal(batch, CONFIG["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5).half(),
        "guidance": torch.full((batch,), 3.5).half(),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


@dataclass(frozen=True)
class Case:
    module: FluxTransformer2DModel
    dense: DenseOnnx
    folder: Path

    def compiled(self, form: str) -> tuple[Path, LynxOnnx]:
        """The engine's name, with a manifest and weights in this form beside it."""
        folder = self.folder / form.replace(" ", "-")
        if not folder.exists():
            folder.mkdir()
            plan, weights = _solved(self.module, form, folder)
            lynx = rewrite(self.dense, plan, weights, folder / "flux.onnx", metadata_layout=90)
            _manifest(lynx).write(folder / "flux.json")
            self._made[form] = lynx
        return folder / "flux.engine", self._made[form]

    @property
    def _made(self) -> dict[str, LynxOnnx]:
        return _MADE

    def own(self) -> FluxTransformer2DModel:
        return copy.deepcopy(self.module)


_MADE: dict[str, LynxOnnx] = {}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    module = FluxTransformer2DModel(**CONFIG).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.2)
    module.half()
    folder = tmp_path_factory.mktemp("apply")
    _MADE.clear()
    return Case(module, export_module(module, arguments(), folder / "dense.onnx"), folder)


def _solved(module: nn.Module, form: str, folder: Path) -> tuple[SparsityPlan, list[Path]]:
    groups = find_structure(module, arguments()).groups
    if form.startswith("fp8 "):
        plan = fp8_plan(groups, lambda _: form.removeprefix("fp8 "))  # type: ignore[arg-type, return-value]
        return plan, fp8_weights(module, plan, folder)
    decisions, parts = [], []
    for group in groups:
        linears = tuple(linear for linear in group.linears if linear.refusal is None)
        decisions += [
            Decision(linear, form if linear in linears else "none", linear.refusal or "")  # type: ignore[arg-type]
            for linear in group.linears
        ]
        if linears:
            parts.append(SparseGroup(group.name, linears, group.tokens, form, calls=group.calls))  # type: ignore[arg-type]
    plan = SparsityPlan(tuple(decisions), tuple(parts))
    files = pruned_weights(module, plan, folder)
    if form == "weight":
        for file in files:
            solved = load_weights(file)
            weight = solved.weight[:, : solved.in_channels]
            save_weights(file, _replaced(solved, weight * keep_mask(weight)))
    return plan, files


def _replaced(solved: Any, weight: torch.Tensor) -> Any:
    import dataclasses

    return dataclasses.replace(
        solved, weight=weight, rank=0, lora_down=solved.lora_down[:1], operand="weight"
    )


def _manifest(lynx: LynxOnnx) -> Manifest:
    files = []
    for path in (lynx.path, lynx.weights_path):
        found = written(path)
        files.append(EngineFile(file=path.name, bytes=found.bytes, sha256=found.sha256))
    return Manifest(
        format_version=2, compiler="0", engine=EngineFile(file="flux.engine", bytes=0, sha256=SHA),
        backend=BackendVersion(name="tensorrt", version="11"), gpus=("sm90",),
        plugin=Plugin(names=(), version="1", namespace="lynx", library="x.so", sha256=SHA, embedded=False),
        plugin_layers=len(lynx.sparse), dtype="fp16", inputs=(), outputs=(),
        weights=Weights(mode="embedded", file=None, sha256=None, tensors=()), recipe_sha256=SHA,
        source=Source(model="m", subfolder="transformer", revision=None, family="FluxTransformer2DModel",
                      config={}, sha256=SHA),
        call=None, costs=None, sparse=tuple(map(_sparse, lynx.sparse)), dense=(), files=tuple(files),
    )  # fmt: skip


def run(module: Callable[..., Any], given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = module(**given, return_dict=False)[0]
    return output


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("form", FORMS)
def test_the_applied_model_is_the_lynx_onnx(flux: Case, form: str) -> None:
    engine, lynx = flux.compiled(form)
    module, given = flux.own(), arguments()
    before = run(module, given)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert lynx_compile.apply(module, engine) is module
    found = run(module, given)
    session = onnxruntime.InferenceSession(lynx.path, providers=["CPUExecutionProvider"])
    feed = {entry.name: given[entry.name].numpy() for entry in session.get_inputs()}
    wanted = torch.from_numpy(np.asarray(session.run(None, feed)[0]))
    # Both round to fp16, at other places; a value at the border then is pruned, or rounded to e4m3, the other way.
    limit = {"weight": 2**-7, "fp8 none": 2**-5, "fp8 weight": 2**-5}.get(form, 2**-3)
    error, lost = off(found, wanted), off(before, wanted)
    assert error < limit and (error < lost / 4 or form == "fp8 none")
    assert sum(isinstance(each, Reader) for each in module.modules()) == sum(
        len(node.linears) for node in lynx.sparse
    )
    assert len({id(each) for each in module.modules() if isinstance(each, Merged)}) == len(lynx.sparse)
    assert {node.activation for node in lynx.sparse} == {0, 1}
    assert run(module, arguments(side=6, text=3, batch=1)).shape == (1, 36, CONFIG["in_channels"])
    lynx_compile.restore(module)
    assert torch.equal(run(module, given), before)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert type(module).__name__ == "FluxTransformer2DModel" and not hasattr(module, apply_module.APPLIED)


def test_repeated_blocks_compile_whole(flux: Case) -> None:
    torch._dynamo.reset()
    module, given = flux.own(), arguments()
    lynx_compile.apply(module, flux.compiled("fp8 weight")[0])
    eager = run(module, given)
    module.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert off(run(module, given), eager) < 0.1
    lynx_compile.restore(module)
    assert torch.equal(run(module, given), run(flux.module, given))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_diffusers_moves_compiled_linears_in_groups(flux: Case, level: str) -> None:
    """From the CPU to the CPU, which is as far as it goes without a GPU: hooks are where they have to be."""
    module, given = flux.own(), arguments()
    lynx_compile.apply(module, flux.compiled("fp8 weight")[0])
    wanted = run(module, given)
    cpu, groups = torch.device("cpu"), {"num_blocks_per_group": 1} if level == "block_level" else {}
    module.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **groups)
    linears = [each for each in module.modules() if isinstance(each, Fp8Linear)]
    if level == "leaf_level":
        assert all(each._diffusers_hook.get_hook("group_offloading") is not None for each in linears)
    for _ in range(2):
        assert torch.equal(run(module, given), wanted)
    if level == "block_level":
        lynx_compile.restore(module)
        assert torch.equal(run(module, given), run(flux.module, given))
    later = flux.own()
    later.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **groups)
    with pytest.raises(InputError, match="apply first, then enable_group_offload"):
        lynx_compile.apply(later, flux.compiled("fp8 weight")[0])


def lora(module: FluxTransformer2DModel, *paths: str) -> dict[str, torch.Tensor]:
    """Of rank 4 and no small one, as files have it."""
    generator, found = torch.Generator().manual_seed(0), {}
    for path in paths:
        out_channels, channels = module.get_submodule(path).weight.shape
        found[f"transformer.{path}.lora_A.weight"] = torch.randn(4, channels, generator=generator) / 4
        found[f"transformer.{path}.lora_B.weight"] = torch.randn(out_channels, 4, generator=generator) / 4
    return found


def test_a_pipelines_own_lora_stays_beside_compiled_linears(flux: Case) -> None:
    pytest.importorskip("peft", reason="diffusers loads a LoRA through it")
    module, given, engine = flux.own(), arguments(), flux.compiled("weight")[0]
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, module)
    before = run(module, given)
    lynx_compile.apply(module, engine)
    compiled = run(module, given)
    adapted = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp"
    with pytest.raises(InputError, match="LoRA cannot be loaded.*restore, load the LoRA, and apply again"):
        pipe.load_lora_weights(lora(flux.module, *adapted))
    lynx_compile.restore(module)
    pipe.load_lora_weights(lora(module, *adapted))
    with_lora = run(module, given)
    lynx_compile.apply(module, engine)
    assert (
        off(run(module, given) - compiled, with_lora - before) < 0.5
    )  # it does to both models about the same
    layer, x = module.get_submodule(adapted[0]), torch.randn(3, CONFIG["attention_head_dim"] * 2).half()
    own = layer.lora_B["default_0"](layer.lora_A["default_0"](x.to(layer.lora_A["default_0"].weight.dtype)))
    assert isinstance(layer.base_layer, Reader)
    assert torch.allclose(layer(x), layer.base_layer(x) + layer.scaling["default_0"] * own.half(), atol=2e-2)
    pipe.disable_lora()
    assert off(run(module, given), compiled) < 2**-9  # but for the GELU, which follows y's rounding now
    with pytest.raises(InputError, match="LoRA cannot be loaded"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert off(run(module, given), compiled) < 2**-9
    lynx_compile.restore(module)
    assert torch.equal(run(module, given), before)
    pipe.load_lora_weights(lora(module, *adapted))
    pipe.fuse_lora()
    with pytest.raises(InputError, match="fused into the module's linears.*unfuse_lora"):
        lynx_compile.apply(module, engine)


def test_what_cannot_be_applied_is_said_and_nothing_is_changed(flux: Case, tmp_path: Path) -> None:
    engine, lynx = flux.compiled("weight")
    module = flux.own()
    with pytest.raises(InputError, match="no compiled linears"):
        lynx_compile.restore(module)
    with pytest.raises(InputError, match="computes in fp16.*torch.float32"):
        lynx_compile.apply(flux.own().float(), engine)
    with pytest.raises(InputError, match="compiled from FluxTransformer2DModel, and the module is Linear"):
        lynx_compile.apply(nn.Linear(2, 2), engine)
    other = FluxTransformer2DModel(**CONFIG | {"num_single_layers": 0}).half()
    with pytest.raises(InputError, match=r"single_transformer_blocks.0.* is none"):
        lynx_compile.apply(other, engine)
    fused = flux.own()
    fused.fuse_qkv_projections()
    with pytest.raises(InputError, match="projections are fused"):
        lynx_compile.apply(fused, engine)
    damaged = tmp_path / "flux.safetensors"
    tensors = load_file(lynx.weights_path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("values")}, damaged)
    _manifest(LynxOnnx(lynx.path, damaged, (), lynx.sparse, ())).write(tmp_path / "flux.json")
    with pytest.raises(InputError, match="holds no tensor"):
        lynx_compile.apply(module, tmp_path / "flux.engine")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(InputError, match="not the file that the manifest"):
        lynx_compile.apply(module, tmp_path / "flux.engine")
    assert not any(isinstance(each, Reader) for each in module.modules())
    assert torch.equal(run(module, arguments()), run(flux.module, arguments()))


def test_what_was_not_kept_is_not_restored(flux: Case) -> None:
    module = flux.own()
    lynx_compile.apply(module, flux.compiled("weight")[0], restorable=False)
    with pytest.raises(InputError, match="compiled linears in this module already"):
        lynx_compile.apply(module, flux.compiled("weight")[0])
    with pytest.raises(InputError, match="were not kept"):
        lynx_compile.restore(module)
