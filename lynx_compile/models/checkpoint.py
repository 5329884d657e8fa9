# SPDX-License-Identifier: Apache-2.0
"""A model on disk: its class, its config, and its weights, which stay there until one asks for them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from lynx_compile.errors import InputError, first_line
from lynx_compile.files.digest import file_digest
from lynx_compile.files.progress import Progress, no_progress
from lynx_compile.files.tensors import map_tensor
from lynx_compile.models.original import convert_original
from lynx_compile.models.weight_files import (
    UNQUANTIZED,
    StoredTensor,
    find_weights,
    read_headers,
    refuse_other_formats,
)

# Configs saved before diffusers split the class name it; diffusers' own loader looks at the norm too.
SPLIT_CLASS = "Transformer2DModel"
SPLIT_INTO = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
FUSED = re.compile(r"\.to_(qkv|kv|added_qkv)(_mlp_proj)?\.(weight|bias)$")


@dataclass(frozen=True)
class Checkpoint:
    """A module's weights on disk and what it takes to build the module around them.

    ``folder``: where it was found. ``model_class``: ``package:Class``; for a class of diffusers
    ``diffusers:FluxTransformer2DModel``. ``config``: its arguments, defaults filled in. ``files``: the safetensors
    files that hold the weights. ``tensors``: every tensor in them that the module has, by its name. ``loras``: those
    that are folded into them.
    """

    folder: Path
    model_class: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    loras: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        return self.model_class.rpartition(":")[2]

    @property
    def bytes(self) -> int:
        """Size of the weights as they are stored."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def digest(self, progress: Progress = no_progress) -> str:
        """SHA-256 over the class (the user's own with its source), the config and the weight files' content."""
        digest = hashlib.sha256(
            json.dumps([self.model_class, self.config], sort_keys=True, default=str).encode()
        )
        if not self.model_class.startswith("diffusers:"):
            source = inspect.getsourcefile(_import_class(self.model_class))
            digest.update(file_digest(Path(source)).encode() if source else b"")
        total = sum(path.stat().st_size for path in self.files)
        done = 0
        for path in self.files:

            def report(read: int, path: Path = path, before: int = done) -> None:
                progress(f"reading {path.name}", before + read >> 20, total >> 20)

            digest.update(_digest_once(path, report).encode())
            done += path.stat().st_size
        progress("read", total >> 20, total >> 20)
        return digest.hexdigest()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, mapped from the file, or copied to ``dtype`` where that is another.

        Raises:
            InputError: the file was changed or cut off, or a value is not finite in ``dtype``.
        """
        stored = self.tensors[name]
        try:
            tensor = map_tensor(stored.file, stored.offset, stored.dtype, stored.shape)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{stored.file} cannot be read any more ({error}).",
                "Leave it as it is while the compiler runs.",
            ) from None
        return tensor if dtype is None else _cast(stored, name, tensor, dtype)

    def check_values(self, dtype: torch.dtype, progress: Progress = no_progress) -> None:
        """Read every tensor once, one at a time, and see that its values are finite in ``dtype``.

        Raises:
            InputError: one is not; the message names the tensor and its largest value.
        """
        for number, (name, stored) in enumerate(self.tensors.items()):
            progress(name, number, len(self.tensors))
            _check_finite(stored, name, self.tensor(name), dtype)
        progress("checked", len(self.tensors), len(self.tensors))

    def build(self, device: str = "meta", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The module in evaluation mode, without weights.

        Args:
            device: ``meta``: nothing in it holds memory. ``cpu``: tables that the class computes itself (rotary
                embeddings, for instance) are real, and the weights are on the meta device until ``fill`` puts them in.
            dtype: of the weights and of what the class computes in torch's default dtype, as diffusers has it.
        """
        module = _construct(_import_class(self.model_class), self.config, device, dtype)
        kept = _kept_in_float32(module)
        for name, tensor in module.state_dict(keep_vars=True).items():  # what ``fill`` will find in the files
            tensor.data = tensor.data.to(_dtype_of(name, tensor.dtype, dtype, kept))
        return module.eval().requires_grad_(False)

    def fill(
        self,
        module: torch.nn.Module,
        path: str = "",
        dtype: torch.dtype = torch.float32,
        without: Sequence[str] = (),
    ) -> None:
        """Put the weights into ``module``, which is the submodule ``path`` of what ``build`` returned (or all of it).

        A tensor that is stored in ``dtype`` is mapped and takes no memory of its own.

        Args:
            without: submodules to leave as they are.

        Raises:
            InputError: a file was changed, or a value is not finite in ``dtype``.
        """
        left = tuple(f"{submodule}." for submodule in without)
        kept = _kept_in_float32(_import_class(self.model_class))
        prefix = f"{path}." if path else ""
        values = {}
        for name in module.state_dict():
            if name.startswith(left):
                continue
            stored = self.tensors[prefix + name]
            values[name] = self.tensor(prefix + name, _dtype_of(prefix + name, stored.dtype, dtype, kept))
        module.load_state_dict(values, strict=not left, assign=True)
        module.requires_grad_(False)

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
        """The whole module with its weights, in evaluation mode; in memory once, at most.

        Raises:
            InputError: a file was changed, or a value is not finite in ``dtype``.
        """
        module = self.build("cpu", dtype)
        self.fill(module, dtype=dtype)
        return module.to(device)


