# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a ``DiT``: the module, its scheduler, example inputs and its linear layers."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download

from lynx_compile.errors import InputError
from lynx_compile.models import flux
from lynx_compile.models.structure import Linear, LinearGroup, find_structure
from lynx_compile.recipe import Model, Recipe, Shapes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class DiT:
    """A diffusion transformer. Its weights are loaded when ``module`` is first asked for.

    ``inputs``: example inputs at the recipe's shapes, in the order of the exported graph; floating tensors that
    carry activations have the recipe's dtype, ids, timestep and guidance are float32.
    ``groups``: every linear of the module, grouped by the tensor it reads.
    ``config``: its ``config.json``. ``digest``: SHA-256 over the files it was loaded from.
    """

    folder: Path
    model: Model
    scheduler: FlowMatchEulerDiscreteScheduler
    inputs: Mapping[str, torch.Tensor]
    groups: tuple[LinearGroup, ...]
    family: str
    config: Mapping[str, Any]
    digest: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.model.dtype]

    @cached_property
    def module(self) -> torch.nn.Module:
        on_gpu = torch.cuda.is_available()
        return _module(
            self.folder, self.model, self.dtype if on_gpu else torch.float32, "cuda" if on_gpu else "cpu"
        )

    def module_on_cpu(self, dtype: torch.dtype) -> torch.nn.Module:
        """The module on the CPU in ``dtype``: ``module`` if it is that already, else read anew, not copied."""
        loaded: torch.nn.Module | None = self.__dict__.get("module")
        if loaded is not None:
            parameter = next(loaded.parameters())
            if (parameter.dtype, parameter.device.type) == (dtype, "cpu"):
                return loaded
        return _module(self.folder, self.model, dtype, "cpu")

    def release(self) -> None:
        """Forget ``module``, whose memory a later stage needs; it is read again where it is asked for again."""
        self.__dict__.pop("module", None)
        gc.collect()  # a module and its hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)


def load(recipe: Recipe) -> DiT:
    """Find the recipe's transformer, its structure and its inputs.

    ``module`` comes in float32 on a CPU and in the recipe's dtype on a GPU, from nothing but safetensors.

    Raises:
        InputError: the source is missing, is of no supported class, lacks safetensors, or does not fit the
            recipe's shapes. ``module`` raises it for weights that are damaged or not finite.
    """
    model = _of_diffusers(recipe)
    folder = _snapshot(model)
    config = _config(folder, model)
    _require_safetensors(folder / model.subfolder)
    inputs = example_inputs(folder, config, recipe.shapes, DTYPES[recipe.model.dtype])
    return DiT(
        folder=folder,
        model=model,
        scheduler=_scheduler(folder),
        inputs=inputs,
        groups=find_groups(config, inputs),
        family="flux",
        config=config,
        digest=_digest(folder, model),
    )


