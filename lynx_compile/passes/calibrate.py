# SPDX-License-Identifier: Apache-2.0
"""Run the model's denoising loop and gather the second moments that compensation needs, linear by linear."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lynx_compile.errors import InputError, StageError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.files.tensors import save_tensors
from lynx_compile.models import DiT, flux
from lynx_compile.models.structure import is_pointwise
from lynx_compile.ops.sparse_linear import keep_mask, norm_scale_of
from lynx_compile.passes.select import SparsityPlan
from lynx_compile.recipe import Calibration, Recipe, Sparsity
from lynx_compile.solve.moments import LayerStatistics, Moments, PrunedStatistics

CALIBRATE = StageVersion("calibrate", 1, ("torch", "diffusers", "transformers"))
TOKENS_PER_CHANNEL = 10  # fewer calibration tokens than this leave the solves badly determined (measured)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """A folder with the ``LayerStatistics`` of every tensor that the plan's nodes read, one safetensors file each."""

    folder: Path
    groups: tuple[str, ...]

    def load(self, group: str) -> LayerStatistics:
        path = _file(self.folder, group)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StageError(
                "calibrate", f"{path} cannot be read ({error}).", "Run again with --fresh."
            ) from None
        kind = PrunedStatistics if "ss" in tensors else LayerStatistics
        return kind(int(tensors.pop("tokens")), **tensors)


@dataclass(frozen=True)
class Measurement:
    """A tensor [..., K] to measure: the name of its group, and the path of a linear that reads it.

    ``pruned``: whether one of its readers has pruned activations, whose moments come with it then.
    """

    name: str
    path: str
    channels: int
    pruned: bool

    @property
    def bytes(self) -> int:
        """Of its float32 covariances."""
        return 4 * self.channels**2 * (3 if self.pruned else 1)


def calibrate(dit: DiT, plan: SparsityPlan, recipe: Recipe, folder: Path, progress: Progress) -> Statistics:
    """Measure what the plan's linears read over the recipe's calibration inputs, all denoising steps.

    Deterministic: prompts in order, noise and token choice from ``calibration.seed``. Moments that do
    not fit ``calibration.memory_gib`` together are gathered in several passes.

    Raises:
        InputError: the calibration source is missing or does not fit the model.
        StageError: an activation is not finite.
    """
    wanted = measurements(plan)
    conditioning = load_conditioning(Path(recipe.calibration.source), dit, recipe)
    passes = _passes(wanted, recipe.calibration.memory_gib)
    total = len(passes) * recipe.calibration.samples * recipe.calibration.steps
    tokens: dict[Measurement, int] = {}
    done = 0

    def step_done(samples: int) -> None:
        nonlocal done
        done += samples
        progress("denoising (samples x steps)", done, total)

    for part in passes:
        with _measured(dit.module, part, recipe) as moments, torch.inference_mode():
            _denoise_all(dit, recipe, conditioning, step_done)
        for one in part:
            statistics = moments[one.name].finish()
            tokens[one] = statistics.tokens
            save_tensors(_file(folder, one.name), _tensors(statistics))
    _warn_if_few(tokens)
    return Statistics(folder, tuple(one.name for one in wanted))


def measurements(plan: SparsityPlan) -> tuple[Measurement, ...]:
    """What the plan needs to be measured: every tensor once, whatever the operands of its readers."""
    found: dict[str, Measurement] = {}
    for group in plan.groups:
        first = found.get(
            group.name, Measurement(group.name, group.linears[0].path, group.in_channels, pruned=False)
        )
        found[group.name] = replace(first, pruned=first.pruned or group.operand == "activation")
    return tuple(found.values())


