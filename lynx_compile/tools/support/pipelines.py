# SPDX-License-Identifier: Apache-2.0
"""diffusers' own pipelines around tiny transformers, driven with encoded prompts: nothing but the transformer runs.

They are real in what matters to a compiler: what the pipeline hands its transformer, how often and in which order.
Text encoders, tokenizers and autoencoders are left out; every pipeline that takes ``prompt_embeds`` runs without.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from PIL import Image
from transformers import (
    BatchEncoding,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lynx_compile.tools.support import autoencoders as vaes
from lynx_compile.tools.support.configurations import TINY, classes, model
from lynx_compile.tools.support.draws import Integers, Mask, Normal, Same, drawn
from lynx_compile.tools.support.image_models import FLUX

LENGTHS = (12, 7)  # text tokens of the two prompts
TEXT = 12  # text tokens where the pipeline pads every prompt to one length


@dataclass(frozen=True)
class TinyPipeline:
    """How a pipeline of diffusers becomes a tiny one.

    ``transformers``: {component: a configuration, and what of it the pipeline needs otherwise}; for a ControlNet its
    class and its whole configuration.
    ``prompt``: draws for the pipeline's own arguments of a prompt, by its number of text tokens.
    ``scheduler``: the class that the checkpoints of this pipeline name, and its settings; None: it has none, or two.
    ``parts``: other components, made anew for every pipeline, from a seed of their own.
    ``blocks``: of a modular pipeline, those that denoise (``module:Class``).
    ``adapt``: puts a stand-in for its text encoder into a pipeline that takes no encoded prompts.
    """

    class_name: str
    transformers: dict[str, tuple[str, dict[str, Any]]]
    call: dict[str, Any]
    prompt: Callable[[int], dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]] | None = ("FlowMatchEulerDiscreteScheduler", {})
    settings: dict[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    adapt: Callable[[Any], None] | None = None
    blocks: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A tiny pipeline with two prompts and the arguments of its call: what ``capture`` takes."""

    pipe: Any
    inputs: list[dict[str, Any]]
    call: dict[str, Any]


def names(class_name: str) -> list[str]:
    """The tiny pipelines in which a transformer class of diffusers runs."""
    configurations = {name for name, tiny in TINY.items() if tiny.class_name == class_name}
    return [
        name
        for name, tiny in PIPELINES.items()
        if configurations & {configuration for configuration, _ in tiny.transformers.values()}
    ]


def prepare(name: str, seed: int = 0) -> Prepared:
    """A tiny pipeline, the same for the same seed."""
    tiny = PIPELINES[name]
    components: dict[str, Any] = {
        component: _model(configuration, changes, seed + i)
        for i, (component, (configuration, changes)) in enumerate(tiny.transformers.items())
    }
    if tiny.scheduler is not None:
        kind, options = tiny.scheduler
        components["scheduler"] = getattr(diffusers, kind)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        components |= {part: make() for part, make in tiny.parts.items()}
    inputs = [drawn(tiny.prompt(length), "first", seed + length) for length in LENGTHS]
    pipeline = getattr(diffusers, tiny.class_name)
    if tiny.blocks is not None:
        pipe = pkgutil.resolve_name(f"diffusers.modular_pipelines.{tiny.blocks}")().init_pipeline()
        pipe.update_components(**components)
        return Prepared(pipe, inputs, dict(tiny.call))
    missing = {
        part: None for part in pipeline._get_signature_types() if part not in components | tiny.settings
    }
    pipe = pipeline(**missing | components | tiny.settings)
    if tiny.adapt is not None:
        tiny.adapt(pipe)
    return Prepared(pipe, inputs, dict(tiny.call))


def _model(configuration: str, changes: dict[str, Any], seed: int) -> torch.nn.Module:
    """A tiny transformer with changes, or another model of diffusers by its class."""
    if configuration not in TINY:
        return model(getattr(diffusers, configuration), changes, seed)
    tiny = TINY[configuration]
    return model(classes()[tiny.class_name], tiny.config | changes, seed)


