# SPDX-License-Identifier: Apache-2.0
"""The methods that ``lynx-compile study`` compares, and how each makes the weights of every linear."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from lynx_compile.errors import InputError
from lynx_compile.files.atomic import save_text
from lynx_compile.files.progress import Progress
from lynx_compile.models.dit import DiT
from lynx_compile.models.recording import Recording
from lynx_compile.passes.block_weights import split
from lynx_compile.passes.calibrate import Statistics, calibrate
from lynx_compile.passes.compensate import compensate, dense_weights, load_weights
from lynx_compile.passes.select import SparseGroup, SparsityPlan, select
from lynx_compile.passes.tune import tune
from lynx_compile.recipe import Recipe, Sparsity
from lynx_compile.solve.linalg import moved
from lynx_compile.solve.low_rank import slim
from lynx_compile.solve.masks import bawa_mask, magnitude_mask, ria_mask, wanda_mask
from lynx_compile.solve.moments import LayerStatistics
from lynx_compile.solve.tune import Rows
from lynx_compile.solve.weight_refit import sweep

Mask = Callable[[torch.Tensor, LayerStatistics], torch.Tensor]
Branch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # 2:4 weights [N, K], A [r, K], B [N, r]


@dataclass(frozen=True)
class Method:
    """``title``: for people. What of ``Sparsity`` says what is done, and whether that is tuned; or a ``mask`` or a
    ``prune`` of the literature; none of them: the dense model."""

    title: str
    sparsity: Mapping[str, object] | None = None
    tuned: bool = False
    mask: Mask | None = None
    prune: Callable[[torch.Tensor, LayerStatistics, int, float, str], Branch] | None = None

    @property
    def is_dense(self) -> bool:
        return self.sparsity is None and self.mask is None and self.prune is None


def _sparsegpt(weight: torch.Tensor, moments: LayerStatistics, rank: int, ridge: float, name: str) -> Branch:
    """SparseGPT's sweep, without a branch; its Hessian has the means in it, since no bias takes them up."""
    swept = sweep(weight, moments.xx + torch.outer(moments.x_mean, moments.x_mean), ridge, name)
    return swept, weight.new_zeros(0, weight.shape[1]), weight.new_zeros(len(weight), 0)


_WEIGHT = {"operand": "weight"}
_ACTIVATION = {"operand": "activation"}
_PAPER = {"operand": "activation", "method": "paper"}
_FP8_WEIGHT = {"operand": "weight", "precision": "fp8"}
_FP8_ACTIVATION = {"operand": "activation", "precision": "fp8"}
METHODS: dict[str, Method] = {
    "dense": Method("dense"),
    "magnitude": Method("weights 2:4, magnitude", mask=lambda weight, _: magnitude_mask(weight)),
    "wanda": Method("weights 2:4, Wanda", mask=wanda_mask),
    "ria": Method("weights 2:4, RIA", mask=ria_mask),
    "bawa": Method("weights 2:4, BaWA", mask=bawa_mask),
    "sparsegpt": Method("weights 2:4, SparseGPT", prune=_sparsegpt),
    "slim": Method("weights 2:4, SLiM: Wanda + low rank", prune=slim),
    "weight_solved": Method("weights 2:4, ours, solved", _WEIGHT),
    "weight": Method("weights 2:4, ours, tuned", _WEIGHT, tuned=True),
    "activation_naive": Method("activations 2:4, naive", _ACTIVATION | {"method": "none"}),
    "activation_norm": Method(
        "activations 2:4, norm scale", _ACTIVATION | {"method": "none", "norm_scale": True}
    ),
    "paper": Method("activations 2:4, the paper: norm scale + low rank, solved", _PAPER),
    "paper_trained": Method("activations 2:4, the paper, low rank trained", _PAPER, tuned=True),
    "activation_refit": Method("activations 2:4, ours, solved, without low rank", _ACTIVATION | {"rank": 0}),
    "activation_solved": Method("activations 2:4, ours, solved", _ACTIVATION),
    "activation": Method("activations 2:4, ours, tuned", _ACTIVATION, tuned=True),
    "fp8_dense": Method("FP8, dense", {"operand": "none", "precision": "fp8"}),
    "weight_fp8_solved": Method("FP8, weights 2:4, ours, solved", _FP8_WEIGHT),
    "weight_fp8": Method("FP8, weights 2:4, ours, tuned", _FP8_WEIGHT, tuned=True),
    "activation_fp8_solved": Method("FP8, activations 2:4, ours, solved", _FP8_ACTIVATION),
    "activation_fp8": Method("FP8, activations 2:4, ours, tuned", _FP8_ACTIVATION, tuned=True),
}


@dataclass(frozen=True)
class Made:
    """``rows``: the weights of every linear that changed, by path. Seconds: of the closed form, and of tuning it."""

    rows: Mapping[str, Rows]
    solved_seconds: float = 0.0
    tuned_seconds: float = 0.0


