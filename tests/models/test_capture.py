# SPDX-License-Identifier: Apache-2.0
"""Real pipelines of diffusers around tiny transformers, and one odd pipeline for what those do not do."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusion3PAGPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors import safe_open
from torch.utils._pytree import tree_map_only

from lynx_compile.engine.arguments import flatten, spread
from lynx_compile.errors import InputError, StageError
from lynx_compile.models import recording
from lynx_compile.models.capture import capture
from lynx_compile.models.recording import Recording
from lynx_compile.tools.support import pipelines
from lynx_compile.tools.support.pipelines import Prepared


def record(prepared: Prepared, folder: Path, **more: Any) -> Recording:
    return capture(prepared.pipe, prepared.inputs, folder, call=prepared.call, **more)


def outputs(found: Recording, component: str, module: Any, order: int = 1) -> list[dict[str, torch.Tensor]]:
    results = []
    for call in found.calls(component)[::order]:
        args, kwargs = spread(found.component(component).parameters, found.arguments(call))
        with torch.no_grad():
            results.append(flatten(module(*args, **kwargs), "output").tensors)
    return results[::order]


@contextmanager
def as_kept(module: torch.nn.Module) -> Iterator[None]:
    """The module is given tensors as a recording keeps them: kernels may round by strides, which are not kept."""

    def before(m: Any, args: Any, kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.Tensor.contiguous, (args, kwargs))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched(module: torch.nn.Module) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The module's own outputs, while a pipeline runs it."""
    seen: list[dict[str, torch.Tensor]] = []

    def after(m: Any, args: Any, result: Any) -> None:
        seen.append({k: v.clone() for k, v in flatten(result, "output").tensors.items()})

    handle = module.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def blobs(folder: Path) -> int:
    count = 0
    for path in (folder / "samples").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += len(file.keys())
    return count


REFUSED = {
    "GlmImage": "'kv_caches' is a .*GlmImageKVCache: a cache that the model reads",
    "Flux2KleinKV": "'kv_cache' is a .*Flux2KVCache: a cache that the model reads",
    "AnyFlowFAR": "'attention_mask' is a .*BlockMask: a mask of flex_attention",
}
LARGE = ("QwenImageEditPlus", "JoyImageEditPlus")  # they enlarge every image to a megapixel
AT_NIGHT = ("QwenImageEdit", "JoyImageEdit", "Kandinsky6SR")  # large too; FluxKontext edits an image by day
DIFFERENT = (  # from each other; the rest take a minute together
    "Flux", "FluxControlNet", "Flux3", "QwenImage", "ZImage", "SD3", "Sana", "PixArtSigma", "CogView4", "DiT",
    "Lumina2", "Ideogram4", "KandinskyPrior", "Wan22", "LTX2", "HunyuanVideo", "AceStep",
)  # fmt: skip


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if name in DIFFERENT:
        return []
    return [pytest.mark.slow, pytest.mark.nightly] if name in AT_NIGHT else [pytest.mark.slow]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=_marks(name))
        for name in pipelines.PIPELINES
        if name not in REFUSED and name not in LARGE
    ],
)
def test_a_replay_is_the_pipeline_bit_for_bit(name: str, tmp_path: Path) -> None:
    prepared = pipelines.prepare(name)
    components = list(pipelines.PIPELINES[name].transformers)
    first = prepared.pipe.components[components[0]]
    with as_kept(first), watched(first) as seen:
        found = record(prepared, tmp_path / "one")
    assert list(found.components) == components
    for component in components:
        module = prepared.pipe.components[component]
        forwards = outputs(found, component, module)
        assert forwards and all(any(t.any() for t in result.values()) for result in forwards)
        assert same(forwards, outputs(found, component, module, -1))
        if component == components[0]:
            assert same(forwards, seen)
    anew = pipelines.prepare(name)
    with as_kept(anew.pipe.components[components[0]]):
        again = record(anew, tmp_path / "two")
    assert files(found.folder) == files(again.folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_takes_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"Of 'transformer', {REFUSED[name]}"):
        record(pipelines.prepare(name), tmp_path)