def open_checkpoint(
    folder: Path, component: str | None, *, variant: str | None = None, converted: Path | None = None
) -> Checkpoint:
    """Find the weights of a diffusers model, and see from their headers that they fit its config.

    Args:
        folder: of a pipeline, or of the model itself.
        component: the model's folder in the pipeline's; None: ``folder`` is the model's.
        variant: of the weight files' names, as for ``find_weights``.
        converted: folder for weights converted from their authors' own layout; None: those are refused.

    Raises:
        InputError: something is missing, is of a kind that cannot be compiled, or does not fit.
    """
    place = folder / component if component else folder
    config, name = _read_config(folder, component)
    model_class = _diffusers_class(place / "config.json", name, config)
    files = find_weights(place, variant)
    tensors = read_headers(files)
    skeleton = _described(place / "config.json", model_class, config)
    if _is_another_layout(skeleton, tensors):
        files = (convert_original(model_class, place, files, tensors, converted),)
        tensors = read_headers(files)
    return Checkpoint(
        folder=place,
        model_class=f"diffusers:{model_class.__name__}",
        config=_public(skeleton.config),
        files=files,
        tensors=_fitting(place, skeleton, tensors),
    )


def open_module(model_class: str, config: Mapping[str, Any] | Path, weights: Path) -> Checkpoint:
    """The same for a class of the user's own package, which is imported, and is called with ``config``.

    Args:
        model_class: ``package.module:Class``, found as ``python -m`` would: in the working directory too.
        config: its arguments, or a JSON file of them.
        weights: a safetensors file, an index of several, or a folder that holds either.

    Raises:
        InputError: the class cannot be imported or built, or the weights do not fit.
    """
    values = read_json(config) if isinstance(config, Path) else dict(config)
    place = config if isinstance(config, Path) else weights
    skeleton = _described(place, _import_class(model_class), values)
    if not weights.exists():
        raise InputError(f"The weights {weights} do not exist.", "Correct model.weights in the recipe.")
    folder = weights if weights.is_dir() else weights.parent
    if weights.is_dir() or weights.name.endswith(".json"):
        files = find_weights(folder, None)
    else:
        refuse_other_formats(folder, [weights])
        files = (weights,)
    return Checkpoint(folder, model_class, values, files, _fitting(folder, skeleton, read_headers(files)))


def _read_config(folder: Path, component: str | None) -> tuple[dict[str, Any], str | None]:
    """A model's config and the name of its class, which older pipelines only have in their index."""
    place = folder / component if component else folder
    path = place / "config.json"
    if not path.exists():
        raise _no_config(folder, component)
    config = unquantized_config(path)
    name = config.get("_class_name")
    if name is None and component and (folder / "model_index.json").exists():
        entry = read_json(folder / "model_index.json").get(component)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return config, name


def unquantized_config(path: Path) -> dict[str, Any]:
    """A model's config, if its weights are as they were trained.

    Raises:
        InputError: it cannot be read, or says that the weights were quantized.
    """
    config = read_json(path)
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise InputError(f"{path}: the weights are quantized ({method}).", UNQUANTIZED)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a checkpoint.

    Raises:
        InputError: it cannot be read, or is no mapping.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.", "Fetch the checkpoint again.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).", "Fetch the checkpoint again.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no mapping.", "Fetch the checkpoint again.")
    return values


def _no_config(folder: Path, component: str | None) -> InputError:
    place = folder / component if component else folder
    path = place / "config.json"
    if path.is_symlink():
        return InputError(
            f"{path} is a link to nothing: a download that was not finished.", "Fetch it again."
        )
    remedy = "Give the folder or the hub id of a diffusers pipeline."
    if (folder / "config.json").exists() and component:
        remedy = (
            f"{folder} is a model by itself: give the pipeline's folder, or 'components: []' for this model."
        )
    elif (folder / "model_index.json").exists():
        models = sorted(path.parent.name for path in folder.glob("*/config.json"))
        remedy = (
            f"Name a model that is there: {', '.join(models)}." if models else "Fetch the checkpoint again."
        )
    return InputError(f"{path} does not exist.", remedy)


def _diffusers_class(path: Path, name: str | None, config: Mapping[str, Any]) -> type[Any]:
    if name is None:
        raise InputError(
            f"{path} names no class ('_class_name').", "Give a model that diffusers saved (save_pretrained)."
        )
    if name == SPLIT_CLASS:
        name = SPLIT_INTO.get(str(config.get("norm_type")), name)
    found = getattr(diffusers, str(name), None)
    if isinstance(found, type) and issubclass(found, ModelMixin):
        return found
    raise InputError(
        f"{path}: the class '{name}' is no model of diffusers {diffusers.__version__}.",
        "Update diffusers, or give your own class under 'model' as 'module: package:Class'; code from a checkpoint is "
        "never run.",
    )


