# SPDX-License-Identifier: Apache-2.0
"""Which safetensors files of a folder hold a model's weights, and what their headers say; no tensor is read here."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lynx_compile.errors import InputError

WHOLE = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+))?\.safetensors")
INDEX = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<early>[\w-]+))?\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json"
)
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.[\w-]+)?\.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors")
ADAPTER_KEY = re.compile(
    r"\.(lora_[AB]|lora_(down|up|embedding_[AB]|magnitude_vector)|base_layer|hada_w|lokr_w)"
)
# What bitsandbytes, torchao, scaled FP8, GPTQ, AWQ and Nunchaku keep beside the numbers they rounded.
QUANTIZED_KEY = re.compile(
    r"\.(absmax|nested_absmax|quant_map|quant_state\..*|SCB|weight_scale(_\w+)?|scale_weight|scale_input|input_scale"
    r"|qweight|qzeros|wscales|wcscales)$|^scaled_fp8$|\.weight:_data$"
)
UNQUANTIZED = "Give the unquantized checkpoint (bf16, fp16 or fp32): the compiler rounds the weights itself."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its dtype and shape there, and where in the file its bytes lie."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int


def find_weights(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The safetensors files of ``folder`` that together hold the model, complete, in a fixed order.

    Args:
        variant: of the file names (``fp16`` of ``diffusion_pytorch_model.fp16.safetensors``). None: the files
            without one, or, where there are none, the only variant there is.

    Raises:
        InputError: there is none, or only a part, or more than one model, or files of another kind.
    """
    wholes = {match["variant"]: path for path, match in _matching(folder, WHOLE)}
    indices = {match["variant"] or match["early"]: path for path, match in _matching(folder, INDEX)}
    if not wholes and not indices:
        return _loose_weights(folder)
    chosen = _variant(folder, variant, [*wholes, *indices])
    whole, index = wholes.get(chosen), indices.get(chosen)
    if index is None:
        assert whole is not None
        return (_present(whole),)
    shards = _shards(index)
    if whole is None or shards == (whole,):
        return tuple(_present(shard) for shard in shards)
    if all(shard.exists() for shard in shards):
        raise InputError(
            f"{folder} holds its weights twice: whole in {whole.name}, and in the shards of {index.name}.",
            "Remove those that are not meant (an index left from an earlier save, for instance).",
        )
    log.warning("%s: taking %s; the shards that %s names are not there", folder, whole.name, index.name)
    return (_present(whole),)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of these safetensors files by its name.

    Raises:
        InputError: a file is damaged or cut off, holds quantized numbers or adapters, or repeats another's tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in _header(path).items():
            if name in tensors:
                raise InputError(
                    f"The tensor '{name}' is in both {tensors[name].file.name} and {path}.",
                    "Remove the file that does not belong to this model.",
                )
            tensors[name] = tensor
    _refuse_adapters(tensors)
    return tensors


