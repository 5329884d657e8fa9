# SPDX-License-Identifier: Apache-2.0
"""LoRAs of diffusers folded into a checkpoint, so that what is compiled has them."""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from lynx_compile.errors import InputError, first_line, is_out_of_memory
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.files.tensors import TensorSpec, write_tensors
from lynx_compile.models.checkpoint import Checkpoint
from lynx_compile.models.weight_files import StoredTensor, read_headers
from lynx_compile.recipe import Lora

FOLDED = "folded.safetensors"
# {tensor: [(scale, what is added to it), ...]}, read when it is written
Changes = dict[str, list[tuple[float, "partial[torch.Tensor]"]]]


def fold(
    checkpoint: Checkpoint,
    component: str,
    loras: Sequence[Lora],
    pipeline: type[Any],
    folder: Path,
    progress: Progress = no_progress,
) -> Checkpoint:
    """The checkpoint with W + sum of scale * alpha / rank * B A in the place of every weight W that a LoRA changes.

    The sum is made in float32 and rounded once, to the dtype in which W is stored. Diffusers reads the files, in
    whatever layout it knows, and peft says what they add. Weights that no LoRA changes stay where they are; the others
    are written into ``folder``, where those of other LoRAs of this component make room.

    Args:
        component: of the pipeline, for which ``checkpoint`` is.
        pipeline: its class, which knows how its LoRAs are called.

    Raises:
        InputError: a LoRA cannot be read, changes nothing in this component, or more than by a low rank.
        DiskFullError: there is no room for the changed weights.
    """
    changes: Changes = defaultdict(list)
    digest = hashlib.sha256()
    for lora in loras:
        read = _read(lora, pipeline)
        _add(digest, checkpoint, lora, read)
        for name, added in _added(checkpoint, component, lora, read).items():
            changes[name].append((lora.scale, added))
    path = folder / f"{component}.{digest.hexdigest()[:24]}.{FOLDED}"
    for other in folder.glob(f"{component}.*.{FOLDED}"):
        if other != path:
            other.unlink()
    if not path.exists():
        specs = [
            TensorSpec(name, stored.dtype, stored.shape, partial(_folded, checkpoint, name, changes[name]))
            for name in changes
            if (stored := checkpoint.tensors[name])
        ]
        write_tensors(
            path, specs, progress=lambda what, done, total: progress(f"folding LoRAs: {what}", done, total)
        )
    tensors: Mapping[str, StoredTensor] = {**checkpoint.tensors, **read_headers((path,))}
    names = tuple(f"{_named(lora)} x {lora.scale:g}" for lora in loras)
    return replace(checkpoint, files=(*checkpoint.files, path), tensors=tensors, loras=names)


@dataclass(frozen=True)
class _Read:
    """A LoRA's tensors in diffusers' own layout, its alphas and peft's description, where it has them."""

    state: Mapping[str, torch.Tensor]
    alphas: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None


def _folded(
    checkpoint: Checkpoint, name: str, added: Sequence[tuple[float, partial[torch.Tensor]]]
) -> torch.Tensor:
    weight = checkpoint.tensor(name)
    total = weight.to(torch.float32, copy=True)
    for scale, read in added:
        total += scale * read().view_as(total)
    folded = total.to(weight.dtype)
    if not folded.isfinite().all() and weight.isfinite().all():
        raise InputError(
            f"model.loras make the weight '{name}' infinite or NaN.",
            "Fetch them again, or lower their scale.",
        )
    return folded


