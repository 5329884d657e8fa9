# SPDX-License-Identifier: Apache-2.0
"""The recipe: what to compile, how its pipeline is called, for which GPUs, how sparse. YAML in, frozen values out."""

from __future__ import annotations

import difflib
import hashlib
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lynx_compile.errors import InputError
from lynx_compile.files import plain_yaml
from lynx_compile.files.strict import Strict

HUB_PAGE = re.compile(
    r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+?)(?:\.git)?"
    r"(?:/(?P<kind>tree|blob|resolve)/(?P<revision>[^/?#]+)[^?#]*)?/?(?:[?#].*)?$"
)
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
GpuTarget = Literal["sm80", "sm86", "sm89", "sm90", "sm120"]
GPU_TARGETS: tuple[GpuTarget, ...] = ("sm80", "sm86", "sm89", "sm120")  # of TensorRT for RTX
Operand = Literal["activation", "weight"]
NodeOperand = Operand | Literal["none"]  # which operand is 2:4, if one is
OperandGlobs = dict[str, Literal["auto", "activation", "weight", "none"]]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Paths in it are relative to the recipe's own folder.

    Args:
        settings: values in the place of the file's, as ``section.key=YAML``; of the same key the last counts.

    Raises:
        InputError: the file is missing, is no YAML mapping, or a key or value is wrong. The message names
            the file, the line and the key, or the setting.
    """
    text = _read(path)
    values, node = plain_yaml.parse(path, text)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections.", f"Start with '{_SECTIONS[0]}:'.")
    options = {tuple(setting.partition("=")[0].split(".")): f"--set {setting}" for setting in settings}
    for setting in settings:
        _set(values, setting)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # A misspelt key is also a missing one; the misspelling is what to show.
        first = min(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
        raise InputError(*_explain(path, node, options, first)) from None
    return recipe.resolved(path.resolve().parent)


def _set(values: dict[str, Any], setting: str) -> None:
    """Put ``section.key=YAML`` into a recipe's values; sections that are not there, or off, begin empty."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(
            f"--set {setting}: this names no key and value.", "Write it as --set section.key=value."
        )
    *sections, last = key.split(".")
    inside = values
    for name in sections:
        if inside.get(name) in (None, False, "off"):
            inside[name] = {}
        inside = inside[name]
        if not isinstance(inside, dict):
            raise InputError(f"--set {setting}: '{name}' has no keys of its own.", f"Set '{name}' itself.")
    inside[last], _ = plain_yaml.parse(Path(f"--set {setting}"), text)


def _local(folder: Path, source: str) -> str:
    """A hub id as it is, unless there is a file of that name; else an absolute path."""
    local = folder / Path(source).expanduser()
    return source if HUB_ID.match(source) and not local.exists() else str(local.resolve())


def _listed(value: Any) -> Any:
    """YAML's lists are tuples here; one text is a list of itself."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


DEFAULT_OUTPUT_ERROR = 0.015  # of a recipe without a budget
DEFAULT_PROMPTS = Path(__file__).resolve().parent / "data" / "prompts.txt"  # by tools/write_prompts.py


class Section(Strict):
    """A section of the recipe. The strings below its keys are their descriptions in pydantic's ``model_fields``, from
    which ``lynx-compile init`` and the recipe reference are written: plain text, null for None, keys in backticks."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Lora(Section):
    """A LoRA that is folded into the weights before anything is measured."""

    source: str = Field(min_length=1)
    """A safetensors file or a folder, relative to the recipe, or a hub id: what pipe.load_lora_weights takes."""
    weight_name: str | None = None
    """The file, where the source holds several."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: its main branch."""
    scale: float = Field(1.0, allow_inf_nan=False)
    """Of what it adds, as the weights of set_adapters."""
    component: str | None = None
    """The denoiser that it is for; null: the first one."""

    def resolved(self, folder: Path) -> Lora:
        return self.model_copy(update={"source": _local(folder, self.source)})