def example_inputs(
    folder: Path, config: Mapping[str, Any], shapes: Shapes, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random inputs of the transformer at the recipe's shapes, in ``dtype``; the same on every call."""
    pixels = flux.PACKING * _vae_scale(folder)
    for name, size in (("height", shapes.height), ("width", shapes.width)):
        if size % pixels:
            raise InputError(
                f"shapes.{name} = {size} is not divisible by {pixels}, the pixels of one token of this model.",
                f"Use {max(size // pixels, 1) * pixels}.",
            )
    rows, columns = shapes.height // pixels, shapes.width // pixels
    return flux.example_inputs(config, shapes.batch, rows, columns, shapes.text_length, dtype)


def to_images(recipe: Recipe, latents: torch.Tensor) -> torch.Tensor:
    """Images [n, colours, height, width] float32 in [0, 1] of denoised latents, one after the other.

    Through the checkpoint's VAE; a model that has none works on pixels in [-1, 1].

    Raises:
        InputError: the VAE cannot be loaded.
    """
    model = _of_diffusers(recipe)
    folder = _snapshot(model)
    pixels = flux.PACKING * _vae_scale(folder)
    unpacked = flux.unpack(latents.float(), recipe.shapes.height // pixels, recipe.shapes.width // pixels)
    if (folder / "vae" / "config.json").exists():
        vae: Any = _vae(model)
        unpacked = unpacked / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        with torch.inference_mode():
            unpacked = torch.cat([vae.decode(image[None], return_dict=False)[0] for image in unpacked])
    return (unpacked / 2 + 0.5).clamp(0, 1)


def _of_diffusers(recipe: Recipe) -> Model:
    if isinstance(recipe.model, Model):
        return recipe.model
    raise InputError("Only pipelines of diffusers are compiled so far.", "Give 'source' under 'model'.")


def _vae(model: Model) -> torch.nn.Module:
    try:
        return AutoencoderKL.from_pretrained(
            model.source, subfolder="vae", revision=model.revision, torch_dtype=torch.float32,
            use_safetensors=True, low_cpu_mem_usage=False,
        ).eval()  # fmt: skip
    except Exception as error:  # huggingface_hub and diffusers raise many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"The VAE of '{model.source}' cannot be loaded ({reason}).", "Fetch the whole checkpoint."
        ) from None


def find_groups(config: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> tuple[LinearGroup, ...]:
    """The linears of the model by the tensor each reads, found without weights."""
    with torch.device("meta"):
        skeleton = flux.MODEL.from_config(dict(config)).eval()
    floats = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    return find_structure(skeleton, floats).groups


def _snapshot(model: Model) -> Path:
    """The local folder of the checkpoint; a hub id is fetched (or found in the local hub cache) first."""
    folder = Path(model.source)
    if folder.is_absolute():
        if not folder.is_dir():
            raise InputError(
                f"The model folder {folder} does not exist.", "Correct model.source in the recipe."
            )
        return folder
    wanted = [
        f"{model.subfolder}/*.json",
        f"{model.subfolder}/*.safetensors",
        "scheduler/*.json",
        "vae/config.json",
    ]
    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=wanted))
    except Exception as error:  # huggingface_hub raises many kinds: offline, gated, unknown id, bad revision
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"The model '{model.source}' could not be fetched from the hub ({reason}).",
            "Check the id, log in with 'hf auth login' if it is gated, or give a local diffusers folder.",
        ) from None


def _config(folder: Path, model: Model) -> dict[str, Any]:
    path = folder / model.subfolder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist.",
            "model.source must be a diffusers folder that holds 'transformer/config.json'.",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).", "Fetch the checkpoint again.") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != flux.MODEL.__name__:
        raise InputError(
            f"{path}: the class '{name}' is not supported.", f"Supported so far: {flux.MODEL.__name__}."
        )
    return config


def _require_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no safetensors file.",
            "Convert the checkpoint to safetensors; pickles are never loaded.",
        )


def _module(folder: Path, model: Model, dtype: torch.dtype, device: str) -> torch.nn.Module:
    weights = folder / model.subfolder
    try:
        module, report = flux.MODEL.from_pretrained(
            folder,
            subfolder=model.subfolder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"The weights in {weights} cannot be loaded ({reason}).", "Fetch the checkpoint again."
        ) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise InputError(
                f"The weights in {weights} do not fit their config.json ({kind.replace('_', ' ')}: {report[kind][0]}).",
                "Fetch the checkpoint again.",
            )
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"The weight '{name}' in {weights} is not finite.", "Fetch the checkpoint again."
            )
    return module.to(device).eval().requires_grad_(False)


def _scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{path} cannot be read ({reason}).",
            "Calibration runs the denoising loop and needs the scheduler's config.",
        ) from None


def _vae_scale(folder: Path) -> int:
    """Pixels per latent side; 1 for a model that works on pixels and has no VAE."""
    path = folder / "vae" / "config.json"
    if not path.exists():
        return 1
    try:
        return int(2 ** (len(json.loads(path.read_text(encoding="utf-8"))["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be used ({error}).", "Fetch the checkpoint again.") from None


def _digest(folder: Path, model: Model) -> str:
    digest = hashlib.sha256()
    files = [*(folder / model.subfolder).glob("*.json"), *(folder / model.subfolder).glob("*.safetensors")]
    for path in sorted(
        [*files, *(folder / "scheduler").glob("*.json"), *(folder / "vae").glob("config.json")]
    ):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
