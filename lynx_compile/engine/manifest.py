# SPDX-License-Identifier: Apache-2.0
"""The manifest beside an engine: what it was built from and with, and what a runtime must bind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lynx_compile import __version__
from lynx_compile.engine import trt
from lynx_compile.errors import InputError
from lynx_compile.files import file_digest, save_text

if TYPE_CHECKING:
    from lynx_compile.engine.build import BuiltEngine
    from lynx_compile.models import DiT
    from lynx_compile.recipe import Recipe
    from lynx_compile.resume import Cost
    from lynx_compile.rewrite import LynxOnnx

FORMAT_VERSION: Final = 1
LARGEST_BYTES = 16 << 20  # FLUX.1-dev's is 0.2 MB

FileName = Annotated[
    str, Field(pattern=r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$")
]  # never a path out of the folder
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Tensor(_Strict):
    """An input or output of the engine. ``dtype``: bf16, fp16, fp32, int32, int64, bool ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class EngineFile(_Strict):
    file: FileName
    bytes: Count
    sha256: Sha256


class BackendVersion(_Strict):
    """The TensorRT that built the engine and has to run it."""

    name: Literal["tensorrt", "tensorrt_rtx"]
    version: str


class Plugin(_Strict):
    """The plugin library. ``embedded``: the engine holds a copy of it."""

    name: str
    version: str
    namespace: str
    library: FileName
    sha256: Sha256
    embedded: bool


class Weights(_Strict):
    """Where the sparse linears' weights are.

    ``embedded``: in the engine. ``external``: in the safetensors ``file``, under the names of the engine
    inputs ``tensors``, which the runtime binds.
    """

    mode: Literal["embedded", "external"]
    file: FileName | None
    sha256: Sha256 | None
    tensors: tuple[Tensor, ...]


class Source(_Strict):
    """The model: as the recipe names it, and the SHA-256 over the files that were read."""

    model: str
    subfolder: str
    revision: str | None
    family: str
    sha256: Sha256


class SparseLinears(_Strict):
    """One plugin layer and the linears that it replaces.

    ``operand``: which one is 2:4. ``error``: relative, on the calibration inputs.
    """

    layer: str
    operand: Literal["activation", "weight"] = "activation"
    linears: tuple[str, ...]
    in_channels: Count
    out_channels: Count
    rank: Count
    norm_scale: bool
    error: float


class DenseLinear(_Strict):
    linear: str
    reason: str


class Stage(_Strict):
    """What a stage of the compilation took; ``reused``: in an earlier run, from which its result is."""

    name: str
    seconds: Annotated[float, Field(ge=0)]
    peak_bytes: Count | None
    reused: bool


class Manifest(_Strict):
    """All about an engine. ``inputs`` are those that a caller gives, without ``weights.tensors``."""

    format_version: Literal[1]
    compiler: str
    engine: EngineFile
    backend: BackendVersion
    gpus: tuple[str, ...]
    plugin: Plugin
    plugin_layers: Count
    dtype: Literal["bf16", "fp16"]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: Weights
    recipe_sha256: Sha256
    source: Source
    sparse: tuple[SparseLinears, ...]
    dense: tuple[DenseLinear, ...]
    stages: tuple[Stage, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a manifest.

        Raises:
            InputError: the file is missing, too large, cut off or no JSON, is of another format version, or
                has an unknown, missing or wrong key.
        """
        values = _json(path)
        found = values.get("format_version") if isinstance(values, dict) else None
        if found != FORMAT_VERSION:
            cause = f"{path} is no manifest of format version {FORMAT_VERSION} (but of {found})."
            raise InputError(cause, "Compile the engine again with this version of lynx-compile.")
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: '{key}' is wrong ({first['msg']}).", _AGAIN) from None

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        save_text(path, self.model_dump_json(indent=2) + "\n")

    def summary(self) -> str:
        """A few lines for people."""
        megabytes = self.engine.bytes / 1e6
        sparse = sum(len(node.linears) for node in self.sparse)
        return "\n".join(
            [
                f"{self.engine.file}: {megabytes:.1f} MB, {self.dtype}, for {', '.join(self.gpus)}",
                f"  {sparse} linears sparse in {self.plugin_layers} plugin layers, {len(self.dense)} dense",
                f"  {self.backend.name} {self.backend.version}, weights {self.weights.mode}",
            ]
        )


def describe(
    recipe: Recipe, dit: DiT, lynx: LynxOnnx, built: BuiltEngine, costs: Mapping[str, Cost] | None = None
) -> Manifest:
    """The manifest of an engine that ``build`` has made; ``costs``: of the stages, in their order."""
    names = {tensor.name for tensor in built.inputs}
    assert names.issuperset(lynx.external_inputs), "build checks it"
    return Manifest(
        format_version=FORMAT_VERSION,
        compiler=__version__,
        engine=EngineFile(file=built.path.name, bytes=built.bytes, sha256=built.sha256),
        backend=BackendVersion.model_validate({"name": built.backend, "version": built.backend_version}),
        gpus=built.gpus,
        plugin=Plugin(
            name=trt.PLUGIN_NAME,
            version=trt.PLUGIN_VERSION,
            namespace=trt.PLUGIN_NAMESPACE,
            library=built.plugin.name,
            sha256=built.plugin_sha256,
            embedded=built.plugin_embedded,
        ),
        plugin_layers=built.plugin_layers,
        dtype=recipe.model.dtype,
        inputs=tuple(tensor for tensor in built.inputs if tensor.name not in lynx.external_inputs),
        outputs=built.outputs,
        weights=_weights(lynx, built),
        recipe_sha256=recipe.digest,
        source=Source(
            model=dit.model.source,
            subfolder=dit.model.subfolder,
            revision=dit.model.revision,
            family=dit.family,
            sha256=dit.digest,
        ),
        sparse=tuple(_sparse(node) for node in lynx.sparse),
        dense=tuple(DenseLinear(linear=linear.path, reason=linear.reason) for linear in lynx.dense),
        stages=tuple(Stage(name=name, **asdict(cost)) for name, cost in (costs or {}).items()),
    )


_AGAIN = "Compile the engine again."


def _weights(lynx: LynxOnnx, built: BuiltEngine) -> Weights:
    if not lynx.external_inputs:
        return Weights(mode="embedded", file=None, sha256=None, tensors=())
    tensors = tuple(tensor for tensor in built.inputs if tensor.name in lynx.external_inputs)
    path = lynx.weights_path
    return Weights(mode="external", file=path.name, sha256=file_digest(path), tensors=tensors)


def _sparse(node: Any) -> SparseLinears:
    return SparseLinears(
        layer=node.name,
        linears=node.linears,
        in_channels=node.in_channels,
        out_channels=node.out_channels,
        rank=node.rank,
        norm_scale=node.norm_scale,
        error=node.error,
    )


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise InputError(
                f"{path} is larger than {LARGEST_BYTES >> 20} MiB.", "Give the manifest, not the engine."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"The manifest {path} does not exist.", "Keep it beside the engine, or compile again."
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its permissions."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is cut off or no JSON ({error}).", _AGAIN) from None