class Model(Section):
    """A pipeline or model of diffusers: what is compiled."""

    source: str = Field(min_length=1)
    """Hub id (owner/name) or local folder, relative to the recipe; safetensors only."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: its main branch."""
    variant: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = None
    """Of the weight files' names (fp16); null: plain ones, else the only ones there are."""
    pipeline: Annotated[str, Field(pattern=r"^\w+$")] | None = None
    """Class of diffusers to run instead of the one that model_index.json names (FluxKontextPipeline)."""
    components: tuple[str, ...] | None = None
    """The denoisers to compile; null: every one that the pipeline calls."""
    loras: tuple[Lora, ...] = ()
    """LoRAs to fold into the weights before anything else."""
    dtype: Literal["bf16", "fp16"] = "bf16"
    """Of the engine's weights and activations."""

    _lists = field_validator("components", "loras", mode="before")(_listed)

    @model_validator(mode="before")
    @classmethod
    def _pages_of_the_hub_are_its_ids(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(source := values.get("source"), str):
            return values
        if not (page := HUB_PAGE.match(source)):
            if "://" in source:
                raise ValueError(
                    f"source is a URL ({_short(source)}); give a hub id (owner/name) or a folder"
                )
            return values
        if page["kind"] in ("blob", "resolve"):
            raise ValueError(
                f"source is one file; give its repository ({page['id']}), if that holds a pipeline"
            )
        revision = values.get("revision") or (page["revision"] if page["revision"] != "main" else None)
        return {**values, "source": page["id"], "revision": revision}

    def resolved(self, folder: Path) -> Model:
        loras = tuple(lora.resolved(folder) for lora in self.loras)
        return self.model_copy(update={"source": _local(folder, self.source), "loras": loras})


class ModuleModel(Section):
    """A torch module of the user's own package, which is imported because the recipe says so. Needs a recording."""

    module: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """The class, as package.module:Class."""
    config: Annotated[str, Field(min_length=1)] | dict[str, Any] = Field(default_factory=dict)
    """The arguments it is made with, or a JSON file of them."""
    weights: Annotated[str, Field(min_length=1)]
    """A safetensors file, an index of several, or a folder that holds either."""
    dtype: Literal["bf16", "fp16"] = "bf16"
    """Of the engine's weights and activations."""

    def resolved(self, folder: Path) -> ModuleModel:
        names = ["weights"] if isinstance(self.config, dict) else ["weights", "config"]
        return self.model_copy(update={name: _absolute(folder, getattr(self, name)) for name in names})


class OnnxModel(Section):
    """A transformer that is ONNX already. Needs a recording, and has no budget: it has no gradients."""

    onnx: Annotated[str, Field(min_length=1)]
    """The file; its external data lie beside it."""
    dtype: Literal["bf16", "fp16"] = "bf16"
    """Of the engine's weights and activations."""

    def resolved(self, folder: Path) -> OnnxModel:
        return self.model_copy(update={"onnx": _absolute(folder, self.onnx)})


def _absolute(folder: Path, name: str) -> str:
    return str((folder / Path(name).expanduser()).resolve())


FORMS: dict[str, type[Model | ModuleModel | OnnxModel]] = {
    "form[source]": Model,
    "form[module]": ModuleModel,
    "form[onnx]": OnnxModel,
}


def _form(value: Any) -> str:
    """Which of ``FORMS`` a model section is, by its key; a misspelt one is the first."""
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    return next((name for name in FORMS if name[5:-1] in keys), "form[source]")


class Calibration(Section):
    """The pipeline's calls whose activations are measured. Breadth pays: many prompts, few calls each."""

    prompts: Annotated[str, Field(min_length=1)] | None = None
    """A text file with a prompt a line; a .csv or .yaml with columns named as the pipeline's arguments (image files
    too); or a .safetensors of encoded prompts, with a row a prompt of every argument that it holds. null: 2,048 of the
    package's own."""
    recording: Annotated[str, Field(min_length=1)] | None = None
    """In place of prompts, the folder of calls recorded before, maybe on another machine: the pipeline is not run, and
    needs no text encoders here."""
    held_out: Annotated[int, Field(ge=0)] | None = None
    """So many prompts are kept apart, and on those every error is reported; an eighth more is run. null: an eighth of
    the different ones, 64 at most, and none of fewer than 16: then errors are on other noise of the same prompts."""
    samples: Annotated[int, Field(ge=1)] = 512
    """Prompts to run; they take turns where there are fewer."""
    batch: Annotated[int, Field(ge=1, le=1024)] = 1
    """Prompts to a run of the pipeline; also the engine's batch."""
    states_per_prompt: Annotated[int, Field(ge=1)] | None = 4
    """Calls kept of each run, drawn at random; a pipeline that can be interrupted runs no further than it must. null:
    all of them."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the noise, and of all that is drawn."""
    tokens_per_call: Annotated[int, Field(ge=1)] = 1024
    """Of each sample and call at most so many tokens, drawn at random, are measured. In all there should be 10 or 20
    for each channel of the widest linear."""
    memory_gib: Annotated[float, Field(gt=0)] = 8.0
    """Most memory that moments take at once; those of more are solved part by part, and not kept on disk.
    Tuning holds its calls in as much."""

    @model_validator(mode="after")
    def _one_source(self) -> Calibration:
        if self.prompts is not None and self.recording is not None:
            raise ValueError("give either 'prompts' or 'recording'")
        return self

    def resolved(self, folder: Path) -> Calibration:
        """With absolute paths, the default's too."""
        if self.recording is not None:
            return self.model_copy(update={"recording": _absolute(folder, self.recording)})
        prompts = str(DEFAULT_PROMPTS) if self.prompts is None else _absolute(folder, self.prompts)
        return self.model_copy(update={"prompts": prompts})


_ONE_OPERAND, _OPERAND_GLOBS = "literal[operand]", "dict[operand]"


class Sparsity(Section):
    """What becomes sparse, and how its error is repaired."""

    method: Literal["joint", "paper", "none", "magnitude"] = "joint"
    """How the error is repaired from calibrated moments: joint (refit and low rank together), paper or none. magnitude
    keeps the two largest of every four weights and calibrates nothing: minutes, for an engine whose speed alone
    counts."""
    operand: Annotated[
        Annotated[Literal["auto", "activation", "weight", "none"], Tag(_ONE_OPERAND)]
        | Annotated[OperandGlobs, Tag(_OPERAND_GLOBS)],
        Discriminator(lambda value: _OPERAND_GLOBS if isinstance(value, dict) else _ONE_OPERAND),
    ] = "auto"
    """What is 2:4. activation prunes the input while the model runs; weight the weights, once, at compile time; none
    nothing (in FP8 a linear is still faster so); auto leaves it to the `budget`, which may keep a linear dense, but is
    activation where the recipe asks for what only that has (method paper or none, a rank, the scale). Or a mapping of
    globs over module paths to one of these ({"*.to_out.0": weight, "*": auto}), of which the first that matches counts,
    and auto where none does. To leave a linear as it was, `exclude` it."""
    precision: Literal["auto", "bf16", "fp16", "fp8"] = "auto"
    """What linears multiply in: fp8; bf16 or fp16, which must be the model's dtype; or auto: FP8 competes on Hopper,
    and on sm89 or sm120 with `costs` measured there, unless something is asked for that it has not (method paper or
    magnitude, a rank, the scale)."""
    costs: Annotated[str, Field(min_length=1)] | None = None
    """Measured times to choose by: the JSON of lynx-compile bench. With it linears also stay dense where the one
    operand given is slower, unless a glob names it. null: a roofline."""
    rank: Literal["auto"] | int = "auto"
    """Of the activation operand's low-rank branch: a multiple of 16 up to 128; 0: none; auto: K / 32 rounded up to 16,
    at most 64."""
    norm_scale: bool | None = None
    """The activation operand's scale of each token; null: on for method paper, off for the others."""
    ridge: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Of the solves, times the mean of the moments' diagonal."""
    include: tuple[str, ...] = ("*",)
    """Globs over module paths of the linears that may change, such as "single_transformer_blocks.*.proj_out"."""
    exclude: tuple[str, ...] = ()
    """Globs of those that stay as they are; wins over `include` and `operand`."""

    @field_validator("rank", mode="before")
    @classmethod
    def _rank_fits_the_kernel(cls, value: Any) -> Any:
        if value == "auto" or (type(value) is int and 0 <= value <= 128 and value % 16 == 0):
            return value
        raise ValueError("it must be 'auto' or a multiple of 16 from 0 to 128")

    _lists = field_validator("include", "exclude", mode="before")(_listed)

    @model_validator(mode="after")
    def _none_has_no_low_rank(self) -> Sparsity:
        if self.method == "none" and self.rank not in ("auto", 0):
            raise ValueError(
                "method 'none' has no low-rank branch; remove 'rank' or choose 'joint' or 'paper'"
            )
        return self

    @model_validator(mode="after")
    def _magnitude_is_of_weights(self) -> Sparsity:
        if self.method != "magnitude":
            return self
        operands = {self.operand} if isinstance(self.operand, str) else set(self.operand.values())
        if operands - {"auto", "weight", "none"} or self.operand == "none" or self.precision == "fp8":
            raise ValueError("method 'magnitude' prunes weights in 16 bits; set operand to 'weight'")
        if self.rank not in ("auto", 0) or self.norm_scale:
            raise ValueError(
                "method 'magnitude' has no low rank and no scale; remove 'rank' and 'norm_scale'"
            )
        return self

    @model_validator(mode="after")
    def _weights_have_no_activations_parts(self) -> Sparsity:
        if self.method == "paper" and "weight" in (self.operand, *self.operand_globs.values()):
            raise ValueError(
                "method 'paper' prunes activations; choose 'joint' or 'none' for the weight operand"
            )
        if self.operand == "weight" and (self.rank not in ("auto", 0) or self.norm_scale):
            raise ValueError(
                "the weight operand has no low-rank branch and no scale; remove 'rank' and 'norm_scale'"
            )
        return self

    @model_validator(mode="after")
    def _fp8_has_no_low_rank(self) -> Sparsity:
        if self.precision == "fp8" and self._asks_for_16_bits:
            raise ValueError(
                "FP8 linears have no low-rank branch and no scale s; remove 'rank', 'norm_scale' and method 'paper'"
            )
        if self.operand == "none" and (self.precision in ("bf16", "fp16") or self._asks_for_16_bits):
            raise ValueError(
                "operand 'none' is for precision 'fp8' or 'auto': otherwise nothing would change"
            )
        return self

    @property
    def _asks_for_16_bits(self) -> bool:
        """Whether the recipe asks for what only linears in the model's dtype have."""
        return self.method in ("paper", "magnitude") or self.rank not in ("auto", 0) or bool(self.norm_scale)

    @property
    def needs_moments(self) -> bool:
        """Whether the weights are solved from calibrated moments."""
        return self.method != "magnitude"

    def precisions(self, fp8_pays: bool) -> tuple[bool, ...]:
        """Whether linears may multiply in FP8: no, yes, or either. ``fp8_pays``: whether the GPUs were seen to."""
        if self.precision == "fp8":
            return (True,)
        either = self.precision == "auto" and fp8_pays and not self._asks_for_16_bits
        return (False, True) if either else (False,)

    @property
    def operand_globs(self) -> OperandGlobs:
        """The globs of ``operand``; empty where it is one for all."""
        return self.operand if isinstance(self.operand, dict) else {}

    @property
    def operands(self) -> tuple[NodeOperand, ...]:
        """What may be 2:4 of linears whose operand no glob says."""
        if self.operand in ("activation", "weight", "none"):
            return (self.operand,)
        if self.method == "magnitude":
            return ("weight",)
        of_activations = self.method != "joint" or self.rank not in ("auto", 0) or self.norm_scale
        return ("activation",) if of_activations else ("activation", "weight")

    @property
    def uses_norm_scale(self) -> bool:
        return self.method == "paper" if self.norm_scale is None else self.norm_scale

    def rank_for(self, channels: int) -> int:
        """Rank of the low-rank branch of a linear with ``channels`` = K input channels."""
        if self.method == "none":
            return 0
        if self.rank == "auto":
            return min(64, -(-channels // (32 * 16)) * 16)
        return self.rank


class Budget(Section):
    """What decides on the linears whose operand is auto: one of these. Written off or false, speed alone decides."""

    max_output_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fastest forms with which |y - y_dense| / |y_dense| of the model's output stays below it, on recorded calls
    held out, each weighed as tuning weighs it. 0.015 where a recipe gives no limit."""
    min_psnr: Annotated[float, Field(gt=0, lt=100)] | None = None
    """The fastest forms with which images keep so many dB against the dense model's, drawn by the pipeline."""
    min_speed: Annotated[float, Field(ge=1)] | None = None
    """The least error at which the blocks' linears together are so many times as fast as dense, by `sparsity.costs` or
    a roofline."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {given[0]} and {given[1]}: the other follows from it")
        return self

    @property
    def limit(self) -> tuple[Literal["max_output_error", "min_psnr", "min_speed"], float]:
        """The key and its value; the default's where none is given."""
        if self.min_psnr is not None:
            return "min_psnr", self.min_psnr
        if self.min_speed is not None:
            return "min_speed", self.min_speed
        return "max_output_error", self.max_output_error or DEFAULT_OUTPUT_ERROR


class Compensation(Section):
    """The tuning of what was solved in closed form. What does not lower the error on held-out prompts is not kept."""

    tune: Literal["auto", "off", "blockwise", "end_to_end"] = "auto"
    """blockwise moves the weights block by block towards what the dense block returns; end_to_end goes on with all of
    them together, towards what the dense model returns; off, or false, leaves them. auto: where there is a GPU or the
    model is small, and end to end where memory holds that."""
    minutes: Annotated[float, Field(gt=0)] = 15.0
    """About so long in all."""
    steps: Annotated[int, Field(ge=1)] = 800
    """At most so many for a block, four times as many end to end; what no longer lowers the held-out error ends
    before."""

    @field_validator("tune", mode="before")
    @classmethod
    def _false_is_off(cls, value: Any) -> Any:
        return "off" if value is False else value


class Engine(Section):
    """How the TensorRT engine is built."""

    backend: Literal["auto", "tensorrt", "tensorrt_rtx", "torch"] = "auto"
    """tensorrt builds for the GPU that is here; tensorrt_rtx ahead of time, without one, for `gpus`; torch builds none:
    weights and manifest are for lynx_compile.apply, on the GPU that is here, else on `gpus`. auto: tensorrt where it
    and a GPU are there, else tensorrt_rtx, unless there is another GPU than `gpus`: that must be asked for by name."""
    gpus: Annotated[tuple[GpuTarget, ...], Field(min_length=1)] = GPU_TARGETS
    """Targets of an ahead-of-time build: sm80, sm86, sm89, sm120; sm90 with backend torch alone."""
    weights: Literal["embedded", "external"] = "embedded"
    """embedded in the engine; or external: engine inputs bound from OUT.safetensors, so that the builder holds none of
    them and the engine is small."""
    plugin: str | None = None
    """Another liblynx_plugin.so than the installed one."""
    workspace_gib: Annotated[float, Field(gt=0)] | None = None
    """TensorRT's limit of memory for its layers; null: its own."""

    _lists = field_validator("gpus", mode="before")(_listed)

    @model_validator(mode="after")
    def _hopper_by_torch_alone(self) -> Self:
        if "sm90" in self.gpus and self.backend != "torch":
            raise ValueError(
                "no TensorRT builds for sm90 ahead of time; set backend: torch, or leave sm90 out"
            )
        return self


class Compare(Section):
    """What lynx-compile compare runs, and what it holds against the engine; no limit is set by default."""

    prompts: Annotated[str, Field(min_length=1)] | None = None
    """A file of prompts, as calibration's, that calibration does not see. null: those that it held out of its own, and
    where it held out none, the same ones with other noise."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    """Images to draw, by the same call."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of their noise, which should not be calibration's."""
    states: Annotated[int, Field(ge=1, le=4096)] = 8
    """Of the dense model's trajectory, at which the linears are compared."""
    max_layer_error: Annotated[float, Field(gt=0)] | None = None
    """Limit of |y - y_dense| / |y_dense| of every linear."""
    max_output_error: Annotated[float, Field(gt=0)] | None = None
    """The same of the model's output, in any step."""
    min_psnr: float | None = None
    """Limit of the images' mean PSNR, dB."""
    max_lpips: Annotated[float, Field(gt=0)] | None = None
    """Limit of their mean LPIPS; needs the package lpips."""
    metric: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """A function of your own, as module:function, called with (dense, lynx, prompts) and only with --metric; it returns
    {name: number}."""
    min_metric: dict[str, float] = Field(default_factory=dict)
    """Lower limits of the numbers that it returns, by their names."""
    max_metric: dict[str, float] = Field(default_factory=dict)
    """Upper limits of them."""

    @property
    def has_limits(self) -> bool:
        return any(
            getattr(self, key) not in (None, {})
            for key in type(self).model_fields
            if key.startswith(("min_", "max_"))
        )


class Recipe(Section):
    """A whole recipe. ``budget``: None, written ``off`` or false, leaves it to speed."""

    model: Annotated[
        Annotated[Model, Tag("form[source]")]
        | Annotated[ModuleModel, Tag("form[module]")]
        | Annotated[OnnxModel, Tag("form[onnx]")],
        Discriminator(_form),
    ]
    call: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the pipeline's call, as Python would give them: height, width, num_inference_steps ... They decide
    the shapes that the engine is built for."""
    calibration: Annotated[Calibration, Field(validate_default=True)] = Calibration()
    sparsity: Sparsity = Sparsity()
    budget: Budget | None = Budget()
    compensation: Compensation = Compensation()
    engine: Engine = Engine()
    compare: Compare = Compare()
    _digest: str = PrivateAttr("")

    @property
    def judge(self) -> Budget | None:
        """What holds errors down, if they decide: not of weights that take no calibration, nor without gradients."""
        has_errors = self.sparsity.needs_moments and not isinstance(self.model, OnnxModel)
        return self.budget if has_errors else None

    @field_validator("calibration")
    @classmethod
    def _without_pipeline_no_prompts(cls, value: Calibration, info: ValidationInfo) -> Calibration:
        if value.recording is None and not isinstance(info.data.get("model", None), Model | None):
            raise ValueError("a model that has no pipeline needs 'recording' here")
        return value

    @field_validator("sparsity")
    @classmethod
    def _precision_is_that_of_the_model(cls, value: Sparsity, info: ValidationInfo) -> Sparsity:
        dtype = getattr(info.data.get("model"), "dtype", value.precision)
        if value.precision in ("bf16", "fp16") and value.precision != dtype:
            raise ValueError(
                f"precision is {value.precision} and model.dtype {dtype}; set precision to {dtype}, fp8 or auto"
            )
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _false_is_off(cls, value: Any) -> Any:
        return None if value is False or value == "off" else value

    @field_validator("budget")
    @classmethod
    def _budget_has_something_to_decide(cls, value: Budget | None, info: ValidationInfo) -> Budget | None:
        if value is None:
            return None
        if isinstance(info.data.get("model"), OnnxModel):
            raise ValueError(
                "an ONNX model has no gradients to tell its output's error by; leave 'budget' out"
            )
        sparsity, calibration = info.data.get("sparsity"), info.data.get("calibration")
        if sparsity is not None and len(sparsity.operands) == 1:
            raise ValueError(
                "the recipe fixes what is 2:4 (sparsity.operand, method, rank or norm_scale); "
                "set operand: auto, or remove 'budget'"
            )
        if value.min_psnr is not None and calibration is not None and calibration.recording is not None:
            raise ValueError("min_psnr draws images, and a recording has no pipeline; give max_output_error")
        return value

    @field_validator("compensation")
    @classmethod
    def _onnx_has_no_gradients(cls, value: Compensation, info: ValidationInfo) -> Compensation:
        if value.tune in ("blockwise", "end_to_end") and isinstance(info.data.get("model"), OnnxModel):
            raise ValueError("an ONNX model has no gradients to tune by; leave 'tune' to auto")
        sparsity = info.data.get("sparsity")
        if value.tune == "blockwise" and sparsity is not None and not sparsity.needs_moments:
            raise ValueError("method 'magnitude' calibrates nothing to tune from; leave 'tune' to auto")
        return value

    def model_post_init(self, context: Any) -> None:
        """Keep the digest of what was written, before paths become those of this machine."""
        self._digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def resolved(self, folder: Path) -> Recipe:
        """The same recipe with local paths made absolute; a hub id stays as it is."""
        update: dict[str, Any] = {
            "model": self.model.resolved(folder),
            "calibration": self.calibration.resolved(folder),
        }
        if self.sparsity.costs is not None:
            costs = _absolute(folder, self.sparsity.costs)
            update["sparsity"] = self.sparsity.model_copy(update={"costs": costs})
        if self.compare.prompts is not None:
            held_out = _absolute(folder, self.compare.prompts)
            update["compare"] = self.compare.model_copy(update={"prompts": held_out})
        if self.engine.plugin is not None:
            plugin = _absolute(folder, self.engine.plugin)
            update["engine"] = self.engine.model_copy(update={"plugin": plugin})
        return self.model_copy(update=update)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it names, once it is ``resolved``."""
        named = [self.calibration.prompts, self.compare.prompts, self.sparsity.costs, self.engine.plugin]
        named += [getattr(self.model, key, None) for key in ("weights", "config", "onnx")]
        loras = (Path(lora.source) for lora in getattr(self.model, "loras", ()))
        named += [str(path) for path in loras if path.is_absolute()]
        return tuple(Path(name) for name in named if isinstance(name, str))

    @property
    def checkpoint(self) -> Path | None:
        """The local folder (or file) of a diffusers pipeline, once it is ``resolved``; None where there is none."""
        source = self.model.source if isinstance(self.model, Model) else ""
        return Path(source) if Path(source).is_absolute() else None

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe's values as the file gives them."""
        return self._digest


_SECTIONS = list(Recipe.model_fields)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read((1 << 20) + 1)  # no more of a device, which has no end
        if len(text) > 1 << 20:
            raise InputError(
                f"{path} is larger than 1 MiB.", "Give a recipe (YAML), not a model or an engine."
            )
        return text.decode()
    except FileNotFoundError:
        raise InputError(f"The recipe {path} does not exist.", "Check the path.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text.", "Give a recipe (YAML).") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}).", "Check the path and its permissions."
        ) from None