def _both(draws: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a prompt, and those of the empty one for guidance."""
    return dict(draws) | {f"negative_{name}": draw for name, draw in draws.items()}


def _fixed(negative: bool = True, **draws: Any) -> Callable[[int], dict[str, Any]]:
    """Encoded prompts of one length, as encoders that pad make them."""
    return lambda length: _both(draws) if negative else dict(draws)


def _text(*shape: int) -> Normal:
    """An encoding of the text, [1, ..., width]."""
    return Normal((1, *shape))


def _mask(length: int = TEXT, dtype: torch.dtype = torch.int64) -> Mask:
    return Mask((1, length), dtype)


def _without_padding(mask: str, width: int) -> Callable[[int], dict[str, Any]]:
    """``prompt_embeds`` as long as the prompt, and those of an empty prompt of 5 tokens."""
    return lambda length: {
        "prompt_embeds": _text(length, width), mask: _mask(length),
        "negative_prompt_embeds": _text(5, width), f"negative_{mask}": _mask(5),
    }  # fmt: skip


def _embeds(width: int = 32) -> Callable[[int], dict[str, Any]]:
    return _fixed(prompt_embeds=_text(TEXT, width))


def _masked(
    mask: str = "prompt_attention_mask", dtype: torch.dtype = torch.int64
) -> Callable[[int], dict[str, Any]]:
    return lambda length: _both({"prompt_embeds": _text(TEXT, 32), mask: _mask(dtype=dtype)})


def _bytes(length: int) -> dict[str, Any]:
    """A prompt as text, for pipelines that encode it themselves."""
    return {"prompt": "a long prompt"[:length]}


def _embedded(prompt: str | list[str], width: int) -> torch.Tensor:
    """In the place of a text encoder: a random embedding [prompts, bytes, width] of each byte."""
    table = torch.randn(256, width, generator=torch.Generator().manual_seed(0))
    texts = [prompt] if isinstance(prompt, str) else prompt
    rows = [table[list(text.encode() or b" ")] for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _encoder(method: str, encode: Callable[..., Any]) -> Callable[[Any], None]:
    """Put ``encode`` in the place of a method of the pipeline that runs its text encoder."""
    return lambda pipe: setattr(pipe, method, encode)


def _valid(embeds: torch.Tensor) -> torch.Tensor:
    return torch.ones(embeds.shape[:2], dtype=torch.bool)


def _image(pipeline: str, configuration: str, prompt: Any, call: Any = None, **more: Any) -> TinyPipeline:
    changes = more.pop("changes", {})
    return TinyPipeline(
        pipeline, {"transformer": (configuration, changes)}, IMAGE | (call or {}), prompt, **more
    )


def _video(pipeline: str, configuration: str, prompt: Any, call: Any = None, **more: Any) -> TinyPipeline:
    return _image(pipeline, configuration, prompt, VIDEO | (call or {}), **more)


class Unchecked:
    """In the place of a safety checker that is a package of its own: encoded prompts are not checked."""

    def to(self, *place: Any) -> None:
        """Nowhere: it holds nothing."""


class Encoder(torch.nn.Module):
    """A text encoder that is asked for its dtype and nothing else."""

    device, dtype = torch.device("cpu"), torch.float32


class Processor:
    """A processor that is asked how it tokenizes a template and nothing else."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, messages: Any, **options: Any) -> list[list[int]]:
        """Three tokens."""
        return [[1, 2, 3]]

    def encode(self, text: str) -> list[int]:
        """One token."""
        return [4]


class Tokenizer:
    """Tokens are bytes."""

    eos_token_id = 2

    def convert_tokens_to_ids(self, token: str) -> int:
        """Of every special token."""
        return 1

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> BatchEncoding:
        """The bytes of the messages."""
        return BatchEncoding(
            {"input_ids": list("".join(message["content"] for message in messages).encode())}
        )


def _longcat_audio_prompt(prompt: str | list[str], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = _embedded(prompt, 32)
    return embeds, _valid(embeds).sum(1)


def _ace_step_prompt(prompt: str | list[str], *more: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    embeds = _embedded(prompt, 32)
    return embeds, _valid(embeds), embeds[:, :2], _valid(embeds[:, :2])


def _ace_step_conditions() -> Any:
    return AceStepConditionEncoder(
        hidden_size=32,
        intermediate_size=64,
        text_hidden_dim=32,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )


def _minimax_music3_conditions() -> Any:
    return diffusers.MiniMaxMusic3ConditionEncoder(
        condition_hidden_dim=32, num_condition_layers=2, out_dim=32
    )


def _protein(length: int) -> dict[str, Any]:
    yes, no = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.bool)
    return {
        "padding_mask": Same(yes),
        "is_in_context_conditioning": Same(no),
        "supports_local_latent": Same(yes),
        "token_type": Integers((1, length), 7),
        "conditioning_features": {
            "condition_sequence_1_residue": Integers((1, length), 16),
            "molecule_iid": Same(torch.zeros(1, length, dtype=torch.int64)),
        },
    }


def _ideogram4_prompt(pipe: Any) -> None:
    def encode(
        prompt: list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: Any
    ) -> tuple[torch.Tensor, ...]:
        embeds = _embedded(prompt, 32)
        padded = torch.nn.functional.pad(
            embeds, (0, 0, max_sequence_length - embeds.shape[1], grid_h * grid_w)
        )
        lengths = [embeds.shape[1]] * len(embeds)
        return padded, *pipe._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)

    pipe.encode_prompt = encode


def _bria_fibo_prompt(
    prompt: list[str], **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    embeds = _embedded(prompt, 64)
    return embeds, [embeds[..., :32], embeds[..., 32:]], _valid(embeds)


def _joy_image_prompt(prompt: list[str], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = _embedded(prompt, 32)
    return embeds, _valid(embeds)


def _kandinsky_prior(pipe: Any) -> None:
    def encode(prompt: list[str], *more: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        embeds = torch.nn.functional.pad(_embedded(["", *prompt], 32), (0, 0, 0, 7))[:, :7]
        return embeds.mean(1), embeds, torch.ones(2, 7, dtype=torch.bool)

    pipe._encode_prompt = encode
    pipe.get_zero_embed = lambda count, device: torch.zeros(count, 32)


def _clip() -> Any:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
    )
    return CLIPVisionModel(config)


def picture() -> Image.Image:
    """An image of 64 x 64 pixels for pipelines that start from one."""
    pixels = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _ltx2_connectors() -> Any:
    return LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )


def _stable_audio_projection() -> Any:
    return StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32)


def _siglip() -> Any:
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return SiglipVisionModel(config)


def _siglip_processor() -> Any:
    return SiglipImageProcessorPil(size={"height": 32, "width": 32})


IMAGE = {"height": 64, "width": 64, "num_inference_steps": 3}
VIDEO = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3}
UNIPC = ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True})
DPM: tuple[str, dict[str, Any]] = ("DPMSolverMultistepScheduler", {})
BINNED = {"use_resolution_binning": False, "negative_prompt": None}
PEM = "prompt_embeds_mask"

