# SPDX-License-Identifier: Apache-2.0
"""The manifest beside an engine: what it was built from and with, and what a runtime must bind."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lynx_compile.engine.arguments import Constant, Parameter, Structure, check_parameters, tensors_of
from lynx_compile.errors import InputError
from lynx_compile.files.atomic import save_text, strict_json
from lynx_compile.files.strict import Strict

FORMAT_VERSION: Final = 2
LARGEST_BYTES = 16 << 20  # FLUX.1-dev's is 0.2 MB

FileName = Annotated[
    str, Field(pattern=r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$")
]  # never a path out of the folder
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Extent = Annotated[int, Field(ge=-1, lt=2**31)]


class Tensor(Strict):
    """An input or output of the engine. ``dtype``: bf16, fp16, fp32, int32, int64, bool ...

    ``shape``: an extent of -1 is one that a run decides.
    """

    name: str
    dtype: str
    shape: Annotated[tuple[Extent, ...], Field(max_length=8)]


class Length(Strict):
    """An extent of an input that a run decides, between two."""

    tensor: str
    axis: Annotated[int, Field(ge=0, lt=8)]
    smallest: Count
    largest: Count


class EngineFile(Strict):
    file: FileName
    bytes: Count
    sha256: Sha256


class BackendVersion(Strict):
    """The TensorRT that built the engine and has to run it; or torch, for which none was built."""

    name: Literal["tensorrt", "tensorrt_rtx", "torch"]
    version: str


class Plugin(Strict):
    """The plugin library. ``names``: its plugins that the engine uses. ``embedded``: the engine holds a copy of it."""

    names: tuple[str, ...]
    version: str
    namespace: str
    library: FileName
    sha256: Sha256
    embedded: bool


class Weights(Strict):
    """Where the sparse linears' weights are.

    ``embedded``: in the engine. ``external``: in the safetensors ``file``, under the names of the engine
    inputs ``tensors``, which the runtime binds.
    """

    mode: Literal["embedded", "external"]
    file: FileName | None
    sha256: Sha256 | None
    tensors: tuple[Tensor, ...]

    @model_validator(mode="after")
    def _a_file_if_external(self) -> Self:
        external = self.mode == "external"
        if any(external != bool(value) for value in (self.file, self.sha256, self.tensors)):
            raise ValueError("external weights have a file, its digest and tensors, embedded ones do not")
        if any(-1 in tensor.shape for tensor in self.tensors):
            raise ValueError("a weight has no fixed shape")
        return self


class Padding(Strict):
    """An axis of an engine input that a shorter call is padded along. ``mask``: the input that says what counts."""

    tensor: str
    axis: Annotated[int, Field(ge=0, lt=8)]
    mask: str


class Fixed(Strict):
    """A tensor of the call that every call must repeat: the graph has constants for what the model made of it.

    ``sha256``: of its content as the engine takes it. ``where``: the line of the model that decides on it.
    """

    tensor: str
    sha256: Sha256
    where: str


class Call(Strict):
    """How the transformer is called in torch, by the call that was compiled.

    ``class_name``: ``module:Class`` of the transformer. ``parameters``: of its ``forward``. ``tensors``: dtypes
    (float32, bfloat16 ...) of the call's tensors by their flat names; those that are no input of the engine are not
    read. ``constants``: every other leaf but ``return_dict``, None included. ``result``: the result's structure, whose
    tensors are outputs of the engine. ``returns``: how many values the transformer's own tuple has, where it is known.
    """

    class_name: str
    parameters: tuple[Parameter, ...]
    tensors: dict[str, str]
    constants: dict[str, Constant]
    padding: tuple[Padding, ...]
    fixed: tuple[Fixed, ...]
    result: Structure
    returns: Count | None = None

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        check_parameters(self.parameters)
        tensors_of(self.result)
        if unknown := {fixed.tensor for fixed in self.fixed} - self.tensors.keys():
            raise ValueError(f"{min(unknown)!r:.100} is fixed, and no tensor of the call")
        return self


class Source(Strict):
    """The model: as the recipe names it, its ``config.json``, and the SHA-256 over the files that were read.

    ``loras``: those folded into its weights.
    """

    model: str
    subfolder: str
    revision: str | None
    family: str
    config: dict[str, Any]
    sha256: Sha256
    loras: tuple[str, ...] = ()


def form_in_words(operand: Literal["activation", "weight", "none"], fp8: bool) -> str:
    """Such as "2:4 weights in FP8"; "dense" is what is left as it was."""
    if operand == "none":
        return "dense FP8" if fp8 else "dense"
    return f"2:4 {operand}s{' in FP8' * fp8}"


class SparseLinears(Strict):
    """One plugin layer and the linears that it replaces.

    ``operand``: which one is 2:4, if one is. ``fp8``: whether it multiplies in FP8. ``producer``: what the layer makes
    its input of, where it does. ``errors``: layer errors, |y - y_dense| / |y_dense| of each linear alone on the dense
    model's inputs, as calibration expects them. ``solved_errors``: those before tuning, equal where it moved nothing;
    () where an older compiler wrote the manifest. ``tokens``: rows of the input. ``gain``: how many times as fast as
    dense by ``costs``; null where they do not tell. ``sizes``: output channels of each linear. ``activation_from``: the
    first of them that goes through GELU; null where none does. ``metadata_layout``: of a 2:4 weight in 16 bits.
    ``gated``: of the weight's rows, counted linear by linear, the first that is activated, the first that is a gate,
    and how many there are of each: they lie in turns of 8, behind all others; null where the layer holds no gate.
    """

    layer: str
    operand: Literal["activation", "weight", "none"]
    fp8: bool = False
    producer: Literal["layer norm", "rms norm", "gelu", "gated"] | None
    linears: tuple[str, ...]
    in_channels: Count
    out_channels: Count
    rank: Count
    norm_scale: bool
    errors: tuple[float, ...]
    tokens: Count
    gain: Annotated[float, Field(gt=0)] | None
    sizes: tuple[Count, ...] = ()
    activation_from: Count | None = None
    metadata_layout: Literal[80, 90] | None = None
    gated: tuple[int, int, Count] | None = None
    solved_errors: tuple[float, ...] = ()

    @property
    def form(self) -> str:
        """In words."""
        return form_in_words(self.operand, self.fp8)

    @model_validator(mode="after")
    def _an_error_a_linear(self) -> Self:
        if {len(self.errors), len(self.solved_errors or self.errors)} != {len(self.linears)}:
            raise ValueError("there is not one error for each linear")
        return self


class DenseLinear(Strict):
    linear: str
    reason: str


class Stage(Strict):
    """What a stage of the compilation took; ``reused``: in an earlier run, from which its result is."""

    name: str
    seconds: Annotated[float, Field(ge=0)]
    peak_bytes: Count | None
    reused: bool


Error = Annotated[float, Field(ge=0)]


class CandidateForm(Strict):
    """What a linear could be: ``operand`` and ``fp8`` as of ``SparseLinears``; dense is one of them, of gain 1.

    ``gain``: how many times as fast as dense its node is; ``measured``: by the recipe's costs, else by a roofline.
    ``error``: |y - y_dense| / |y_dense| of the model's output if this linear alone is that, to first order; null where
    another form is as fast and errs less as a rule, so that this one was not solved.
    """

    operand: Literal["activation", "weight", "none"]
    fp8: bool
    gain: Annotated[float, Field(gt=0)]
    measured: bool
    error: Error | None

    @property
    def form(self) -> str:
        """In words."""
        return form_in_words(self.operand, self.fp8)


class LinearChoice(Strict):
    """A linear that the budget decided on. ``chosen``: position among ``candidates``. ``reason``: for people.

    ``microseconds``: of the dense linear, by the roofline of an H100; a candidate takes that divided by its gain, and
    these times are what the budget weighs.
    """

    linear: str
    candidates: tuple[CandidateForm, ...]
    chosen: Count
    reason: str
    microseconds: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.chosen >= len(self.candidates):
            raise ValueError(f"candidate {self.chosen} of {len(self.candidates)} was chosen")
        return self


class AtOutput(Strict):
    """|y - y_dense| / |y_dense| of the model's output. ``predicted``: from each linear's own, for the solved weights.

    ``solved`` and ``tuned``: measured on calls held out; null where nobody measured, or tuned.
    """

    predicted: Error
    solved: Error | None
    tuned: Error | None


class AtSteps(AtOutput):
    """The same at the denoising steps from ``first`` to ``last``."""

    first: Count
    last: Count


class HalfOfSteps(Strict):
    """What an engine for these steps alone would be: speed on the linears under the same budget, by the prediction."""

    first: Count
    last: Count
    speed: Annotated[float, Field(gt=0)]


class Budget(Strict):
    """What decided on the linears whose form the recipe leaves open: the error at the model's output.

    ``limit`` and ``value``: the recipe's key, or the default's. ``speed``: how many times as fast as dense the linears
    of the blocks are together, those that stay dense included, by costs or a roofline. ``error``: over the calls, each
    weighed as tuning weighs it; ``steps``: by denoising steps. ``calls``: held out, on which it was measured. ``psnr``:
    of images against the dense model's, dB, where it was measured. ``stepped_back``: linears whose form was too much
    for the budget when it was measured, and that have a safer one. ``halves``: of an engine for each half of the steps.
    """

    limit: Literal["max_output_error", "min_psnr", "min_speed"]
    value: float
    speed: Annotated[float, Field(gt=0)]
    error: AtOutput
    psnr: float | None
    calls: Count
    steps: tuple[AtSteps, ...]
    halves: tuple[HalfOfSteps, ...]
    stepped_back: tuple[str, ...]
    linears: tuple[LinearChoice, ...]

    @property
    def summary(self) -> str:
        """A line for people."""
        measured = self.error.solved if self.error.tuned is None else self.error.tuned
        found = (
            f"  {self.speed:.2f}x on the blocks' linears, output error {self.error.predicted:.4f} predicted"
        )
        found += f", {measured:.4f} measured" if measured is not None else ""
        return f"{found} ({self.limit} {self.value:g})"


class Manifest(Strict):
    """All about an engine. ``inputs`` are those that a caller gives, without ``weights.tensors``.

    ``lengths``: of the inputs' extents that are -1. ``call``: how torch calls the transformer; None where it was no
    torch module. ``costs``: name of the file of measured times that the recipe gave, if any. ``files``: the ONNX file
    that the engine was built from and its weights, as they were written. ``budget``: what decided on the linears; None
    where the recipe fixed every form, or speed alone decided.
    """

    format_version: Literal[2]
    compiler: str
    engine: EngineFile
    backend: BackendVersion
    gpus: tuple[str, ...]
    plugin: Plugin
    plugin_layers: Count
    dtype: Literal["bf16", "fp16"]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    lengths: tuple[Length, ...] = ()
    weights: Weights
    recipe_sha256: Sha256
    source: Source
    call: Call | None
    costs: FileName | None
    sparse: tuple[SparseLinears, ...]
    dense: tuple[DenseLinear, ...]
    files: tuple[EngineFile, ...] = ()
    stages: tuple[Stage, ...] = ()
    budget: Budget | None = None

    @model_validator(mode="after")
    def _every_tensor_once(self) -> Self:
        tensors = (*self.inputs, *self.outputs, *self.weights.tensors)
        name, count = Counter(tensor.name for tensor in tensors).most_common(1)[0] if tensors else ("", 0)
        if count > 1:
            raise ValueError(f"the tensor {name!r:.100} is there twice")
        return self

    @model_validator(mode="after")
    def _lengths_are_of_open_axes(self) -> Self:
        shapes = {tensor.name: tensor.shape for tensor in self.inputs}
        for length in self.lengths:
            shape = shapes.get(length.tensor, ())
            if length.axis >= len(shape) or shape[length.axis] != -1:
                raise ValueError(f"{length.tensor!r:.100} has no open axis {length.axis}")
        return self

    @model_validator(mode="after")
    def _the_call_is_of_this_engine(self) -> Self:
        if self.call is None:
            return self
        inputs = {tensor.name: len(tensor.shape) for tensor in self.inputs}
        for name in [*inputs, *(pad.mask for pad in self.call.padding)]:
            if name not in self.call.tensors or name not in inputs:
                raise ValueError(f"{name!r:.100} is not both an input and a tensor of the call")
        for pad in self.call.padding:
            if pad.axis >= inputs.get(pad.tensor, 0):
                raise ValueError(f"{pad.tensor!r:.100} has no axis {pad.axis} to pad")
        if unknown := set(tensors_of(self.call.result)) - {tensor.name for tensor in self.outputs}:
            raise ValueError(f"the result {min(unknown)!r:.100} is no output")
        return self

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
            cause = (
                f"{path} is no manifest of format version {FORMAT_VERSION} (but of {reprlib.repr(found)})."
            )
            raise InputError(cause, "Compile the engine again with this version of lynx-compile.")
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "inputs"
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{path}: {key!r:.200} is wrong ({message:.300}).", _AGAIN) from None

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        save_text(path, self.model_dump_json(indent=2) + "\n")

    @property
    def gain(self) -> float | None:
        """How many times as fast as dense the sparse linears are together, by the gains of those that have one."""
        dense = sparse = 0.0  # times, in multiply-adds at the dense rate
        for node in self.sparse:
            if node.gain is not None:
                macs = node.tokens * node.in_channels * node.out_channels
                dense, sparse = dense + macs, sparse + macs / node.gain
        return dense / sparse if sparse else None

    def summary(self) -> str:
        """A few lines for people."""
        megabytes = self.engine.bytes / 1e6
        sparse = sum(len(node.linears) for node in self.sparse)
        expected = f"  expected {self.gain:.2f}x on the sparse linears ({self.costs})" if self.gain else None
        return "\n".join(
            [
                f"{self.engine.file}: {megabytes:.1f} MB, {self.dtype}, for {', '.join(self.gpus)}",
                f"  {sparse} linears in {self.plugin_layers} plugin layers, {len(self.dense)} dense",
                *([expected] if expected else []),
                *([self.budget.summary] if self.budget else []),
                f"  {self.backend.name} {self.backend.version}, weights {self.weights.mode}",
            ]
        )


def runs_on(manifest: Manifest, gpu: str) -> bool:
    """Whether the engine runs on a GPU of this architecture (``sm89``), as far as can be told before TensorRT sees it.

    An engine holds TensorRT's kernels and the plugin's, and both must run:

    - on an architecture that it was built for, both do;
    - an engine of TensorRT for RTX holds what is compiled on the GPU at hand, and the plugin library holds PTX, from
      which the driver makes code for any later GPU: so it may run on every architecture later than one that it was
      built for, but for those that TensorRT for RTX leaves out. TensorRT has the last word when it loads the engine;
    - TensorRT's own engines are machine code of the GPU that built them, and so are the plugin's kernels for Hopper
      (``sm_90a``, which no later architecture runs): nowhere else.

    ``runs_on`` in plugins/runtime/src/manifest.cpp is the same for C++; tests/engine/gpus.json holds both to one table.
    """
    if gpu in manifest.gpus:
        return True
    if manifest.backend.name != "tensorrt_rtx" or gpu in _NOT_OF_RTX:
        return False
    return any(0 < _number(older) < _number(gpu) for older in manifest.gpus)


_AGAIN = "Compile the engine again."
_NOT_OF_RTX = ("sm90", "sm100", "sm103", "sm110")  # by its support matrix


def _number(gpu: str) -> int:
    """89 of ``sm89``; 0 of anything else."""
    return int(gpu[2:]) if re.fullmatch(r"sm[0-9]{2,3}", gpu) else 0


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise InputError(
                f"{path} is larger than {LARGEST_BYTES >> 20} MiB.", "Give the manifest, not the engine."
            )
        return strict_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"The manifest {path} does not exist.", "Keep it beside the engine, or compile again."
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its permissions."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is cut off or no JSON ({error!s:.200}).", _AGAIN) from None
