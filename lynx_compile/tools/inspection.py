# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile inspect``: what an engine is and holds, read from its files; needs neither a GPU nor TensorRT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lynx_compile.engine import trt
from lynx_compile.engine.arrays import DTYPES
from lynx_compile.engine.manifest import Manifest
from lynx_compile.engine.plan import MAGIC, read_plan
from lynx_compile.errors import InputError, LynxError
from lynx_compile.files.digest import file_digest
from lynx_compile.files.outputs import Outputs

ITEM_BYTES = {dtype.safetensors: dtype.numpy.itemsize for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Inspection:
    """An engine's manifest, and what its files say themselves.

    ``engine_bytes``, ``plugin_layers``: found in the engine; None when there is no engine to read.
    ``weight_bytes``: of each plugin layer's tensors, where the safetensors file beside the engine names them.
    ``installed_plugin``: the installed library is the ``same`` build, ``another`` one, or ``none``.
    ``problems``: how the files contradict the manifest, one sentence each.
    """

    manifest: Manifest
    engine_bytes: int | None
    plugin_layers: int | None
    weight_bytes: Mapping[str, int]
    installed_plugin: str
    problems: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self) | {"manifest": self.manifest.model_dump(mode="json")}


def inspect(path: Path) -> Inspection:
    """Look into the engine at ``path``, its manifest and the files that belong to them.

    Raises:
        InputError: ``path`` is a folder, or the manifest is missing or damaged. What else is wrong is in ``problems``.
    """
    outputs = Outputs.find(path)
    path, manifest = outputs.engine, Manifest.read(outputs.manifest)
    problems: list[str] = []
    engine_bytes = plugin_layers = None
    try:
        plan = None if manifest.backend.name == "torch" else read_plan(path)
    except InputError as error:
        plan = None
        problems.append(error.cause)
    if plan is not None:
        engine_bytes, plugin_layers = plan.bytes, plan.records
        if plan.magic != MAGIC:
            problems.append(f"{path} is no TensorRT engine.")
        elif plan.digest.hexdigest() != manifest.engine.sha256:
            problems.append(
                f"{path} is not the engine of its manifest ({plan.bytes} bytes, {manifest.engine.bytes} are due)."
            )
    problems += _file_problems(outputs.folder, manifest)
    return Inspection(
        manifest=manifest,
        engine_bytes=engine_bytes,
        plugin_layers=plugin_layers,
        weight_bytes=_weight_bytes(outputs.weights, manifest),
        installed_plugin=_installed_plugin(manifest),
        problems=tuple(problems),
    )


def _file_problems(folder: Path, manifest: Manifest) -> list[str]:
    """External weights must be there; what else a compilation leaves may be gone, but not be another's."""
    due = {file.file: file.sha256 for file in manifest.files if (folder / file.file).exists()}
    if manifest.weights.file is not None and manifest.weights.sha256 is not None:
        due[manifest.weights.file] = manifest.weights.sha256
    problems = []
    for name, sha256 in due.items():
        try:
            digest = file_digest(folder / name)
        except InputError as error:
            problems.append(error.cause)
            continue
        if digest != sha256:
            what = "hold the weights" if name == manifest.weights.file else "belong to the compilation"
            problems.append(f"{folder / name} does not {what} of this engine.")
    return problems


def _weight_bytes(path: Path, manifest: Manifest) -> dict[str, int]:
    """A layer's tensors are named after it; those that several layers share are in none of the sums."""
    sizes: dict[str, int] = {}
    try:
        with safe_open(path, "np") as file:
            names = file.keys()
            for name in names:
                layer, _, _ = name.rpartition(".")
                part = file.get_slice(name)
                sizes[layer] = (
                    sizes.get(layer, 0) + math.prod(part.get_shape()) * ITEM_BYTES[part.get_dtype()]
                )
    except (OSError, SafetensorError, KeyError):
        return {}  # the engine has them embedded; the file only says how large they are
    return {node.layer: sizes[node.layer] for node in manifest.sparse if node.layer in sizes}


def _installed_plugin(manifest: Manifest) -> str:
    try:
        library = trt.plugin_library()
    except LynxError:
        return "none"
    return "same" if library.sha256 == manifest.plugin.sha256 else "another"