def _explain(
    path: Path, node: yaml.Node | None, options: Mapping[tuple[str, ...], str], error: Any
) -> tuple[str, str]:
    """Cause and remedy of pydantic's first complaint, with the line that the key stands in, or its option."""
    keys = [str(key) for key in error["loc"] if not _is_union_branch(key)]
    key = ".".join(keys)
    set_by = [
        option for names, option in options.items() if all(a == b for a, b in zip(names, keys, strict=False))
    ]
    where = set_by[-1] if set_by and error["type"] != "missing" else f"{path}:{_line(node, keys)}"
    if error["type"] == "extra_forbidden":
        known = list(_section(error["loc"][:-1]).model_fields)
        if keys[:-1] == ["model"] and keys[-1] in ("source", "module", "onnx"):
            return f"{where}: 'model' has both '{keys[-1]}' and '{known[0]}'.", "Keep one of them."
        close = difflib.get_close_matches(keys[-1], known, 1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known keys here: {', '.join(known)}."
        return f"{where}: unknown key '{key}'.", hint
    if error["type"] == "missing":
        return (
            f"{where}: the key '{key}' is missing.",
            f"Add '{keys[-1]}:' under '{'.'.join(keys[:-1]) or 'the top'}'.",
        )
    message = WORDS.get(error["type"], error["msg"].removeprefix("Value error, "))
    return (
        f"{where}: '{key}' is wrong: {message} (got {_short(error['input'])}).",
        "See the recipe reference in docs/recipe.md.",
    )


# pydantic speaks of Python's types.
WORDS = {
    "tuple_type": "it should be a list, such as [a, b]",
    "string_type": "it should be text; quote what looks like a number",
    "bool_type": "it should be true or false",
    "int_type": "it should be a whole number",
    "float_type": "it should be a number",
    "dict_type": "it should be a section, with keys of its own",
    "model_type": "it should be a section, with keys of its own",
}


def _is_union_branch(key: Any) -> bool:
    """pydantic puts the name of a union's branch into ``loc``; it is no key of the file."""
    return isinstance(key, str) and (
        key.startswith(("literal[", "constrained-", "dict[", "form[")) or key in ("int", "float", "str")
    )


def _section(loc: tuple[Any, ...]) -> type[BaseModel]:
    """The section that a place in pydantic's terms is in."""
    section: type[BaseModel] = Recipe
    for key in loc:
        if isinstance(key, int):  # an item of a list of sections
            continue
        annotation = FORMS.get(key) or section.model_fields[key].annotation
        if NoneType in get_args(annotation) or get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return section


def _line(node: yaml.Node | None, keys: list[str]) -> int:
    """Line of the deepest of ``keys`` that the file holds, from 1."""
    line = 1
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
            continue
        if not isinstance(node, yaml.MappingNode):
            break
        for key_node, value in node.value:
            if key_node.value == key:
                line, node = key_node.start_mark.line + 1, value
                break
        else:
            break
    return line


def _short(value: Any) -> str:
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