PIPELINES = {
    "Flux": _image(
        "FluxPipeline",
        "Flux",
        _fixed(prompt_embeds=_text(TEXT, 32), pooled_prompt_embeds=_text(32)),
        {"true_cfg_scale": 2.0},
    ),
    "Flux2": _image("Flux2Pipeline", "Flux2", _fixed(False, prompt_embeds=_text(TEXT, 32))),
    "Chroma": _image("ChromaPipeline", "Chroma", _masked(dtype=torch.bool)),
    "Bria": _image("BriaPipeline", "Bria", _embeds(), parts={"vae": vaes.kl}),
    "BriaFibo2": _image(
        "BriaFibo2Pipeline",
        "BriaFibo2",
        _fixed(prompt_embeds=_text(2, TEXT, 32), prompt_embeds_mask=_mask(dtype=torch.bool)),
    ),
    "SD3": _image(
        "StableDiffusion3Pipeline",
        "SD35",
        _fixed(prompt_embeds=_text(TEXT, 32), pooled_prompt_embeds=_text(64)),
    ),
    "QwenImage": _image("QwenImagePipeline", "QwenImage", _without_padding(PEM, 32)),
    "ZImage": _image(
        "ZImagePipeline",
        "ZImage",
        lambda length: {"prompt_embeds": [Normal((length, 32))], "negative_prompt_embeds": [Normal((5, 32))]},
    ),
    "Sana": _image(
        "SanaPipeline",
        "Sana",
        _masked(),
        {"use_resolution_binning": False, "negative_prompt": None},
        scheduler=DPM,
    ),
    "HiDream": _image(
        "HiDreamImagePipeline",
        "HiDream",
        _fixed(
            prompt_embeds_t5=_text(TEXT, 32),
            prompt_embeds_llama3=Normal((2, 1, TEXT, 32)),
            pooled_prompt_embeds=_text(32),
        ),
    ),
    "CogView4": _image("CogView4Pipeline", "CogView4", _embeds()),
    "CogView3Plus": _image(
        "CogView3PlusPipeline", "CogView3Plus", _embeds(), scheduler=("CogVideoXDDIMScheduler", {})
    ),
    "PixArtSigma": _image("PixArtSigmaPipeline", "PixArt", _masked(), BINNED, scheduler=DPM),
    "AuraFlow": _image("AuraFlowPipeline", "AuraFlow", _masked()),
    "HunyuanDiT": _image(
        "HunyuanDiTPipeline",
        "HunyuanDiT",
        _fixed(
            prompt_embeds=_text(6, 32),
            prompt_attention_mask=_mask(6),
            prompt_embeds_2=_text(6, 32),
            prompt_attention_mask_2=_mask(6),
        ),
        {"use_resolution_binning": False},
        scheduler=("DDPMScheduler", {}),
    ),
    "HunyuanImage": _image(
        "HunyuanImagePipeline",
        "HunyuanImage",
        _fixed(
            prompt_embeds=_text(TEXT, 32),
            prompt_embeds_mask=_mask(),
            prompt_embeds_2=_text(8, 32),
            prompt_embeds_mask_2=_mask(8),
        ),
        {"height": 128, "width": 128},
    ),
    "Lumina2": _image("Lumina2Pipeline", "Lumina2", _masked()),
    "LuminaNext": _image("LuminaPipeline", "LuminaNext", _masked(), changes={"learn_sigma": True}),
    "PRX": _image(
        "PRXPipeline",
        "PRX",
        _masked(dtype=torch.bool),
        {"use_resolution_binning": False, "negative_prompt": None},
    ),
    "NucleusMoEImage": _image("NucleusMoEImagePipeline", "NucleusMoEImage", _masked(PEM)),
    "ErnieImage": _image(
        "ErnieImagePipeline",
        "ErnieImage",
        lambda length: {"prompt_embeds": [Normal((length, 32))], "negative_prompt_embeds": [Normal((5, 32))]},
    ),
    "Krea2": _image(
        "Krea2Pipeline",
        "Krea2",
        _fixed(prompt_embeds=_text(8, 3, 32), prompt_embeds_mask=_mask(8, torch.bool)),
        settings={"text_encoder_select_layers": (0, 1, 2), "patch_size": 2, "is_distilled": False},
    ),
    "LongCatImage": _image(
        "LongCatImagePipeline",
        "LongCatImage",
        _bytes,
        {"enable_prompt_rewrite": False},
        changes={"in_channels": 64},
        adapt=_encoder("_encode_prompt", lambda prompt: _embedded(prompt, 32)),
    ),
    "OvisImage": _image("OvisImagePipeline", "OvisImage", _embeds(), {"negative_prompt": None}),
    "GlmImage": _image(
        "GlmImagePipeline",
        "GlmImage",
        lambda length: _both({"prompt_embeds": _text(TEXT, 32)}) | {"prior_token_ids": Integers((1, 16), 64)},
    ),
    "DiT": TinyPipeline(
        "DiTPipeline",
        {"transformer": ("DiT", {"num_embeds_ada_norm": 1000})},
        {"num_inference_steps": 3},
        lambda length: {"class_labels": [length % 8]},
        ("DDIMScheduler", {}),
        parts={"vae": vaes.kl},
    ),
    "Wan": _video("WanPipeline", "Wan", _embeds(), scheduler=UNIPC),
    "Wan22": TinyPipeline(
        "WanPipeline",
        {"transformer": ("Wan", {}), "transformer_2": ("Wan", {})},
        VIDEO,
        _embeds(),
        UNIPC,
        settings={"boundary_ratio": 0.875},
    ),
    "WanVACE": _video(
        "WanVACEPipeline",
        "WanVACE",
        _embeds(),
        parts={"vae": vaes.wan},
        changes={"vace_in_channels": 72},
        scheduler=UNIPC,
    ),
    "SkyReelsV2": _video("SkyReelsV2Pipeline", "SkyReelsV2", _embeds(), scheduler=UNIPC),
    "AnyFlow": _video(
        "AnyFlowPipeline", "AnyFlow", _embeds(), scheduler=("FlowMapEulerDiscreteScheduler", {})
    ),
    "Helios": _video(
        "HeliosPipeline",
        "Helios",
        _embeds(),
        {"num_frames": 9, "num_latent_frames_per_chunk": 3},
        parts={"vae": vaes.wan},
        scheduler=("HeliosScheduler", {"stage_range": [0, 1], "stages": 1}),
    ),
    "Allegro": _video("AllegroPipeline", "Allegro", _masked(), {"negative_prompt": None}, scheduler=DPM),
    "CogVideoX": _video(
        "CogVideoXPipeline",
        "CogVideoX",
        _fixed(prompt_embeds=_text(8, 32)),
        scheduler=("CogVideoXDDIMScheduler", {}),
    ),
    "EasyAnimate": _video("EasyAnimatePipeline", "EasyAnimate", _masked(), parts={"vae": vaes.magvit}),
    "HunyuanVideo": _video(
        "HunyuanVideoPipeline",
        "HunyuanVideo",
        _fixed(prompt_embeds=_text(TEXT, 32), pooled_prompt_embeds=_text(16), prompt_attention_mask=_mask()),
    ),
    "Kandinsky5": _video(
        "Kandinsky5T2VPipeline",
        "Kandinsky5",
        _fixed(
            prompt_embeds_qwen=_text(TEXT, 32),
            prompt_embeds_clip=_text(16),
            prompt_cu_seqlens=Same([0, TEXT], torch.int32),
        ),
    ),
    "Latte": _image(
        "LattePipeline",
        "Latte",
        _embeds(),
        {"video_length": 2, "negative_prompt": None},
        scheduler=("DDIMScheduler", {}),
    ),
    "LTX": _video("LTXPipeline", "LTX", _masked()),
    "Mochi": _video("MochiPipeline", "Mochi", _masked(dtype=torch.bool)),
    "SanaVideo": _image(
        "SanaVideoPipeline",
        "SanaVideo",
        _masked(),
        {"frames": 5, "use_resolution_binning": False, "negative_prompt": None},
        scheduler=DPM,
    ),
    "HunyuanVideo15": _video(
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15",
        _fixed(
            prompt_embeds=_text(8, 32),
            prompt_embeds_mask=_mask(8),
            prompt_embeds_2=_text(4, 32),
            prompt_embeds_mask_2=_mask(4),
        ),
        changes={"in_channels": 9},
        parts={"vae": vaes.hunyuan15, "guider": diffusers.ClassifierFreeGuidance},
    ),
    "MotifVideo": _video(
        "MotifVideoPipeline",
        "MotifVideo",
        _masked(dtype=torch.bool),
        parts={"guider": diffusers.ClassifierFreeGuidance, "vae": vaes.wan},
    ),
    "LTX2": _video(
        "LTX2Pipeline",
        "LTX2",
        _fixed(prompt_embeds=_text(TEXT, 32, 2), prompt_attention_mask=_mask()),
        {"height": 32, "width": 32, "num_frames": 3, "spatio_temporal_guidance_blocks": [1]},
        parts={"connectors": _ltx2_connectors, "audio_vae": vaes.ltx2_audio, "vae": vaes.ltx2},
    ),
    "StableAudio": TinyPipeline(
        "StableAudioPipeline",
        {"transformer": ("StableAudio", {"global_states_input_dim": 64})},
        {"num_inference_steps": 3},
        _embeds(),
        ("EDMDPMSolverMultistepScheduler", {}),
        parts={"vae": vaes.oobleck, "projection_model": _stable_audio_projection},
    ),
    "StableAudio3": TinyPipeline(
        "StableAudio3Pipeline",
        {"transformer": ("StableAudio3", {"global_cond_dim": 32})},
        {"num_inference_steps": 3, "duration": 1.0},
        _fixed(prompt_embeds=_text(4, 32), encoder_attention_mask=_mask(4)),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1}),
        parts={
            "vae": vaes.same,
            "duration_embedder": lambda: StableAudio3DurationEmbedder(output_dim=32, fourier_dim=16),
        },
    ),
    "Cosmos": _video(
        "CosmosTextToWorldPipeline",
        "Cosmos",
        _embeds(),
        scheduler=("EDMEulerScheduler", {}),
        parts={"safety_checker": Unchecked},
    ),
    "Cosmos2": _image(
        "Cosmos2TextToImagePipeline",
        "Cosmos",
        _embeds(),
        parts={"safety_checker": Unchecked},
        scheduler=("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ),
    "Kandinsky6": _video(
        "Kandinsky6TI2VAPipeline",
        "Kandinsky6",
        _fixed(prompt_embeds=_text(TEXT, 32), pooled_prompt_embeds=_text(16)),
        {"sample_audio": False},
        changes={"visual_cond": True},
    ),
    "JoyImageEdit": _image("JoyImageEditPipeline", "JoyImageEdit", _masked(PEM)),
    "Flux2Klein": _image(
        "Flux2KleinPipeline",
        "Flux2",
        _embeds(),
        parts={"vae": vaes.flux2},
        changes={"in_channels": 16, "guidance_embeds": False},
    ),
    "HunyuanVideoFramepack": _video(
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoFramepack",
        _fixed(prompt_embeds=_text(TEXT, 32), pooled_prompt_embeds=_text(16), prompt_attention_mask=_mask()),
        {"image": picture(), "latent_window_size": 3},
        parts={"vae": vaes.hunyuan, "image_encoder": _siglip, "feature_extractor": _siglip_processor},
    ),
    "Flux2KleinKV": _image(
        "Flux2KleinKVPipeline",
        "Flux2",
        _fixed(False, prompt_embeds=_text(TEXT, 32)),
        {"image": picture()},
        parts={"vae": vaes.flux2},
        changes={"in_channels": 16, "guidance_embeds": False},
    ),
    "FluxKontext": _image(
        "FluxKontextPipeline",
        "Flux",
        _fixed(False, prompt_embeds=_text(TEXT, 32), pooled_prompt_embeds=_text(32)),
        {"image": picture(), "_auto_resize": False},
        parts={"vae": vaes.kl},
        changes={"in_channels": 16},
    ),
    "QwenImageEdit": _image(
        "QwenImageEditPipeline",
        "QwenImage",
        _without_padding(PEM, 32),
        {"image": picture()},
        parts={"vae": vaes.qwen},
    ),
    "QwenImageEditPlus": _image(
        "QwenImageEditPlusPipeline",
        "QwenImage",
        _without_padding(PEM, 32),
        {"image": [picture(), picture()]},
        parts={"vae": vaes.qwen},
    ),
    "WanImageToVideo": _video(
        "WanImageToVideoPipeline",
        "Wan",
        _embeds(),
        {"image": picture()},
        parts={"vae": vaes.wan},
        changes={"in_channels": 12},
        scheduler=UNIPC,
    ),
    "LongCatAudioDiT": TinyPipeline(
        "LongCatAudioDiTPipeline",
        {"transformer": ("LongCatAudioDiT", {})},
        {"num_inference_steps": 3, "audio_duration_s": 0.1},
        _bytes,
        parts={"vae": vaes.longcat_audio},
        adapt=_encoder("encode_prompt", _longcat_audio_prompt),
    ),
    "AceStep": TinyPipeline(
        "AceStepPipeline",
        {"transformer": ("AceStep", {})},
        {"num_inference_steps": 3, "audio_duration": 1.0},
        _bytes,
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1}),
        parts={"condition_encoder": _ace_step_conditions, "text_encoder": Encoder},
        adapt=_encoder("encode_prompt", _ace_step_prompt),
    ),
    "Ideogram4": TinyPipeline(
        "Ideogram4Pipeline",
        {"transformer": ("Ideogram4", {}), "unconditional_transformer": ("Ideogram4", {})},
        IMAGE | {"guidance_scale": 3.0, "guidance_schedule": None, "max_sequence_length": 16},
        _bytes,
        parts={"vae": vaes.flux2},
        adapt=_ideogram4_prompt,
    ),
    "BriaFibo": _image(
        "BriaFiboPipeline",
        "BriaFibo",
        _bytes,
        parts={"vae": vaes.wan, "text_encoder": Encoder},
        adapt=_encoder("get_prompt_embeds", _bria_fibo_prompt),
    ),
    "JoyImageEditPlus": _image(
        "JoyImageEditPlusPipeline",
        "JoyImageEditPlus",
        _bytes,
        {"images": [[picture()]]},
        parts={"vae": lambda: vaes.wan(16)},
        adapt=_encoder("encode_prompt_multiple_images", _joy_image_prompt),
    ),
    "QwenImage21": _image(
        "QwenImage21Pipeline",
        "QwenImage21",
        _without_padding(PEM, 32),
        {"use_kv_cache": False, "true_cfg_scale": 4.0},
        parts={"processor": Processor},
    ),
    "WanAnimate": _image(
        "WanAnimatePipeline",
        "WanAnimate",
        _embeds(),
        {
            "image": picture(),
            "pose_video": [picture()] * 5,
            "face_video": [picture()] * 5,
            "segment_frame_length": 5,
        },
        parts={"vae": vaes.wan, "image_encoder": _clip, "image_processor": CLIPImageProcessorPil},
    ),
    "ChronoEdit": _video(
        "ChronoEditPipeline",
        "ChronoEdit",
        _embeds(),
        {"image": picture()},
        parts={"vae": vaes.wan, "image_encoder": _clip, "image_processor": CLIPImageProcessorPil},
        changes={"in_channels": 12, "image_dim": 32, "added_kv_proj_dim": 32},
    ),
    "SanaWM": _video(
        "SanaWMPipeline",
        "SanaWM",
        lambda length: (
            {"prompt": ""} | _both({"prompt_embeds": _text(1, TEXT, 32), "prompt_attention_mask": _mask()})
        ),
        {
            "height": 32,
            "width": 32,
            "image": picture(),
            "action": "w-4",
            "intrinsics": [64.0, 64.0, 32.0, 32.0],
        },
        parts={"vae": lambda: vaes.ltx2(8)},
        changes={"chunk_plucker_channels": 12},
    ),
    "AnyFlowFAR": _video(
        "AnyFlowFARPipeline",
        "AnyFlowFAR",
        _embeds(),
        {"chunk_partition": [1, 1], "guidance_scale": 6.0},
        scheduler=("FlowMapEulerDiscreteScheduler", {}),
    ),
    "FluxControlNet": TinyPipeline(
        "FluxControlNetPipeline",
        {
            "transformer": ("Flux", {"in_channels": 16, "num_layers": 2}),
            "controlnet": (
                "FluxControlNetModel",
                FLUX | {"in_channels": 16, "pooled_projection_dim": 32, "guidance_embeds": True},
            ),
        },
        IMAGE | {"control_image": picture(), "true_cfg_scale": 2.0},
        _fixed(prompt_embeds=_text(TEXT, 32), pooled_prompt_embeds=_text(32)),
        parts={"vae": vaes.kl},
    ),
    "ZImageControlNet": TinyPipeline(
        "ZImageControlNetPipeline",
        {
            "transformer": ("ZImage", {}),
            "controlnet": (
                "ZImageControlNetModel",
                {
                    "control_layers_places": [0, 1],
                    "control_refiner_layers_places": [0],
                    "control_in_dim": 16,
                    "dim": 48,
                    "n_refiner_layers": 1,
                    "n_heads": 3,
                    "n_kv_heads": 3,
                },
            ),
        },
        IMAGE | {"control_image": picture()},
        lambda length: {"prompt_embeds": [Normal((length, 32))], "negative_prompt_embeds": [Normal((5, 32))]},
        parts={"vae": lambda: vaes.kl(16)},
    ),
    "KandinskyPrior": TinyPipeline(
        "KandinskyV22PriorPipeline",
        {"prior": ("Prior", {})},
        {"num_inference_steps": 3, "output_type": "pt"},
        _bytes,
        ("UnCLIPScheduler", {}),
        parts={"image_encoder": _clip},
        adapt=_kandinsky_prior,
    ),
    "Cosmos3": TinyPipeline(
        "Cosmos3OmniPipeline",
        {"transformer": ("Cosmos3", {"vocab_size": 256})},
        {
            "height": 64,
            "width": 64,
            "num_frames": 1,
            "num_inference_steps": 3,
            "use_system_prompt": False,
            "enable_safety_check": False,
            "negative_prompt": "no",
        },
        _bytes,
        UNIPC,
        {"enable_safety_checker": False},
        {"vae": vaes.wan, "text_tokenizer": Tokenizer},
    ),
    "Flux3": _image(
        "Flux3ModularPipeline", "Flux3", _embeds(), blocks="flux3.modular_blocks_flux3:Flux3CoreDenoiseStep"
    ),
    "MiniMaxMusic3": TinyPipeline(
        "MiniMaxMusic3ModularPipeline",
        {"transformer": ("MiniMaxMusic3", {})},
        {"num_inference_steps": 3},
        lambda length: {"frame_hiddens": _text(length, 64)},
        parts={"condition_encoder": _minimax_music3_conditions},
        blocks="minimax_music3.modular_blocks_minimax_music3:MiniMaxMusic3CoreDenoiseStep",
    ),
    "MiniMaxH3": TinyPipeline(
        "MiniMaxH3ModularPipeline",
        {"transformer": ("MiniMaxH3", {"in_channels": 24, "audio_in_channels": 32})},
        {"height": 64, "width": 64, "num_frames": 124, "num_inference_steps": 3},
        lambda length: {"prompt_embeds": _text(length, 32), "text_token_tags": Same([1] * length)},
        ("MiniMaxH3Scheduler", {}),
        parts={"audio_scheduler": lambda: diffusers.MiniMaxH3Scheduler()},
        blocks="minimax_h3.modular_blocks_minimax_h3:MiniMaxH3CoreDenoiseStep",
    ),
    "Kandinsky6SR": TinyPipeline(
        "Kandinsky6SRPipeline",
        {"transformer": ("Kandinsky6SR", {"tile_sizes": ((128, 128),), "out_visual_dim": 4})},
        {"num_inference_steps": 3, "resolution_scale": 2.0, "output_type": "pt"},
        lambda length: {"video": [picture()] * 5},
        parts={"vae": vaes.kandinsky6_sr},
    ),
    "RFD4Proteina": TinyPipeline(
        "RFD4ProteinaPipeline",
        {"transformer": ("RFD4Proteina", {"num_sequence_classes": 147})},
        {"output_type": "pt"},
        _protein,
        None,
        parts={
            "vae": vaes.proteina,
            "bb_ca_scheduler": lambda: diffusers.RFD4ProteinaScheduler("log", "1/t", 1.0, 1.0, tail_steps=1),
            "local_latents_scheduler": lambda: diffusers.RFD4ProteinaScheduler(
                "power", "tan", 1.0, 1.0, tail_steps=1
            ),
        },
        settings={"recycle_depths": [1, 1, 1]},
    ),
}

WITHOUT = {
    "ConsisIDTransformer3DModel": "its pipeline needs OpenCV",
    "OmniGenTransformer2DModel": "its pipeline needs torchvision",
    "MiniMaxMusic3RVQDepthDecoder": "a model of tokens, which its pipeline samples code by code",
    "SanaWMLTX2RefinerTransformer3DModel": "its pipeline keeps keys and values in a cache between calls",
    "WanAnimate2Transformer3DModel": "its pipeline keeps keys and values in a cache between calls",
    "T5FilmDecoder": "no pipeline of diffusers uses it any more",
    "Transformer2DModel": "a part of UNets",
    "DreamLiteTransformer2DModel": "a part of UNets",
    "TransformerTemporalModel": "a part of UNets",
}
"""Why a class has no tiny pipeline."""