def test_a_cache_that_can_be_switched_off_says_how(tmp_path: Path) -> None:
    prepared = pipelines.prepare("QwenImage21")
    with pytest.raises(
        InputError, match=r"QwenImage21KVCache: a cache .* Set 'use_kv_cache: false' under 'call:'"
    ):
        capture(prepared.pipe, prepared.inputs, tmp_path, call=prepared.call | {"use_kv_cache": True})


def test_a_controlnet_is_a_component_of_its_own(tmp_path: Path) -> None:
    found = record(pipelines.prepare("FluxControlNet"), tmp_path)
    assert {name: len(found.calls(name)) for name in found.components} == {"transformer": 12, "controlnet": 6}
    first, second, later = (call.blobs for call in found.calls("transformer")[:3])
    residual = "controlnet_block_samples.0"
    assert (
        first[residual] == second[residual] != later[residual]
    )  # one for both branches, another at each step
    shared = record(
        pipelines.prepare("ZImageControlNet"), tmp_path / "shared"
    )  # shares modules with its transformer
    assert {name: len(shared.calls(name)) for name in shared.components} == {
        "transformer": 6,
        "controlnet": 6,
    }


def test_the_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux")

    def images() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return prepared.pipe(
            **prepared.inputs[0], **prepared.call, generator=generator, output_type="latent"
        ).images

    before, attributes = images(), dir(prepared.pipe.transformer)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    record(prepared, tmp_path)
    assert torch.equal(before, images())
    assert dir(prepared.pipe.transformer) == attributes
    assert torch.equal(state, torch.get_rng_state())
    assert "cache_context" not in vars(prepared.pipe.transformer)


def test_steps_branches_and_shared_conditioning(tmp_path: Path) -> None:
    found = record(pipelines.prepare("QwenImage"), tmp_path)
    calls = found.calls("transformer")
    assert [(c.sample, c.step, c.branch) for c in calls[:4]] == [
        (0, 0, "cond"),
        (0, 0, "uncond"),
        (0, 1, "cond"),
        (0, 1, "uncond"),
    ]
    assert [c.sample for c in calls] == [0] * 6 + [1] * 6
    cond, uncond, later = calls[0].blobs, calls[1].blobs, calls[2].blobs
    assert cond["hidden_states"] == uncond["hidden_states"] != later["hidden_states"]
    assert cond["encoder_hidden_states"] == later["encoder_hidden_states"] != uncond["encoder_hidden_states"]
    # 3 latents and 2 text states a sample; 3 timesteps in all; masks of 12, 7 and 5 tokens.
    assert blobs(tmp_path) == 2 * (3 + 2) + 3 + len(
        {str(c.blobs.get("encoder_hidden_states_mask")) for c in calls}
    )


def test_a_step_without_the_pipelines_help_is_a_new_time(tmp_path: Path) -> None:
    found = record(pipelines.prepare("PixArtSigma"), tmp_path)  # it has no callback_on_step_end
    assert [(c.step, c.branch) for c in found.calls("transformer")] == [(0, "0"), (1, "0"), (2, "0")] * 2


def test_axes_that_vary_say_whether_a_mask_covers_them(tmp_path: Path) -> None:
    qwen = record(pipelines.prepare("QwenImage"), tmp_path / "qwen").groups("transformer")
    assert len(qwen) == 1
    axes = {(a.tensor, a.axis): (a.smallest, a.largest, a.mask, a.symbol) for a in qwen[0].axes}
    mask = "encoder_hidden_states_mask"
    assert axes == {("encoder_hidden_states", 1): (5, 12, mask, "s0"), (mask, 1): (5, 12, mask, "s0")}
    z_image = record(pipelines.prepare("ZImage"), tmp_path / "z").groups("transformer")[0]
    assert [(a.tensor, a.axis, a.smallest, a.largest, a.mask) for a in z_image.axes] == [
        ("cap_feats.0", 0, 7, 12, None)
    ]