def _read(lora: Lora, pipeline: type[Any]) -> _Read:
    if not hasattr(pipeline, "lora_state_dict"):
        raise InputError(f"{pipeline.__name__} takes no LoRAs.", "Remove model.loras from the recipe.")
    path = Path(lora.source)
    if path.is_absolute() and not path.exists():
        raise InputError(f"The LoRA {path} does not exist.", "Correct model.loras in the recipe.")
    with_alphas = "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters
    try:
        found = pipeline.lora_state_dict(
            lora.source,
            weight_name=lora.weight_name,
            revision=lora.revision,
            use_safetensors=True,  # never a pickle
            return_lora_metadata=True,
            **({"return_alphas": True} if with_alphas else {}),
        )
    except Exception as error:  # of the hub, of safetensors, of names that no conversion knows
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"The LoRA {_named(lora)} cannot be read ({first_line(error)}).",
            "Give a safetensors file that pipe.load_lora_weights takes, by its 'weight_name' where there are several.",
        ) from None
    state, *alphas, metadata = found
    return _Read(state, (alphas[0] if alphas else None) or None, metadata)


def _added(
    checkpoint: Checkpoint, component: str, lora: Lora, read: _Read
) -> dict[str, partial[torch.Tensor]]:
    """What a LoRA adds to which weights of the component, each computed when it is called."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise InputError("LoRAs are read by peft, which is not installed.", "pip install peft") from None
    # The denoiser's part is called after the pipeline's first one, whichever of several it is loaded into.
    prefix = component if any(key.startswith(f"{component}.") for key in read.state) else "transformer"
    if not any(key.startswith(f"{prefix}.") for key in read.state):
        raise InputError(
            f"The LoRA {_named(lora)} changes nothing in '{component}'.",
            "Name the component that it is for by 'component', or remove it.",
        )
    if other := [
        key for key in read.state if key.startswith(f"{prefix}.") and "lora" not in key and "lokr" not in key
    ]:
        raise InputError(
            f"The LoRA {_named(lora)} sets '{other[0]}', which is of no low rank.",
            "Load it into the pipeline, save that (save_pretrained), and give the folder as model.source.",
        )
    module: Any = checkpoint.build("meta")
    # Adapters go to the device of what they are beside: weights that say CPU and take one number each.
    nothing = {name: torch.zeros(()).expand(x.shape) for name, x in module.state_dict().items()}
    module.load_state_dict(nothing, assign=True)
    try:
        with _quietly():
            module.load_lora_adapter(
                dict(read.state),
                prefix=prefix,
                network_alphas=read.alphas,
                metadata=read.metadata,
                low_cpu_mem_usage=True,
            )
    except Exception as error:  # whatever diffusers and peft make of it
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"The LoRA {_named(lora)} does not fit '{component}' ({first_line(error)}).",
            f"Give one that was made for a {checkpoint.class_name} of this size.",
        ) from None
    added: dict[str, partial[torch.Tensor]] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            (adapter,) = layer.active_adapters
            if getattr(layer, "lora_variant", {}).get(adapter) or getattr(layer, "lora_bias", {}).get(
                adapter
            ):
                raise InputError(
                    f"The LoRA {_named(lora)} does more to '{path}' than to add a product (DoRA, or a bias).",
                    "Load it into the pipeline, fuse it, save that, and give the folder as model.source.",
                )
            added[f"{path}.weight"] = partial(_delta, layer, adapter)
    return added


def _delta(layer: Any, adapter: str) -> torch.Tensor:
    """Scale B A [out, in, ...] in float32, of a layer of peft's."""
    with torch.no_grad():
        found: torch.Tensor = layer.float().get_delta_weight(adapter)
    return found


def _add(digest: Any, checkpoint: Checkpoint, lora: Lora, read: _Read) -> None:
    """What decides the folded weights; the checkpoint's files by place, size and time."""
    for path in checkpoint.files:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    named = {name: float(value) for name, value in sorted((read.alphas or {}).items())}
    digest.update(repr((lora.scale, named, sorted((read.metadata or {}).items()))).encode())
    for name, tensor in sorted(read.state.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


@contextmanager
def _quietly() -> Iterator[None]:
    """Diffusers speaks of adapters, and of a text encoder's part as of unexpected keys."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _named(lora: Lora) -> str:
    return f"{lora.source}/{lora.weight_name}" if lora.weight_name else lora.source