@dataclass(frozen=True)
class Workshop:
    """What methods are made from: a calibration of one seed. Statistics are gathered when first asked for.

    ``folder``: for what they leave; ``key``: of all that they depend on. ``recipe``: with that seed; its
    ``compensation`` is that of the tuned methods.
    """

    dit: DiT
    recording: Recording
    recipe: Recipe
    folder: Path
    key: str
    progress: Progress

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Those that every method changes: what the recipe includes and can be 2:4 in either operand."""
        asked = self._sparsity({"operand": "weight"}, self.recipe.sparsity.include)
        plan = select(self.dit.groups, asked)
        return tuple(linear.path for group in plan.groups for linear in group.linears)

    def make(self, method: Method) -> Made:
        """The weights of a method."""
        if method.is_dense:
            return Made({})
        if method.sparsity is None:
            statistics = self._statistics(norm_scale=False)
            start = time.monotonic()
            return Made(self._of_literature(method, statistics), time.monotonic() - start)
        sparsity = self._sparsity(method.sparsity)
        statistics = self._statistics(norm_scale=sparsity.uses_norm_scale)
        plan, name = select(self.dit.groups, sparsity), _name(sparsity)
        weights, solved_seconds = self._solved(plan, statistics, sparsity, self.folder / "weights" / name)
        start = time.monotonic()
        if method.tuned:
            recipe = self.recipe.model_copy(update={"sparsity": sparsity})
            folder, key = self.folder / "tuned" / name, f"{self.key} {recipe.model_dump_json()}"
            weights = tune(
                self.dit, plan, weights, statistics, self.recording, recipe, folder, key, self.progress
            ).weights
        tuned_seconds = time.monotonic() - start
        rows: dict[str, Rows] = {}
        for path in weights:
            rows |= split(load_weights(path))
        return Made(rows, solved_seconds, tuned_seconds)

    def _solved(
        self, plan: SparsityPlan, statistics: Statistics, sparsity: Sparsity, folder: Path
    ) -> tuple[tuple[Path, ...], float]:
        """Files of the closed form and the seconds that it took; of a method that has solved it already."""
        done = folder / "done.json"
        if done.exists():
            kept = json.loads(done.read_text())
            return tuple(folder / name for name in kept["files"]), kept["seconds"]
        start = time.monotonic()
        files = compensate(self.dit, plan, statistics, sparsity, folder, self.progress)
        seconds = time.monotonic() - start
        save_text(done, json.dumps({"files": [path.name for path in files], "seconds": seconds}))
        return files, seconds

    def _sparsity(self, changes: Mapping[str, object], include: tuple[str, ...] | None = None) -> Sparsity:
        """The recipe's ridge and rank, and a method's own choices, for the linears that all methods change."""
        given = self.recipe.sparsity
        values: dict[str, object] = {
            "include": self.linears if include is None else include,
            "exclude": given.exclude if include is not None else (),
            "ridge": given.ridge,
            **changes,
        }
        joint = values.get("method", "joint") != "none" and "precision" not in changes
        if values["operand"] == "activation" and joint:
            values.setdefault("rank", given.rank)
        return Sparsity.model_validate(values)

    def _statistics(self, *, norm_scale: bool) -> Statistics:
        """Moments for every method with or without the norm scale; of an earlier run where they are whole."""
        sparsity = self._sparsity(_PAPER if norm_scale else _FP8_ACTIVATION)
        plan = select(self.dit.groups, sparsity)
        folder = self.folder / ("moments-norm-scale" if norm_scale else "moments")
        done = folder / "done"
        if done.exists():
            return Statistics(folder, tuple(dict.fromkeys(group.name for group in plan.groups)))
        recipe = self.recipe.model_copy(update={"sparsity": sparsity})
        found = calibrate(self.dit, plan, self.recording, recipe, folder, self.progress)
        done.touch()
        return found

    def _of_literature(self, method: Method, statistics: Statistics) -> dict[str, Rows]:
        """Weights by a mask alone, or by a pruning of its own; the rank is that of our low-rank branches."""
        plan = select(self.dit.groups, self._sparsity(_WEIGHT))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows: dict[str, Rows] = {}
        for done, group in enumerate(plan.groups):
            weight, bias = (tensor.to(device) for tensor in dense_weights(self.dit, group))
            moments = moved(statistics.load(group.name), device)
            if method.mask is not None:
                branch = weight * method.mask(weight, moments), weight[:0], weight[:, :0]
            else:
                assert method.prune is not None, "the method is not dense"
                rank = min(self._rank(group), group.in_channels, len(weight))
                branch = method.prune(weight, moments, rank, self.recipe.sparsity.ridge, group.name)
            rows |= _rows(group, branch, bias)
            self.progress("linears pruned", done + 1, len(plan.groups))
        return rows

    def _rank(self, group: SparseGroup) -> int:
        return self._sparsity(_ACTIVATION).rank_for(group.in_channels) // 16 * 16


def chosen(names: str | None) -> tuple[str, ...]:
    """Methods by their names, comma-separated, in the table's order; None: all. The dense model is always there.

    Raises:
        InputError: one is not known, or none is named.
    """
    wanted = list(METHODS) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError("--methods names none.", f"Choose from {', '.join(METHODS)}, or leave it out.")
    for name in wanted:
        if name not in METHODS:
            raise InputError(f"There is no method '{name}' to study.", f"Choose from {', '.join(METHODS)}.")
    return tuple(name for name in METHODS if name in {"dense", *wanted})


def _rows(group: SparseGroup, branch: Branch, bias: torch.Tensor) -> dict[str, Rows]:
    """By the linears of a group; on the CPU."""
    weight, down, up = (tensor.cpu() for tensor in branch)
    sizes = [linear.out_channels for linear in group.linears]
    parts = zip(group.linears, weight.split(sizes), bias.cpu().split(sizes), up.split(sizes), strict=True)
    with_branch = len(down) > 0
    return {
        linear.path: Rows(
            part, own_bias, "weight",
            lora_down=down if with_branch else None, lora_up=own_up if with_branch else None,
        )
        for linear, part, own_bias, own_up in parts
    }  # fmt: skip


def _name(sparsity: Sparsity) -> str:
    """A folder's name for a form, whether tuned or not."""
    scale = "-norm" if sparsity.uses_norm_scale else ""
    return f"{sparsity.operand}-{sparsity.precision}-{sparsity.method}-{sparsity.rank}{scale}"
