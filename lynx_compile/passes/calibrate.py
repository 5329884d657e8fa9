# SPDX-License-Identifier: Apache-2.0
"""Run the model's denoising loop and gather the second moments that compensation needs, linear by linear."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lynx_compile.errors import InputError, StageError
from lynx_compile.files.progress import Progress
from lynx_compile.files.tensors import save_tensors
from lynx_compile.models import DiT, LinearGroup, flux
from lynx_compile.ops.sparse_linear import keep_mask, norm_scale_of
from lynx_compile.passes.select import candidates
from lynx_compile.recipe import Calibration, Recipe, Sparsity

TOKENS_PER_CHANNEL = 10  # fewer calibration tokens than this leave the solves badly determined (measured)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of the tensor x that a group of linears reads, and of what the sparse op makes of it, S = s * z~.

    ``tokens``: how many tokens were measured. ``x_mean``, ``s_mean``: [K]. ``xx``, ``xs``, ``ss``: covariances
    [K, K] (E[x x^T], E[x S^T], E[S S^T], means taken off). All float32 on the CPU.
    """

    tokens: int
    x_mean: torch.Tensor
    s_mean: torch.Tensor
    xx: torch.Tensor
    xs: torch.Tensor
    ss: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """A folder with the ``LayerStatistics`` of every candidate group, one safetensors file each."""

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
        return LayerStatistics(int(tensors.pop("tokens")), **tensors)


def calibrate(dit: DiT, recipe: Recipe, folder: Path, progress: Progress) -> Statistics:
    """Measure every candidate group of linears over the recipe's calibration inputs, all denoising steps.

    Deterministic: prompts in order, noise and token choice from ``calibration.seed``. Groups whose moments do
    not fit ``calibration.memory_gib`` together are measured in several passes.

    Raises:
        InputError: the calibration source is missing or does not fit the model.
        StageError: an activation is not finite.
    """
    groups = candidates(dit.groups, recipe.sparsity)
    conditioning = load_conditioning(Path(recipe.calibration.source), dit, recipe)
    passes = _passes(groups, recipe.calibration.memory_gib)
    total = len(passes) * recipe.calibration.samples * recipe.calibration.steps
    tokens: dict[LinearGroup, int] = {}
    done = 0

    def step_done(samples: int) -> None:
        nonlocal done
        done += samples
        progress("denoising (samples x steps)", done, total)

    for part in passes:
        with _measured(dit.module, part, recipe) as moments, torch.inference_mode():
            _denoise_all(dit, recipe, conditioning, step_done)
        for group in part:
            statistics = moments[group.name].finish()
            tokens[group] = statistics.tokens
            save_tensors(_file(folder, group.name), _tensors(statistics))
    _warn_if_few(tokens)
    return Statistics(folder, tuple(group.name for group in groups))


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
            recipe.model.source, recipe.model.revision, prompts, recipe.shapes.text_length, dit.dtype
        )
    except Exception as error:  # a missing encoder, tokenizer or network: diffusers raises many kinds
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"The prompts in {path} cannot be encoded: {recipe.model.source} has no usable text encoders ({reason}).",
            "Use a complete checkpoint, or give encoded prompts as safetensors.",
        ) from None


class _Moments:
    """Streaming means and covariances of x and S (Chan's pairwise update, stable for large means)."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.tokens = 0
        self.mean = torch.zeros(2 * channels, device=device)
        self.scatter = [torch.zeros(channels, channels, device=device) for _ in range(3)]  # xx, xs, ss

    def add(self, x: torch.Tensor, s: torch.Tensor) -> None:
        """x, S: [tokens, K] float32."""
        tokens, channels = x.shape
        mean = torch.cat((x.mean(0), s.mean(0)))
        off = mean - self.mean
        x, s = x - mean[:channels], s - mean[channels:]
        weight = self.tokens * tokens / (self.tokens + tokens)
        off_x, off_s = off[:channels], off[channels:]
        for scatter, (a, b), (off_a, off_b) in zip(
            self.scatter,
            ((x, x), (x, s), (s, s)),
            ((off_x, off_x), (off_x, off_s), (off_s, off_s)),
            strict=True,
        ):
            scatter.addmm_(a.T, b).addr_(off_a, off_b, alpha=weight)
        self.tokens += tokens
        self.mean += off * (tokens / self.tokens)

    def finish(self) -> LayerStatistics:
        x_mean, s_mean = self.mean.cpu().chunk(2)
        xx, xs, ss = (scatter.cpu() / self.tokens for scatter in self.scatter)
        return LayerStatistics(self.tokens, x_mean.clone(), s_mean.clone(), xx, xs, ss)


@contextmanager
def _measured(
    module: torch.nn.Module, groups: tuple[LinearGroup, ...], recipe: Recipe
) -> Iterator[Mapping[str, _Moments]]:
    """Hooks on the first linear of every group; removed whatever happens."""
    device = next(module.parameters()).device
    moments = {group.name: _Moments(group.in_channels, device) for group in groups}
    choice = torch.Generator().manual_seed(recipe.calibration.seed)
    handles = []
    for group in groups:
        linear = module.get_submodule(group.linears[0].path)
        handles.append(
            linear.register_forward_pre_hook(
                lambda _, arguments, name=group.name: _measure(
                    name, arguments[0], moments[name], recipe.calibration, recipe.sparsity, choice
                )
            )
        )
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    name: str,
    x: torch.Tensor,
    moments: _Moments,
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
            f"the input of '{name}' is not finite (NaN or infinity).",
            "Use dtype bf16 (fp16 overflows in some models), or check the calibration inputs.",
        )
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


def _passes(groups: tuple[LinearGroup, ...], memory_gib: float) -> list[tuple[LinearGroup, ...]]:
    """Split the groups so that the moments of each part (three K x K float32 matrices a group) fit."""
    passes: list[list[LinearGroup]] = [[]]
    used, limit = 0, memory_gib * 2**30
    for group in groups:
        size = 3 * 4 * group.in_channels**2
        if passes[-1] and used + size > limit:
            passes.append([])
            used = 0
        passes[-1].append(group)
        used += size
    return [tuple(part) for part in passes]


def _warn_if_few(tokens: Mapping[LinearGroup, int]) -> None:
    """One warning for all groups whose solve is badly determined, with what the worst of them needs."""
    short = {g: n for g, n in tokens.items() if n < TOKENS_PER_CHANNEL * g.in_channels}
    if short:
        worst = min(short, key=lambda group: short[group] / group.in_channels)
        needed = TOKENS_PER_CHANNEL * worst.in_channels
        log.warning(
            "%d of %d inputs were calibrated on too few tokens: '%s' on %d, its %d channels need at least %d. "
            "Raise calibration.samples %.1f-fold (or steps, or tokens_per_step).",
            len(short), len(tokens), worst.name, short[worst], worst.in_channels, needed, needed / short[worst],
        )  # fmt: skip


def _tensors(statistics: LayerStatistics) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(statistics, field.name) for field in fields(statistics)}
    return {name: torch.as_tensor(value) for name, value in values.items()}


def _file(folder: Path, group: str) -> Path:
    return folder / f"{group}.safetensors"