def test_guidance_that_stops_midway_is_two_graphs(tmp_path: Path) -> None:
    prepared = pipelines.prepare("ZImage")
    prepared.call["cfg_truncation"] = 0.5
    found = record(prepared, tmp_path)
    groups = found.groups("transformer")
    assert [len(flatten(found.example("transformer", g.index)).tensors) for g in groups] == [5, 3]
    assert sum(len(g.calls) for g in groups) == 6
    assert any("differs from graph 0: 'x.1' is missing" in line for line in found.describe())


def test_two_networks_with_a_boundary(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Wan22")
    found = record(prepared, tmp_path / "both")
    assert {name: len(found.calls(name)) for name in found.components} == {
        "transformer": 4,
        "transformer_2": 8,
    }
    prepared.pipe.register_to_config(boundary_ratio=0.01)
    with pytest.raises(InputError, match="never called 'transformer_2' in this run"):
        record(prepared, tmp_path / "short")
    found = record(prepared, tmp_path / "named", components=["transformer"])
    assert found.components == ("transformer",)


def test_prompts_in_one_batch(tmp_path: Path) -> None:
    found = record(pipelines.prepare("Flux"), tmp_path, batch=2)
    shapes = {
        flatten(found.arguments(call)).tensors["encoder_hidden_states"].shape
        for call in found.calls("transformer")
    }
    assert shapes == {(2, 12, 32)}
    assert (found.header.samples, found.component("transformer").returns) == (1, 1)
    prepared = pipelines.prepare("ZImage")
    prepared = Prepared(prepared.pipe, [*prepared.inputs, prepared.inputs[0]], prepared.call)
    found = record(prepared, tmp_path / "lists", batch=2)  # of 3 prompts, the first fills the second run
    sizes = [found.signature(call).shapes for call in found.calls("transformer")]
    assert sizes[0]["cap_feats.1"] == (7, 32) and sizes[3]["cap_feats.0"] == sizes[3]["cap_feats.1"] == (
        12,
        32,
    )


def test_few_states_of_every_prompt(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux")
    prepared = Prepared(prepared.pipe, [*prepared.inputs] * 4, prepared.call)
    found = record(prepared, tmp_path / "two", states_per_prompt=2)
    counts = [sum(c.sample == i for c in found.calls("transformer")) for i in range(8)]
    assert counts == [2] * 8
    (group,) = found.groups("transformer")
    last = [max(c.index for c in found.calls("transformer") if c.sample == i) for i in range(1, 8)]
    made = [2 * (index // 2 + 1) for index in last]  # two calls to a step
    assert group.calls_made == 6 + sum(made) < 8 * 6, (
        "all runs but the first end with the step of the last call kept"
    )
    assert len({c.index for c in found.calls("transformer")}) == 6  # another draw for every prompt
    whole = record(prepared, tmp_path / "all")
    every = {(c.sample, c.index): c.blobs for c in whole.calls("transformer")}
    assert all(every[c.sample, c.index] == c.blobs for c in found.calls("transformer"))
    other = record(prepared, tmp_path / "other", states_per_prompt=2, seed=1)
    assert [c.index for c in other.calls("transformer")] != [c.index for c in found.calls("transformer")]


def test_runs_that_are_held_out_stand_apart(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux")
    found = record(prepared, tmp_path, held_out=prepared.inputs[:1])
    assert found.header.samples == 3 and found.header.held_out == (2,)
    calls = found.calls("transformer")
    assert [calls[n].sample for n in sorted(found.held_out(calls))] == [2] * 6
    first, last = (next(c for c in calls if c.sample == i) for i in (0, 2))
    assert first.blobs["encoder_hidden_states"] == last.blobs["encoder_hidden_states"], "the same prompt"
    assert first.blobs["hidden_states"] != last.blobs["hidden_states"], "and other noise"
    with watched(prepared.pipe.transformer) as seen:
        record(prepared, tmp_path, held_out=prepared.inputs[1:])
    assert seen, "another recording"


def test_without_runs_kept_apart_every_eighth_is(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux")
    found = record(prepared, tmp_path, states_per_prompt=3)
    calls = found.calls("transformer")
    assert found.held_out(calls) == {3, 4, 5}, "the last sample's"
    assert found.held_out(calls[:3]) == {2}
    assert found.held_out(calls[:1]) == {0}
    many = [replace(calls[0], sample=number) for number in range(20)]
    assert found.held_out(many) == {7, 15}


def test_few_states_show_every_graph(tmp_path: Path) -> None:
    prepared = pipelines.prepare("ZImage")
    prepared.call.update(cfg_truncation=0.5, num_inference_steps=6)
    found = record(prepared, tmp_path, states_per_prompt=1)
    assert all(group.calls for group in found.groups("transformer"))
    assert [c.sample for c in found.calls("transformer")] == [0, 0, 1]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Wan22")
    prepared = Prepared(prepared.pipe, [*prepared.inputs, *prepared.inputs], prepared.call)
    whole = record(prepared, tmp_path / "whole", states_per_prompt=2)
    child = os.fork()
    if not child:  # the child is killed in the middle of its third prompt
        runs = []

        def before(module: Any, args: Any) -> None:
            runs.append(len(runs))
            if len(runs) == 2 * 2 + 1:
                os.kill(os.getpid(), signal.SIGKILL)

        prepared.pipe.transformer.register_forward_pre_hook(before)
        record(prepared, tmp_path / "part", states_per_prompt=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(InputError, match="incomplete: 2 of 4 samples"):
        recording.load(tmp_path / "part")
    with watched(prepared.pipe.transformer_2) as seen:
        record(prepared, tmp_path / "part", states_per_prompt=2)
    assert len(seen) == 2 * 4
    assert files(tmp_path / "part") == files(whole.folder)


def test_another_seed_or_prompt_is_another_recording(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux")
    record(prepared, tmp_path)
    for change in ({"seed": 1}, {"batch": 2}, {"model_digest": "other"}):
        with watched(prepared.pipe.transformer) as seen:
            record(prepared, tmp_path, **change)
        assert seen, change
    with watched(prepared.pipe.transformer) as seen:
        record(prepared, tmp_path, model_digest="other")  # the same as last
    assert not seen


def test_a_recording_is_read_without_its_pipeline(tmp_path: Path) -> None:
    found = record(pipelines.prepare("Flux"), tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    moved = recording.load(tmp_path / "elsewhere")
    component = moved.component("transformer")
    assert component.class_name == "diffusers.models.transformers.transformer_flux:FluxTransformer2DModel"
    assert component.config["axes_dims_rope"] == [4, 4, 8]
    assert component.parameters[0].name == "hidden_states"
    assert moved.header == found.header
    assert moved.example("transformer")["guidance"].shape == (1,)
    with pytest.raises(InputError, match=r"holds no calls of 'vae'. It has those of transformer"):
        moved.calls("vae")


def test_a_damaged_recording_is_refused(tmp_path: Path) -> None:
    found = record(pipelines.prepare("Flux"), tmp_path)
    call = found.calls("transformer")[0]
    path = tmp_path / "samples" / "00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="00000.safetensors is damaged .* is another tensor"):
        list(map(found.tensors, found.calls("transformer")))
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="00000.safetensors is damaged"):
        found.tensors(call)
    path.unlink()
    with pytest.raises(InputError, match="damaged"):
        found.tensors(call)
    header = tmp_path / "recording.json"
    header.write_text(header.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(InputError, match="version 2"):
        recording.load(tmp_path)
    header.write_text("[]")
    with pytest.raises(InputError, match="recording.json is damaged"):
        recording.load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        recording.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("call", "more", "message"),
    [
        (
            {"guidance_scal": 1.0},
            {},
            r"FluxPipeline takes no argument 'guidance_scal'. Did you mean 'guidance_scale'\?",
        ),
        ({"joint": 1}, {}, "takes no argument 'joint'. It takes prompt, prompt_2"),
        ({"prompt": "twice"}, {}, r"refuses its arguments \(Cannot forward both `prompt`"),
        ({}, {"components": ["unet"]}, "has no component 'unet'. It has transformer"),
        ({}, {"states_per_prompt": 0}, "states_per_prompt is 0"),
    ],
)
def test_wrong_arguments_are_one_clear_error(call: Any, more: Any, message: str, tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux")
    with pytest.raises(InputError, match=message):
        capture(prepared.pipe, prepared.inputs, tmp_path, call=prepared.call | call, **more)


def test_arguments_of_a_modular_pipeline_are_checked(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux3")  # its call takes any name and drops it
    with pytest.raises(InputError, match=r"takes no argument 'num_steps'. Did you mean 'timesteps'"):
        capture(prepared.pipe, prepared.inputs, tmp_path, call=prepared.call | {"num_steps": 2})


def test_constants_that_follow_the_prompt_are_graphs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = record(pipelines.prepare("Cosmos3"), tmp_path)
    assert len(found.groups("transformer")) == 3  # of both prompts and the empty one
    assert any("'und_len' is 44, not 50" in line for line in found.describe())
    assert len(found.ways()) == 3
    assert found.component("transformer").returns == 3, "two of them None"
    monkeypatch.setattr(recording, "MOST_WAYS", 2)
    with pytest.raises(
        InputError, match=r"called in 3 ways, each of which needs an engine .*'und_len' is 44, not 50"
    ):
        found.ways()


def test_prompts_that_do_not_fit_each_other(tmp_path: Path) -> None:
    prepared = pipelines.prepare("Flux")
    with pytest.raises(InputError, match="There is no prompt"):
        capture(prepared.pipe, [], tmp_path)
    with pytest.raises(InputError, match="of one run differ in length"):
        capture((qwen := pipelines.prepare("QwenImage")).pipe, qwen.inputs, tmp_path, call=qwen.call, batch=2)
    with pytest.raises(InputError, match="do not have the same arguments"):
        capture(prepared.pipe, [*prepared.inputs, {"prompt": "x"}], tmp_path)


def test_swapped_attention_processors_are_refused(tmp_path: Path) -> None:
    prepared = pipelines.prepare("SD3")
    components = {
        name: part
        for name, part in prepared.pipe.components.items()
        if not name.startswith(("image", "feature"))
    }
    pipe: Any = StableDiffusion3PAGPipeline(**components, pag_applied_layers=["blocks.1"])
    capture(pipe, prepared.inputs, tmp_path / "off", call=prepared.call | {"pag_scale": 0.0})
    with pytest.raises(InputError, match="puts other attention processors into 'transformer'"):
        capture(pipe, prepared.inputs, tmp_path / "on", call=prepared.call | {"pag_scale": 3.0})


class OddCache:
    pass


class OddModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int = 4, mode: str = "") -> None:
        super().__init__()
        self.embedder = torch.nn.Linear(channels, channels)
        self.linear = torch.nn.Linear(channels, channels)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        residuals: list[torch.Tensor],
        extra: Any = None,
        flag: bool = False,
    ) -> torch.Tensor:
        del flag, extra
        return self.linear(self.embedder(x)) + residuals.pop() + t[:, None]


class OddPipeline(DiffusionPipeline):
    """Does one odd thing around its calls, as ``act`` says."""

    _optional_components: ClassVar[list[str]] = ["once"]

    def __init__(self, transformer: Any, once: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, once=once)

    @torch.no_grad()
    def __call__(self, prompt: str, generator: Any = None, act: str = "", steps: int = 2) -> torch.Tensor:
        x = torch.randn(3, 4, generator=generator)
        for step in range(steps):
            residuals = [torch.ones(3, 4) * len(prompt)]
            t = torch.full((1,), 1.0 - step / steps).expand(3)
            extra = {"cache": OddCache(), "object": object(), "numpy": t.numpy()}.get(act)
            if act == "config":
                self.transformer.register_to_config(mode=str(step))
            if act == "fails":
                raise RuntimeError("out of luck\nand more")
            with torch.set_grad_enabled(act == "grad"), torch.autocast("cpu", enabled=act == "autocast"):
                v = self.transformer(x, t, residuals, extra=extra)
            if self.once is not None and not step:
                self.once(x, t, [residuals or x])
            x -= v.detach() * 0.1  # in place: the tensor that was recorded
            self.transformer.embedder(x)  # a submodule, outside of forward
            assert not residuals  # forward emptied the caller's list
        return x


@pytest.fixture
def odd() -> OddPipeline:
    torch.manual_seed(0)
    return OddPipeline(OddModel().eval())


PROMPTS = [{"prompt": "a"}, {"prompt": "bb"}]


def test_what_changes_after_the_call_was_copied_before_it(odd: OddPipeline, tmp_path: Path) -> None:
    with watched(odd.transformer) as seen:
        found = capture(odd, PROMPTS, tmp_path)
    assert same(outputs(found, "transformer", odd.transformer), seen)
    assert len(found.calls("transformer")) == 4  # not those of the submodule
    assert list(found.calls("transformer")[0].blobs) == ["x", "t", "residuals.0"]  # given by position
    assert found.groups("transformer")[0].schema.constants == {"extra": None, "flag": False}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("cache", "Of 'transformer', 'extra' is a .*OddCache: a cache that the model reads and fills"),
        ("object", "Of 'transformer', 'extra' is a builtins.object: a Python object"),
        ("numpy", "gives 'transformer' a ndarray as 'extra'"),
        ("grad", "runs 'transformer' with gradients"),
        ("autocast", "runs 'transformer' under autocast"),
        ("config", "changes the configuration of 'transformer' between calls"),
    ],
)
def test_what_no_graph_can_repeat_is_refused_by_name(
    act: str, message: str, odd: OddPipeline, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        capture(odd, PROMPTS, tmp_path, call={"act": act})


def test_training_mode_is_refused(odd: OddPipeline, tmp_path: Path) -> None:
    odd.transformer.train()
    with pytest.raises(InputError, match="in training mode"):
        capture(odd, PROMPTS, tmp_path)


def test_a_pipeline_that_fails_is_no_input_error(odd: OddPipeline, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"the OddPipeline failed \(RuntimeError: out of luck\)"):
        capture(odd, PROMPTS, tmp_path, call={"act": "fails"})


def test_which_component_is_the_transformer(tmp_path: Path) -> None:
    pipe = OddPipeline(OddModel().eval(), once=OddModel(channels=4, mode="once").eval())
    assert capture(pipe, PROMPTS, tmp_path / "often").components == ("transformer",)
    assert capture(pipe, PROMPTS, tmp_path / "named", components=["once"]).components == ("once",)
    with pytest.raises(InputError, match=r"called more than once \(transformer, once once\)"):
        capture(pipe, PROMPTS, tmp_path / "one", call={"steps": 1})
    single = OddPipeline(OddModel().eval())
    assert capture(single, PROMPTS, tmp_path / "single", call={"steps": 1}).components == ("transformer",)
    with pytest.raises(InputError, match="never called 'transformer'"):
        capture(single, PROMPTS, tmp_path / "never", call={"steps": 0}, components=["transformer"])
    with pytest.raises(InputError, match="has no diffusion transformer"):
        capture(OddPipeline(torch.nn.Linear(2, 2)), PROMPTS, tmp_path / "none")