def _described(path: Path, model_class: type[torch.nn.Module], config: Mapping[str, Any]) -> Any:
    """The module without weights, if the config fits the class."""
    try:
        return _construct(model_class, config, "cpu", torch.float32)
    except Exception as error:  # whatever a constructor makes of wrong arguments
        raise InputError(
            f"{path}: this config does not describe a {model_class.__name__} "
            f"({type(error).__name__}: {first_line(error)}).",
            "Correct it; it may have been written for another class or a newer version.",
        ) from None


def _construct(
    model_class: type[torch.nn.Module], config: Mapping[str, Any], device: str, dtype: torch.dtype
) -> torch.nn.Module:
    with _default_dtype(dtype):
        if device == "meta":
            with torch.device("meta"):
                return _call(model_class, config)
        with accelerate.init_empty_weights(include_buffers=False):
            return _call(model_class, config)


def _call(model_class: type[torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
    if issubclass(model_class, ConfigMixin):
        return model_class.from_config({**config, "_class_name": model_class.__name__})  # type: ignore[return-value]
    return model_class(**config)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _import_class(name: str) -> type[Any]:
    """A class by ``package.module:Class``.

    Raises:
        InputError: it cannot be imported, or is no torch module.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # it is somebody's code
        raise InputError(
            f"'{name}' cannot be imported ({type(error).__name__}: {str(error).strip() or 'no message'}).",
            "Install its package in the environment of lynx-compile, or correct model.module.",
        ) from None
    finally:
        sys.path.pop(0)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise InputError(f"'{name}' is no class of torch modules.", "Correct model.module ('package:Class').")
    return found


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _is_another_layout(module: torch.nn.Module, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the names are not diffusers': its authors call and merge tensors their own way.

    A wrong config makes names missing or unknown; another layout makes many of them both.
    """
    expected = module.state_dict().keys()
    missing, unknown = expected - tensors.keys(), tensors.keys() - expected
    return min(len(missing), len(unknown)) > len(expected) / 20


def _fitting(
    place: Path, module: torch.nn.Module, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The module's own tensors, if all are there, of the right shape, and no others."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    name = type(module).__name__
    if fused := [key for key in tensors if FUSED.search(key) and key not in expected]:
        raise InputError(
            f"{place}: the weights were saved with fused projections ('{fused[0]}').",
            "Call unfuse_qkv_projections() on the model and save it again.",
        )
    for key, shape in expected.items():
        if key in tensors and tensors[key].shape != shape:
            raise InputError(
                f"{place}: '{key}' is {list(tensors[key].shape)} in the weights, and {list(shape)} in a {name} of "
                "this config.",
                "Use the config.json that was saved with these weights.",
            )
    if missing := [key for key in expected if key not in tensors]:
        raise InputError(
            f"{place}: the weights lack '{missing[0]}' {list(expected[missing[0]])}{_others(missing)}, which a {name} "
            "of this config has.",
            "Use the config.json that was saved with these weights, or save the whole model again.",
        )
    if unknown := [key for key in tensors if key not in expected and not _is_ignored(module, key)]:
        raise InputError(
            f"{place}: the weights hold '{unknown[0]}' {list(tensors[unknown[0]].shape)}{_others(unknown)}, which a "
            f"{name} of this config does not have.",
            "Use the config.json that was saved with these weights, or a diffusers version that knows them.",
        )
    return {key: tensors[key] for key in expected}


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _is_ignored(module: torch.nn.Module, key: str) -> bool:
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, key) for pattern in patterns)


def _kept_in_float32(module: Any) -> tuple[str, ...]:
    """Parts of paths whose weights a class of diffusers keeps in float32 whatever dtype is asked for."""
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ())


def _dtype_of(name: str, stored: torch.dtype, wanted: torch.dtype, kept: Sequence[str]) -> torch.dtype:
    if not stored.is_floating_point:
        return stored
    return torch.float32 if any(part in kept for part in name.split(".")) else wanted


def _cast(stored: StoredTensor, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    _check_finite(stored, name, tensor, dtype)
    return tensor.to(dtype)


def _check_finite(stored: StoredTensor, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # a NaN makes both a NaN
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise InputError(
            f"The weight '{name}' in {stored.file} is not finite.", "Fetch or save the checkpoint again."
        )
    if largest > torch.finfo(dtype).max:
        raise InputError(
            f"The weight '{name}' in {stored.file} reaches {largest:.6g}, more than {str(dtype)[6:]} holds "
            f"({torch.finfo(dtype).max:.6g}).",
            "Set 'dtype: bf16' under 'model'.",
        )


_digests: dict[tuple[Path, int, int], str] = {}


def _digest_once(path: Path, report: Callable[[int], None]) -> str:
    """The file's digest; while this process runs, a file of the same size and time is the same."""
    status = path.stat()
    key = (path, status.st_size, status.st_mtime_ns)
    if key not in _digests:
        _digests[key] = file_digest(path, report)
    return _digests[key]