def refuse_other_formats(path: Path, files: Sequence[Path]) -> None:
    """Say what ``files`` are, if they are weights of a kind that is not read.

    Raises:
        InputError: they are GGUF, pickles or an adapter alone.
    """
    names = {file.name: file.suffix.lower() for file in files}
    for name, suffix in names.items():
        if suffix == ".gguf":
            raise InputError(f"{path} holds quantized weights ({name}, GGUF).", UNQUANTIZED)
    if adapter := next((name for name in names if name in ADAPTER_FILES), None):
        raise _adapter_alone(path, adapter)
    for name, suffix in names.items():
        if suffix in PICKLES:
            raise InputError(
                f"{path} holds its weights as a pickle ({name}), and pickles can run code: they are never loaded.",
                "Load it where you trust it and save it again with save_pretrained(..., safe_serialization=True).",
            )


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    found = ((path, pattern.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    return [(path, match) for path, match in found if match and not SHARD.fullmatch(path.name)]


def _variant(folder: Path, wanted: str | None, there: Sequence[str | None]) -> str | None:
    names = sorted({name for name in there if name is not None})
    if wanted is not None and wanted not in names:
        raise InputError(
            f"{folder} holds no weights of the variant '{wanted}'.",
            f"Set model.variant to {' or '.join(names)}."
            if names
            else "Remove model.variant: there is none.",
        )
    if wanted is not None or None in there:
        return wanted
    if len(names) > 1:
        raise InputError(
            f"{folder} holds the variants {' and '.join(names)} of its weights.",
            f"Choose one: 'variant: {names[0]}' under 'model'.",
        )
    return names[0]


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names, in order."""
    try:
        names = set(json.loads(_present(index).read_text(encoding="utf-8"))["weight_map"].values())
        return tuple(index.parent / Path(name).name for name in sorted(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is no index of weights ({error}).", "Fetch the checkpoint again."
        ) from None


def _loose_weights(folder: Path) -> tuple[Path, ...]:
    """Weights under other names than diffusers': all shards of one model, or the one file that is there."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    files = [path for path in files if path.name not in ADAPTER_FILES]
    matches = [SHARD.fullmatch(path.name) for path in files]
    sets = {(match["name"], match["count"], match["variant"]) for match in matches if match}
    if len(sets) == 1 and all(matches):
        ((name, count, variant),) = sets
        numbers = range(1, int(count) + 1)
        shards = (folder / f"{name}-{n:05d}-of-{count}{variant or ''}.safetensors" for n in numbers)
        return tuple(_present(shard) for shard in shards)
    if len(files) == 1:
        return (_present(files[0]),)
    if files:
        raise InputError(
            f"{folder} holds several weight files ({', '.join(path.name for path in files)}) and no index of them.",
            "Keep the file or the shards of one model in it.",
        )
    refuse_other_formats(folder, sorted(folder.iterdir()))
    raise InputError(
        f"{folder} holds no weights (no safetensors file).",
        "Fetch the checkpoint again, with this folder's files.",
    )


def _present(path: Path) -> Path:
    """``path``, if the file is there."""
    if path.exists():
        return path
    if path.is_symlink():
        raise InputError(
            f"{path} is a link to {path.readlink()}, which is not there: a download that was not finished, or a cache "
            "that was moved.",
            "Fetch the checkpoint again.",
        )
    raise InputError(
        f"{path} is missing, and the index of the weights names it.", "Fetch the checkpoint again."
    )


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        # It checks the header, and that the file is as long as that says. For torch it would map the file as writable,
        # which Linux refuses where it is larger than all memory.
        with safe_open(path, "np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from None
    entries.pop("__metadata__", None)
    _refuse_quantized(path, {name: entry["dtype"] for name, entry in entries.items()})
    return {
        name: StoredTensor(
            path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start, end - start
        )
        for name, entry in entries.items()
        for start, end in (entry["data_offsets"],)
    }


def _unreadable(path: Path, error: Exception) -> InputError:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as unread:
        return InputError(
            f"{path} cannot be read ({unread.strerror}).", "Check the file and its permissions."
        )
    if start.startswith(b"version https://git-lfs"):
        return InputError(
            f"{path} is a Git LFS pointer and not the file itself.", "Run 'git lfs pull' in the folder."
        )
    if start.startswith(b"GGUF"):
        return InputError(f"{path} holds quantized weights (GGUF).", UNQUANTIZED)
    size = path.stat().st_size
    return InputError(
        f"{path} is damaged or cut off ({error}; it has {size} bytes).", "Fetch the checkpoint again."
    )


def _refuse_quantized(path: Path, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPES or QUANTIZED_KEY.search(name):
            raise InputError(f"{path} holds quantized weights ('{name}' is {dtype}).", UNQUANTIZED)


def _refuse_adapters(tensors: Mapping[str, StoredTensor]) -> None:
    adapters = [name for name in tensors if ADAPTER_KEY.search(name)]
    if not adapters:
        return
    file = tensors[adapters[0]].file
    if len(adapters) == len(tensors):
        raise _adapter_alone(file.parent, file.name)
    raise InputError(
        f"{file} holds adapters that are not merged ('{adapters[0]}').",
        "Merge them into the weights and save again (fuse_lora, unload_lora_weights, save_pretrained).",
    )


def _adapter_alone(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder} holds an adapter ({name}) and no model.",
        "Give the pipeline it was trained for as model.source, and a LoRA under model.loras.",
    )


# The rest (F8_E4M3, F8_E5M2, I8, U8, ...) only occurs where weights were quantized.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
