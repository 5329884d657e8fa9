# SPDX-License-Identifier: Apache-2.0
"""Any transformer's call through the engine module: nested, positional, padded, with constants; against torch."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

import lynx_compile
from lynx_compile.engine import module as module_file
from lynx_compile.engine.arguments import bind, flatten, parameters, unflatten
from lynx_compile.engine.calls import result_of
from lynx_compile.engine.manifest import Fixed, Padding
from lynx_compile.engine.module import EngineModule, digest_of
from lynx_compile.errors import EngineError, InputError
from lynx_compile.models.calls import call_of
from lynx_compile.passes.export import export_module
from lynx_compile.passes.rewrite import LynxOnnx
from tests.engine.conftest import Stage, set_stage
from tests.engine.fakes import FakeCuda

TEXT = 6  # the length that is compiled


class Nested(torch.nn.Module):
    """Images as a list, text with a mask, a dict, a table in tuples, constants: what pipelines give, in small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4)

    def forward(
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        text: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        added: Mapping[str, torch.Tensor | None] | None = None,
        rotary: tuple[torch.Tensor, ...] | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
        scale: float = 1.0,
        return_dict: bool = True,
    ) -> Any:
        weight = torch.ones_like(text[..., :1]) if mask is None else mask[..., None].to(text.dtype)
        mean = (text * weight).sum(1) / weight.sum(1)
        out = [
            scale * self.linear(image) + mean[i] + t[i] + rotary[0] - rotary[1] + added["size"][i]
            for i, image in enumerate(x)
        ]
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def arguments(text: int = TEXT, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    made = {
        "x": [torch.randn(3, 4), torch.randn(5, 4)],
        "t": torch.tensor([999, 20]),
        "text": torch.randn(2, text, 4),
        "mask": torch.ones(2, text, dtype=torch.bool),
        "added": {"size": torch.randn(2, 4), "aspect": None},
        "rotary": (torch.randn(4), torch.randn(4)),
        "shapes": [[1, 8, 8], [1, 4, 8]],
    }
    made["mask"][1, text - 2 :] = False
    return made | changes


Compile = Callable[..., tuple[EngineModule, Stage]]
Exported = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Each module's call is exported once: its ONNX file and the structure of its result."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def export(module: torch.nn.Module, given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        flat = flatten(given)
        types = {name: (t.dtype, t.shape) for name, t in flat.tensors.items()}
        key = f"{type(module).__qualname__} {types} {flat.constants}"
        if key not in made:
            path = folder / f"{len(made)}.onnx"
            made[key] = path, to_onnx(module.eval(), given, path)
        return made[key]

    return export


@pytest.fixture
def engine_of(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """A module and one of its calls as an engine on the stand-ins."""

    def make(
        module: torch.nn.Module,
        given: Mapping[str, Any],
        padding: Sequence[Padding] = (),
        fixed: Sequence[Fixed] = (),
        config: Mapping[str, Any] | None = None,
    ) -> tuple[EngineModule, Stage]:
        original, result = exported(module, given)
        path = Path(shutil.copy(original, tmp_path))
        s = set_stage(monkeypatch, LynxOnnx(path, path, (), (), ()), FakeCuda())
        kind = f"{type(module).__module__}:{type(module).__qualname__}"
        changes = {"padding": tuple(padding), "fixed": tuple(fixed)}
        call = call_of(kind, type(module).forward, given, result).model_copy(update=changes)
        s.change(call=call.model_dump(), source={"config": dict(config or {})})
        return lynx_compile.load(s.path), s

    return make


def to_onnx(module: torch.nn.Module, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Export one call with flat inputs and outputs; returns the result's structure."""
    known = parameters(type(module).forward)
    bound = bind(known, (), given)
    whole = {"return_dict": True} if "return_dict" in bound else {}
    flat = flatten(bound | whole)
    structure: dict[str, Any] = {}

    module.eval()

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            nested = unflatten(flat.structure, dict(zip(flat.tensors, tensors, strict=True)))
            result = flatten(self.module(**nested), "output")
            structure.update(result.structure)
            return tuple(result.tensors.values())

    result = flatten(module(**unflatten(flat.structure, flat.tensors)), "output")
    program = torch.onnx.export(
        Flat().eval(), tuple(flat.tensors.values()), dynamo=True, opset_version=18, verbose=False,
        input_names=list(flat.tensors), output_names=list(result.tensors),
    )  # fmt: skip
    assert program is not None
    program.save(path)
    return result.structure


PADDING = [Padding(tensor="text", axis=1, mask="mask"), Padding(tensor="mask", axis=1, mask="mask")]


@pytest.fixture
def nested(engine_of: Compile) -> tuple[EngineModule, torch.nn.Module, Stage]:
    module = Nested().eval().requires_grad_(False)
    return *(made := engine_of(module, arguments(), PADDING))[:1], module, made[1]


Pair = tuple[EngineModule, Nested, Stage]


def assert_same(found: Any, expected: Any) -> None:
    a, b = flatten(found, "output"), flatten(expected, "output")
    assert a.structure == b.structure
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(tensor, b.tensors[name], rtol=1e-5, atol=1e-5)


def test_nested_arguments(nested: Pair) -> None:
    engine, module, s = nested
    names = [tensor.name for tensor in engine.engine.inputs]
    assert names == ["x.0", "x.1", "t", "text", "mask", "added.size", "rotary.0", "rotary.1"]
    assert_same(engine(**arguments()), module(**arguments()))
    other = {"x": [torch.randn(3, 4), torch.randn(5, 4)], "t": torch.tensor([1, 2])}
    assert_same(engine(**arguments() | other), module(**arguments() | other))
    engine.close()
    assert s.cuda.leaks() == []


def test_arguments_by_position_and_by_default(nested: Pair) -> None:
    engine, module, _ = nested
    given = arguments()
    expected = module(**given)
    by_position = [given.pop(name) for name in ("x", "t", "text")]
    assert_same(engine(*by_position, **given), expected)
    assert_same(engine(*by_position, **given, scale=1), expected)


def test_forms_of_a_result(nested: Pair) -> None:
    engine, module, _ = nested
    given = arguments()
    assert isinstance(engine(**given), Transformer2DModelOutput)
    assert isinstance(engine(**given).sample, list)
    assert_same(engine(**given, return_dict=True), module(**given, return_dict=True))
    assert_same(engine(**given, return_dict=False), module(**given, return_dict=False))


@pytest.mark.parametrize("length", [1, 3, TEXT])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_shorter_text_is_padded_with_its_mask(engine_of: Compile, length: int, dtype: torch.dtype) -> None:
    module = Nested().eval().requires_grad_(False)
    compiled = arguments()
    engine, _ = engine_of(module, compiled | {"mask": compiled["mask"].to(dtype)}, PADDING)
    given = arguments(length)
    given["mask"] = torch.ones(2, length, dtype=dtype)
    assert_same(engine(**given), module(**given))


def test_without_a_mask_all_text_counts(nested: Pair) -> None:
    engine, module, _ = nested
    for length in (3, TEXT):
        given = arguments(length, mask=None)
        assert_same(engine(**given), module(**given))


class AddedMask(torch.nn.Module):
    """A mask that is added to the attention, as some pipelines make it."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (x * (x[..., 0] + attention_mask).softmax(-1)[..., None]).sum(1)


def test_a_mask_that_is_added(engine_of: Compile) -> None:
    padding = [Padding(tensor=name, axis=1, mask="attention_mask") for name in ("x", "attention_mask")]
    given = {"x": torch.randn(2, TEXT, 4), "attention_mask": torch.zeros(2, TEXT)}
    engine, _ = engine_of(AddedMask(), given, padding)
    shorter = {"x": torch.randn(2, 4, 4), "attention_mask": torch.tensor([[0.0, 0, 0, -1e4], [0, 0, 0, 0]])}
    torch.testing.assert_close(engine(**shorter), AddedMask()(**shorter))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(2, 7, 4), "mask": torch.ones(2, 7) > 0}, "'text' has 7 entries, and .* at most 6. Sho"),
        ({"shapes": [[1, 8, 8], [1, 4, 16]]}, "'shapes.1.2' = 8, and this call has 16. Call it as it was recorded"),
        ({"shapes": [[1, 8, 8]]}, "'shapes.1.0' = 1, and this call has None"),
        ({"scale": 2.0}, r"'scale' = 1.0, and this call has 2.0"),
        ({"scale": True}, r"'scale' = 1.0, and this call has True"),
        ({"x": [torch.zeros(3, 4)]}, r"'x.1' = a tensor, and this call has None"),
        ({"x": [torch.zeros(3, 4)] * 3}, r"'x.2' = None, and this call has a tensor"),
        ({"added": None}, r"'added.size' = a tensor, and this call has None"),
        ({"added": {"size": torch.zeros(2, 4), "aspect": torch.zeros(2)}}, "'added.aspect' = None, and this"),
        ({"t": torch.tensor([0.5, 0.25])}, "'t' is float32, and the engine was compiled for int64. Use the scheduler"),
        ({"t": 999}, "'t' = a tensor, and this call has 999"),
        ({"x": [torch.zeros(3, 4), torch.zeros(4, 4)]}, r"'x.1' is fp32 \[4, 4\], and the engine has fp32 \[5, 4\]"),
        ({"added": object()}, "'added' is a builtins.object: a Python object, which no graph takes"),
    ],
)  # fmt: skip
def test_what_is_refused(nested: Pair, change: dict[str, Any], message: str) -> None:
    engine, _, s = nested
    with pytest.raises(InputError, match=message):
        engine(**arguments() | change)
    assert "execute" not in s.trt.log


def test_what_the_graph_fixes(engine_of: Compile) -> None:
    """The model's own line decides on the mask: only the compiled one is right. It is read once, not in every step."""
    module, given = Nested().eval().requires_grad_(False), arguments()
    fixed = [Fixed(tensor="mask", sha256=digest_of(given["mask"]), where="model.py:7")]
    engine, s = engine_of(module, given, PADDING, fixed)
    assert_same(engine(**given), module(**given))
    other = arguments()
    other["mask"][0, 0] = False
    message = (
        "'mask' is not that of the compiled call, which model.py:7 decides on: .* Call it as it was recorded"
    )
    with pytest.raises(InputError, match=message):
        engine(**other)
    other["mask"][0, 0] = True
    assert_same(engine(**other), module(**other))
    other["mask"][0, 0] = False  # in place
    with pytest.raises(InputError, match=message):
        engine(**other)
    with pytest.raises(InputError, match=message):
        engine(**arguments(mask=None))
    assert s.trt.log.count("execute") == 2


def test_fixed_tensors_are_read_once(engine_of: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    fixed = [Fixed(tensor="mask", sha256=digest_of(given["mask"]), where="model.py:7")]
    engine, _ = engine_of(Nested().eval().requires_grad_(False), given, (), fixed)
    read: list[torch.Tensor] = []
    monkeypatch.setattr(module_file, "digest_of", lambda value: read.append(value) or digest_of(value))
    for _ in range(3):
        engine(**given)
    assert len(read) == 1


def test_an_absent_dict_is_none(engine_of: Compile) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, more: Any = None, less: Any = ()) -> torch.Tensor:
            return x * 2

    engine, _ = engine_of(Module(), {"x": torch.ones(2)})
    for given in ({"more": {}}, {"more": []}, {"less": None}, {"less": []}):
        assert engine(torch.ones(2), **given).tolist() == [2, 2]


def test_numbers_of_other_widths(nested: Pair) -> None:
    engine, module, _ = nested
    given = arguments()
    expected = module(**given)
    assert_same(engine(**given | {"t": given["t"].int(), "mask": given["mask"].long()}), expected)
    halves = [image.bfloat16() for image in given["x"]]
    found = engine(**given | {"x": halves}).sample
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}, "what the pipeline computes in"
    torch.testing.assert_close(found[0].float(), expected.sample[0], rtol=0.02, atol=0.02)


class Rotated(torch.nn.Module):
    def forward(self, x: torch.Tensor, rotary: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * rotary).flatten(-2) * scale


def test_complex_numbers_are_pairs_and_float64_is_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = Rotated().eval(), tmp_path / "dense.onnx"
    rotary, scale = torch.randn(5, 2, dtype=torch.complex64), torch.rand(1, dtype=torch.float64)
    given = {"x": torch.randn(1, 5, 4), "rotary": rotary, "scale": scale}
    dense = export_module(module, given, path)
    assert dense.output is not None
    s = set_stage(monkeypatch, LynxOnnx(path, path, (), (), ()), FakeCuda())
    call = call_of(f"{__name__}:Rotated", Rotated.forward, given, dense.output)
    s.change(call=call.model_dump(), source={"config": {}})
    engine = lynx_compile.load(s.path)
    assert {t.name: (t.dtype, t.shape) for t in engine.engine.inputs} == {
        "x": ("fp32", (1, 5, 4)), "rotary": ("fp32", (5, 2, 2)), "scale": ("fp32", (1,)),
    }  # fmt: skip
    other = given | {"rotary": torch.randn(5, 2, dtype=torch.complex64)}
    torch.testing.assert_close(engine(**other), module(**other).float())


def test_expanded_inputs_are_copied(nested: Pair) -> None:
    engine, module, _ = nested
    given = arguments(t=torch.tensor([7]).expand(2), rotary=(torch.tensor([2.0]).expand(4), torch.zeros(4)))
    assert_same(engine(**given), module(**given))


class Two(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        return AudioVisualModelOutput(sample=x + 1, audio_sample=x * 2) if return_dict else (x + 1, x * 2)


class WithNone(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return [x, None, (x + 1, {"y": x - 1})]


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_pair(engine_of: Compile, return_dict: bool) -> None:
    x = torch.randn(2, 3)
    engine, _ = engine_of(Two(), {"x": x})
    assert_same(engine(x, return_dict=return_dict), Two()(x, return_dict=return_dict))


def test_a_nested_result(engine_of: Compile) -> None:
    x = torch.randn(2, 3)
    engine, _ = engine_of(WithNone(), {"x": x})
    assert_same(engine(x), WithNone()(x))


def test_a_result_whose_class_is_gone(nested: Pair) -> None:
    engine, *_ = nested
    for name in ("diffusers.models.modeling_outputs:Gone", "subprocess:Popen", "diffusers.gone:Output"):
        result = engine._ways[0].call.result | {"dataclass": name}
        engine._ways[0].call = engine._ways[0].call.model_copy(update={"result": result})
        with pytest.raises(InputError, match=f"The result's class {name} is not imported"):
            engine(**arguments())
        assert isinstance(engine(**arguments(), return_dict=False)[0], list)


def test_a_tuple_where_a_dataclass_is_asked_for(nested: Pair) -> None:
    engine, *_ = nested
    result = {"tuple": [node for _, node in engine._ways[0].call.result["fields"]]}
    engine._ways[0].call = engine._ways[0].call.model_copy(update={"result": result})
    with pytest.raises(InputError, match="returns no dataclass. Call it with return_dict=False"):
        engine(**arguments())
    assert isinstance(engine(**arguments(), return_dict=False), tuple)


# What pipelines ask beside running it.

LTX2 = {
    "in_channels": 4, "out_channels": 4, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 2,
    "attention_head_dim": 8, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2,
    "caption_channels": 16, "rope_double_precision": False,
}  # fmt: skip


def of_class(engine: EngineModule, kind: type, config: Mapping[str, Any]) -> EngineModule:
    engine._class = type(engine._class)(f"{kind.__module__}:{kind.__name__}", config, torch.device("meta"))
    return engine


def test_a_part_without_weights(nested: Pair) -> None:
    """LTX-2's pipelines call the transformer's rope themselves."""
    kind = diffusers.LTX2VideoTransformer3DModel
    known = inspect.signature(kind.__init__).parameters
    config = {name: value for name, value in LTX2.items() if name in known}
    engine = of_class(nested[0], kind, config)
    arguments = {
        "batch_size": 1,
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "device": torch.device("cpu"),
        "fps": 24.0,
    }
    expected = kind(**config).rope.prepare_video_coords(**arguments)
    assert torch.equal(engine.rope.prepare_video_coords(**arguments), expected)


def test_sizes_and_numbers_of_blocks(nested: Pair) -> None:
    config = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16}
    engine = of_class(nested[0], diffusers.FluxTransformer2DModel, config)
    assert engine.inner_dim == 16
    assert len(engine.transformer_blocks) == 3
    with pytest.raises(TypeError):
        list(engine.transformer_blocks)


@pytest.mark.parametrize(
    "name", ["x_embedder", "set_attn_processor", "load_lora_adapter", "enable_cache", "nothing"]
)
def test_what_only_the_torch_model_has(nested: Pair, name: str) -> None:
    engine = of_class(nested[0], diffusers.FluxTransformer2DModel, {"num_layers": 1})
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match=f"no '{name}'. Adapters, caches, attention processors"):
        getattr(engine, name)


def test_probing_makes_no_model(nested: Pair) -> None:
    engine = of_class(nested[0], diffusers.FluxTransformer2DModel, {"num_layers": 1})
    for name in ("is_loaded_in_8bit", "hf_quantizer", "peft_config", "_hf_hook", "quantization_method"):
        assert not hasattr(engine, name)
    assert engine._class._model is None


def test_a_class_that_cannot_be_made(nested: Pair) -> None:
    engine = of_class(nested[0], diffusers.FluxTransformer2DModel, {"axes_dims_rope": 3, "num_layers": "x"})
    with pytest.raises(AttributeError, match="Its class cannot be made"):
        _ = engine.inner_dim


def test_configuration(engine_of: Compile) -> None:
    engine, _ = engine_of(Two(), {"x": torch.ones(2)}, config={"in_channels": 4, "patch_size": [1, 2, 2]})
    config = engine.config
    assert config.in_channels == 4 and config["patch_size"] == [1, 2, 2] and "in_channels" in config
    assert getattr(config, "guidance_embeds", False) is False
    assert dict(**config) == {"in_channels": 4, "patch_size": [1, 2, 2]}
    with engine.cache_context("cond", step_index=0):
        assert not engine.is_cache_enabled


def test_several_ways(engine_of: Compile, tmp_path: Path) -> None:
    """Each call runs in the first engine that serves it; one that none serves names all the reasons."""

    class Guided(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
            return x * (scale or 1.0)

    (one, _), (other, _) = (
        engine_of(Guided(), {"x": torch.ones(2), "scale": scale}) for scale in (None, 3.0)
    )
    both = EngineModule((one.engine, other.engine))
    assert both(torch.ones(2)).tolist() == [1, 1]
    assert both(torch.ones(2), scale=3.0).tolist() == [3, 3]
    with pytest.raises(
        InputError, match=r"No engine serves this call. .*'scale' = None, and .* 'scale' = 3.0, and"
    ):
        both(torch.ones(2), scale=2.0)
    both.close()
    for closed in (one, other):
        with pytest.raises(EngineError, match="closed"):
            closed(torch.ones(2), scale=3.0 if closed is other else None)


def test_engines_of_two_models_are_not_loaded_together(engine_of: Compile, tmp_path: Path) -> None:
    _, stage = engine_of(Nested().eval(), arguments())
    assert len(lynx_compile.load(stage.path, stage.path).engines) == 2
    copy = tmp_path / "copy"
    shutil.copytree(stage.path.parent, copy, ignore=shutil.ignore_patterns("copy"))
    values = json.loads((copy / stage.manifest.name).read_text())
    values["source"]["sha256"] = "ef" * 32
    (copy / stage.manifest.name).write_text(json.dumps(values))
    with pytest.raises(InputError, match="copy.* is not of the model that"):
        lynx_compile.load(stage.path, copy / stage.path.name)


def test_a_tuple_has_as_many_values_as_the_transformers_own() -> None:
    """Some classes return their None fields in a tuple (Cosmos 3), others leave them out (FLUX.2)."""
    none = {"constant": None}
    structure = {"dataclass": "diffusers.x:Output", "fields": [["sample", {"tensor": "s"}], ["sound", none]]}
    assert result_of(structure, {"s": 1}, False, 2) == (1, None)
    assert result_of(structure, {"s": 1}, False, 1) == result_of(structure, {"s": 1}, False) == (1,)


def test_its_forward_has_the_transformers_parameters(nested: Pair) -> None:
    engine, module, _ = nested
    known = inspect.signature(module.forward).parameters
    assert [*inspect.signature(engine.forward).parameters] == [*known]
    assert inspect.signature(engine.forward).parameters["rotary"].default == known["rotary"].default