def load_conditioning(path: Path, dit: DiT, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The conditioning rows, one per prompt: {input name: [prompts, ...]}, checked against the model.

    A safetensors file holds them ready made; of a text file every line is a prompt, encoded here.
    """
    needed = {name: dit.inputs[name] for name in ("encoder_hidden_states", "pooled_projections")}
    if not path.is_file():
        raise InputError(f"The calibration source {path} does not exist.", "Correct calibration.source.")
    rows = _encode(path, dit, recipe) if path.suffix == ".txt" else _read_rows(path, tuple(needed))
    for name, example in needed.items():
        if (
            rows[name].ndim != example.ndim
            or rows[name].shape[1:] != example.shape[1:]
            or not len(rows[name])
        ):
            raise InputError(
                f"{path}: '{name}' has shape {list(rows[name].shape)}, the model and recipe want "
                f"[prompts, {', '.join(map(str, example.shape[1:]))}].",
                "Encode the prompts with this model's text encoders and at the recipe's shapes.text_length.",
            )
        if not torch.isfinite(rows[name]).all():
            raise InputError(
                f"{path}: '{name}' holds values that are not finite.", "Encode the prompts again."
            )
    if len({len(value) for value in rows.values()}) != 1:
        raise InputError(
            f"{path}: its tensors have different numbers of rows.", "Give one row per prompt in each."
        )
    return rows


def _read_rows(path: Path, needed: tuple[str, ...]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            missing = set(needed) - set(file.keys())
            if missing:
                raise InputError(
                    f"{path} holds no '{sorted(missing)[0]}'.",
                    f"It needs one row per prompt of {', '.join(needed)}.",
                )
            return {name: file.get_tensor(name) for name in needed}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}).", "Write it anew.") from None


def _encode(path: Path, dit: DiT, recipe: Recipe) -> dict[str, torch.Tensor]:
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text.", "Write one prompt a line.") from None
    if not prompts:
        raise InputError(f"{path} holds no prompt.", "Write one prompt a line.")
    prompts = prompts[: recipe.calibration.samples]
    try:
        return flux.encode_prompts(
            dit.model.source, dit.model.revision, prompts, recipe.shapes.text_length, dit.dtype
        )
    except Exception as error:  # a missing encoder, tokenizer or network: diffusers raises many kinds
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"The prompts in {path} cannot be encoded: {dit.model.source} has no usable text encoders ({reason}).",
            "Use a complete checkpoint, or give encoded prompts as safetensors.",
        ) from None


@contextmanager
def _measured(
    module: torch.nn.Module, wanted: tuple[Measurement, ...], recipe: Recipe
) -> Iterator[Mapping[str, Moments]]:
    """Hooks on one reader of every tensor, removed whatever happens; a linear that is called twice measures both."""
    device = next(module.parameters()).device
    moments = {one.name: Moments(one.channels, device, pruned=one.pruned) for one in wanted}
    choice = torch.Generator().manual_seed(recipe.calibration.seed)

    def hook(one: Measurement) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda linear, arguments: _measure(
            one,
            arguments[0].movedim(1, -1) if is_pointwise(linear) else arguments[0],
            moments[one.name],
            recipe.calibration,
            recipe.sparsity,
            choice,
        )

    handles = [module.get_submodule(one.path).register_forward_pre_hook(hook(one)) for one in wanted]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    one: Measurement,
    x: torch.Tensor,
    moments: Moments,
    calibration: Calibration,
    sparsity: Sparsity,
    choice: torch.Generator,
) -> None:
    tokens = x.reshape(-1, x.shape[-1])
    limit = calibration.tokens_per_step * x.shape[0]
    if len(tokens) > limit:
        tokens = tokens[torch.randperm(len(tokens), generator=choice)[:limit].to(tokens.device)]
    tokens = tokens.float()
    if not torch.isfinite(tokens).all():
        raise StageError(
            "calibrate",
            f"the input of '{one.path}' is not finite (NaN or infinity).",
            "Use dtype bf16 (fp16 overflows in some models), or check the calibration inputs.",
        )
    if not one.pruned:
        moments.add(tokens)
        return
    keep = keep_mask(tokens)
    pruned = torch.where(keep, tokens, 0.0)
    if sparsity.uses_norm_scale:
        pruned = pruned * norm_scale_of(tokens, keep)
    moments.add(tokens, pruned)


def _denoise_all(
    dit: DiT, recipe: Recipe, conditioning: Mapping[str, torch.Tensor], step_done: Callable[[int], None]
) -> None:
    """Denoise every calibration sample, in batches of the recipe's size; sample i takes prompt i mod prompts."""
    parameter = next(dit.module.parameters())
    noise = torch.Generator().manual_seed(recipe.calibration.seed)
    prompts = len(conditioning["encoder_hidden_states"])
    for start in range(0, recipe.calibration.samples, recipe.shapes.batch):
        batch = min(recipe.shapes.batch, recipe.calibration.samples - start)
        rows = [(start + i) % prompts for i in range(batch)]
        latents = torch.randn(batch, *dit.inputs["hidden_states"].shape[1:], generator=noise)
        inputs = {name: value[rows].to(parameter) for name, value in conditioning.items()}
        inputs |= {name: dit.inputs[name].to(parameter.device) for name in ("img_ids", "txt_ids")}
        if "guidance" in dit.inputs:
            inputs["guidance"] = torch.full((batch,), recipe.calibration.guidance, device=parameter.device)

        def transformer(batch: int = batch, **kwargs: torch.Tensor) -> torch.Tensor:
            velocity: torch.Tensor = dit.module(**kwargs, return_dict=False)[0]
            step_done(batch)
            return velocity

        flux.denoise(transformer, dit.scheduler, latents.to(parameter), inputs, recipe.calibration.steps)


def _passes(wanted: tuple[Measurement, ...], memory_gib: float) -> list[tuple[Measurement, ...]]:
    """Split what is measured so that the moments of each part fit."""
    passes: list[list[Measurement]] = [[]]
    used, limit = 0, memory_gib * 2**30
    for one in wanted:
        if passes[-1] and used + one.bytes > limit:
            passes.append([])
            used = 0
        passes[-1].append(one)
        used += one.bytes
    return [tuple(part) for part in passes]


def _warn_if_few(tokens: Mapping[Measurement, int]) -> None:
    """One warning for everything whose solve is badly determined, with what the worst of it needs."""
    short = {one: n for one, n in tokens.items() if n < TOKENS_PER_CHANNEL * one.channels}
    if short:
        worst = min(short, key=lambda one: short[one] / one.channels)
        needed = TOKENS_PER_CHANNEL * worst.channels
        log.warning(
            "%d of %d inputs were calibrated on too few tokens: '%s' on %d, its %d channels need at least %d. "
            "Raise calibration.samples %.1f-fold (or steps, or tokens_per_step).",
            len(short), len(tokens), worst.name, short[worst], worst.channels, needed, needed / short[worst],
        )  # fmt: skip


def _tensors(statistics: LayerStatistics) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in vars(statistics).items()}


def _file(folder: Path, group: str) -> Path:
    return folder / f"{group}.safetensors"
