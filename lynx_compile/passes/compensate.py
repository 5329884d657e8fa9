# SPDX-License-Identifier: Apache-2.0
"""Weights that make up for what pruning drops: closed-form least squares on the calibration moments.

With z~ the pruned token and S = s * z~ (``sparsity``), the sparse op computes S W'^T + x A^T B^T + b'. For the
moments C of x and S, ``joint`` minimises the expected squared error against x W^T + b over W', A, B and b' at
once (all means taken off)::

    C_perp = Cxx - Cxs Css^-1 Csx            the part of x that S does not tell
    D      = A^T B^T, the best rank-r fit of W^T in the metric C_perp^(1/2)
    W'^T   = W^T + Css^-1 [ (Csx - Css) W^T - Csx D ]
    b'     = b + what the means leave

Rank 0 leaves the refit alone. ``paper`` is RT-Lynx (arXiv 2605.26632, section 3): W and b stay, and only the
low-rank branch is fitted, here to its optimum instead of by training. ``none`` prunes and repairs nothing.

Where the weights are the 2:4 operand, ``joint`` is ``weight_refit.prune``, and ``none`` is Wanda's mask alone.

In FP8 the rank is 0, and the refitted weights are rounded: by ``rounding.round_weights`` on the same moments, to the
nearest for ``none``. The errors count it, and what rounding makes wrong in x, which was measured with the moments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lynx_compile import parallel
from lynx_compile.errors import StageError
from lynx_compile.files.progress import Progress
from lynx_compile.files.resume import StageVersion
from lynx_compile.files.tensors import save_tensors
from lynx_compile.files.unfinished import unfinished
from lynx_compile.models.dit import DiT
from lynx_compile.models.place import device_type
from lynx_compile.models.structure import LinearGroup
from lynx_compile.ops.fp8 import Rounded, round_rows
from lynx_compile.ops.sparse_linear import collapse_low_rank, expand_low_rank
from lynx_compile.passes.calibrate import Finish, Statistics, Unkept
from lynx_compile.passes.select import SparseGroup, SparsityPlan
from lynx_compile.recipe import NodeOperand, Sparsity
from lynx_compile.solve import replayed
from lynx_compile.solve.linalg import cholesky, moved
from lynx_compile.solve.low_rank import low_rank
from lynx_compile.solve.masks import magnitude_mask, wanda_mask
from lynx_compile.solve.moments import LayerStatistics, PrunedStatistics, dense_squares, relative_error
from lynx_compile.solve.rounding import round_weights
from lynx_compile.solve.weight_refit import prune

COMPENSATE = StageVersion("compensate", 2, ("torch",))


@dataclass(frozen=True)
class SparseLinearWeights:
    """What one node needs, for a whole group of linears: N is the sum of theirs.

    ``weight``: [N, padded_width(K, rank)], W' and the expanded B; with operand ``weight`` [N, K], at most 2 of
    every 4 not zero, and rank 0. ``lora_down``: A [max(rank, 1), K]. ``bias``: [N]. All float32.
    ``weight_scale``: of an FP8 node alone, [N] float32. Its ``weight`` is W_q [N, K] in e4m3 (``ops.fp8``), and rank 0.
    ``out_channels``: N of each linear, in the order of ``linears``.
    ``errors``: of each linear, expected on the calibration tokens by the moments (``moments.relative_error``).
    ``solved_errors``: where tuning moved the weights, those of the ones that were solved, by the same moments.
    """

    linears: tuple[str, ...]
    out_channels: tuple[int, ...]
    weight: torch.Tensor
    lora_down: torch.Tensor
    bias: torch.Tensor
    rank: int
    norm_scale: bool
    errors: tuple[float, ...]
    operand: NodeOperand = "activation"
    weight_scale: torch.Tensor | None = None
    solved_errors: tuple[float, ...] | None = None

    @property
    def in_channels(self) -> int:
        return self.lora_down.shape[1]

    @property
    def fp8(self) -> bool:
        return self.weight_scale is not None


def compensate(
    dit: DiT,
    plan: SparsityPlan,
    statistics: Statistics | Unkept,
    sparsity: Sparsity,
    folder: Path,
    progress: Progress,
    key: str = "",
) -> tuple[Path, ...]:
    """Solve every group of the plan and write its ``SparseLinearWeights``, one safetensors file each.

    Several processes solve a share of the groups each. A run that was stopped is gone on with by one of the same
    ``key``; of ``Unkept`` statistics a block that is solved is not measured again.

    Raises:
        StageError: the moments cannot be factorised, or what was solved does not fit the model's dtype.
    """
    paths = _files(folder, plan.groups)
    files = dict(zip(plan.groups, paths, strict=True))
    own = set(parallel.share(plan.groups))
    with unfinished(folder, key) as has:
        left = [group for group, path in files.items() if not has(path)]
        done = len(own.difference(left))
        names = dict.fromkeys(group.name for group in left)
        measured = (
            statistics.of(names, progress) if sparsity.needs_moments else ((name, None) for name in names)
        )
        for name, finish in measured:
            groups = {group: files[group] for group in left if group.name == name and group in own}
            if groups:
                _solve_all(dit, groups, finish, sparsity)
                done += len(groups)
                progress("linears compensated", done, len(own))
    replayed.forget()
    return paths


def _solve_all(
    dit: DiT, files: Mapping[SparseGroup, Path], finish: Finish | None, sparsity: Sparsity
) -> None:
    """Solve the groups that read one tensor, from its moments if there are any, and write them."""
    moments = None if finish is None else finish()
    for group, path in files.items():
        weight, bias = dense_weights(dit, group)
        solved = solve(group, weight, bias, moments, sparsity) if moments else largest(group, weight, bias)
        _require_range(solved, dit.dtype)
        save_weights(path, solved, dit.dtype)


def _files(folder: Path, groups: Sequence[SparseGroup]) -> tuple[Path, ...]:
    """A file for each group. Candidates of one form may be nodes of more linears or fewer."""
    paths: list[Path] = []
    for group in groups:
        path = folder / f"{group.name}.{'fp8.' if group.fp8 else ''}{group.operand}.safetensors"
        paths.append(path if path not in paths else path.with_stem(f"{path.stem}.{len(group.linears)}"))
    return tuple(paths)


def save_weights(path: Path, solved: SparseLinearWeights, dtype: torch.dtype = torch.float32) -> None:
    """Write what ``load_weights`` reads; weights in ``dtype``, in which ``rewrite`` writes them, are half the disk."""
    tensors = {name: getattr(solved, name) for name in ("weight", "lora_down", "bias")}
    if not solved.fp8:
        tensors["weight"] = tensors["weight"].to(dtype)
    if solved.weight_scale is not None:
        tensors["weight_scale"] = solved.weight_scale
    facts = {
        name: getattr(solved, name)
        for name in ("linears", "out_channels", "rank", "norm_scale", "errors", "operand")
    }
    if solved.solved_errors is not None:
        facts["solved_errors"] = solved.solved_errors
    save_tensors(path, tensors, {"lynx": json.dumps(facts)})


def load_weights(path: Path) -> SparseLinearWeights:
    """Read what ``compensate`` wrote."""
    return _read(path, lambda file, name: _widened(file.get_tensor(name)))


def described_weights(path: Path) -> SparseLinearWeights:
    """What ``save_weights`` wrote, its tensors on the meta device: read are their shapes alone."""
    return _read(path, lambda file, name: torch.empty(file.get_slice(name).get_shape(), device="meta"))


def stored_weight(path: Path, name: str) -> torch.Tensor:
    """One tensor of what ``save_weights`` wrote, in the dtype in which it is stored.

    Raises:
        StageError: the file cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _read(path: Path, get: Callable[[Any, str], torch.Tensor]) -> SparseLinearWeights:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["lynx"])
            tensors = {name: get(file, name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from None
    return SparseLinearWeights(
        linears=tuple(facts["linears"]),
        out_channels=tuple(facts["out_channels"]),
        rank=facts["rank"],
        norm_scale=facts["norm_scale"],
        errors=tuple(facts["errors"]),
        operand=facts["operand"],
        solved_errors=tuple(facts["solved_errors"]) if "solved_errors" in facts else None,
        **tensors,
    )


def _unreadable(path: Path, error: Exception) -> StageError:
    return StageError(
        "compensate", f"{path} cannot be read ({error}).", "Run again with --fresh, or delete the cache."
    )


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def solve(
    group: SparseGroup, weight: torch.Tensor, bias: torch.Tensor, moments: LayerStatistics, sparsity: Sparsity
) -> SparseLinearWeights:
    """The compensated weights of one group. weight: [N, K], bias: [N], float32."""
    device = device_type()
    weight, bias = weight.to(device), bias.to(device)
    moments = moved(moments, device)
    if group.fp8:
        return _solve_fp8(group, weight, bias, moments, sparsity)
    if group.operand == "weight":
        return _solve_weights(group, weight, bias, moments, sparsity)
    assert isinstance(moments, PrunedStatistics), "calibrate gathers them for every node that prunes"
    return _solve_activations(group, weight, bias, moments, sparsity)


def largest(group: SparseGroup, weight: torch.Tensor, bias: torch.Tensor) -> SparseLinearWeights:
    """The two largest of every four weights, nothing repaired. weight: [N, K], changed in place; bias: [N]; float32.

    The errors are those that inputs would give whose channels all have one variance and are not correlated.
    """
    dense = torch.linalg.vector_norm(weight, dim=1).square()
    sparse = weight.masked_fill_(~magnitude_mask(weight), 0.0)
    lost = dense - torch.linalg.vector_norm(sparse, dim=1).square()
    return _sparse_weights(group, sparse, bias, _errors(group, lost, dense))


def expected_errors(
    dit: DiT, group: SparseGroup, solutions: Sequence[SparseLinearWeights], moments: LayerStatistics
) -> list[tuple[float, ...]]:
    """``SparseLinearWeights.errors`` of any weights of a group, each of ``solutions``."""
    device = device_type()
    weight, bias = (tensor.to(device) for tensor in dense_weights(dit, group))
    moments = moved(moments, device)
    dense = dense_squares(weight, bias, moments)
    return [
        _errors(group, _lost(group, weight, bias, moved(solved, device), moments), dense)
        for solved in solutions
    ]


def _lost(
    group: SparseGroup,
    weight: torch.Tensor,
    bias: torch.Tensor,
    solved: SparseLinearWeights,
    moments: LayerStatistics,
) -> torch.Tensor:
    """[N]: what ``solved`` makes wrong of each row's result, squared."""
    channels, rank = group.in_channels, solved.rank
    changed, offset = solved.weight[:, :channels].float(), solved.bias - bias
    if solved.weight_scale is not None:
        changed = changed * solved.weight_scale[:, None]
    if group.operand == "activation":
        assert isinstance(moments, PrunedStatistics), "calibrate gathers them for every node that prunes"
        lora_up = collapse_low_rank(solved.weight, channels, rank).float()
        lost = _lost_squares(weight, changed, solved.lora_down[:rank], lora_up, offset, moments)
        noise = moments.s_rounding
    else:
        lost, noise = _lost_of_weights(weight, changed, offset, moments), moments.x_rounding
    if solved.fp8:
        assert noise is not None, "calibrate measures it for every FP8 node"
        lost = lost + changed.square() @ noise
    return lost


def _solve_activations(
    group: SparseGroup,
    weight: torch.Tensor,
    bias: torch.Tensor,
    moments: PrunedStatistics,
    sparsity: Sparsity,
) -> SparseLinearWeights:
    rank = min(sparsity.rank_for(group.in_channels), group.in_channels, len(weight)) // 16 * 16
    if sparsity.method == "joint":
        refit, lora_down, lora_up, offset = _joint(weight, moments, rank, sparsity.ridge, group.name)
    elif sparsity.method == "paper":
        refit, offset = weight, torch.zeros_like(bias)
        lora_down, lora_up = _paper(weight, moments, rank, sparsity.ridge, group.name)
    else:
        refit, offset = weight, torch.zeros_like(bias)
        lora_down, lora_up = weight.new_zeros(0, group.in_channels), weight.new_zeros(len(weight), 0)
    lost = _lost_squares(weight, refit, lora_down, lora_up, offset, moments)
    return SparseLinearWeights(
        linears=tuple(linear.path for linear in group.linears),
        out_channels=tuple(linear.out_channels for linear in group.linears),
        weight=expand_low_rank(refit, lora_up).cpu(),
        lora_down=(lora_down if rank else weight.new_zeros(1, group.in_channels)).cpu(),
        bias=(bias + offset).cpu(),
        rank=rank,
        norm_scale=sparsity.uses_norm_scale,
        errors=_errors(group, lost, dense_squares(weight, bias, moments)),
    )


def _solve_weights(
    group: SparseGroup, weight: torch.Tensor, bias: torch.Tensor, moments: LayerStatistics, sparsity: Sparsity
) -> SparseLinearWeights:
    if sparsity.method == "none":
        sparse, offset = weight * wanda_mask(weight, moments), torch.zeros_like(bias)
    else:
        sparse, offset = prune(weight, moments, sparsity.ridge, group.name)
    squares = _lost_of_weights(weight, sparse, offset, moments)
    errors = _errors(group, squares, dense_squares(weight, bias, moments))
    return _sparse_weights(group, sparse.cpu(), (bias + offset).cpu(), errors)


def _sparse_weights(
    group: SparseGroup, sparse: torch.Tensor, bias: torch.Tensor, errors: tuple[float, ...]
) -> SparseLinearWeights:
    return SparseLinearWeights(
        linears=tuple(linear.path for linear in group.linears),
        out_channels=tuple(linear.out_channels for linear in group.linears),
        weight=sparse,
        lora_down=torch.zeros(1, group.in_channels),
        bias=bias,
        rank=0,
        norm_scale=False,
        errors=errors,
        operand="weight",
    )


def _solve_fp8(
    group: SparseGroup, weight: torch.Tensor, bias: torch.Tensor, moments: LayerStatistics, sparsity: Sparsity
) -> SparseLinearWeights:
    """Dense weights, 2:4 ones, or those for 2:4 activations, in e4m3."""
    if group.operand == "activation":
        assert isinstance(moments, PrunedStatistics), "calibrate gathers them for every node that prunes"
        rounded, offset, lost = _fp8_for_activations(group, weight, moments, sparsity)
        noise = moments.s_rounding
    else:
        rounded, offset, lost = _fp8_weights(group, weight, moments, sparsity)
        noise = moments.x_rounding
    assert noise is not None, "calibrate measures it for every FP8 node"
    lost = lost + rounded.dequantized().square() @ noise
    return SparseLinearWeights(
        linears=tuple(linear.path for linear in group.linears),
        out_channels=tuple(linear.out_channels for linear in group.linears),
        weight=rounded.values.cpu(),
        lora_down=torch.zeros(1, group.in_channels),
        bias=(bias + offset).cpu(),
        rank=0,
        norm_scale=False,
        errors=_errors(group, lost, dense_squares(weight, bias, moments)),
        operand=group.operand,
        weight_scale=rounded.scale.cpu(),
    )


def _fp8_weights(
    group: SparseGroup, weight: torch.Tensor, moments: LayerStatistics, sparsity: Sparsity
) -> tuple[Rounded, torch.Tensor, torch.Tensor]:
    """W_q, what to add to the bias [N], and what they lose with x as it is [N]; 2:4 where that is the operand."""
    sparse = group.operand == "weight"
    if sparsity.method == "none":
        rounded = round_rows(weight, wanda_mask(weight, moments) if sparse else None)
        offset = weight.new_zeros(len(weight))
    else:
        start = prune(weight, moments, sparsity.ridge, group.name)[0] if sparse else weight
        rounded = round_weights(start, weight, moments.xx, sparsity.ridge)
        offset = (weight - rounded.dequantized()) @ moments.x_mean
    return rounded, offset, _lost_of_weights(weight, rounded.dequantized(), offset, moments)


def _fp8_for_activations(
    group: SparseGroup, weight: torch.Tensor, moments: PrunedStatistics, sparsity: Sparsity
) -> tuple[Rounded, torch.Tensor, torch.Tensor]:
    """The same for pruned x: W' without a low rank, rounded by the moments of what it is multiplied with."""
    if sparsity.method == "none":
        rounded, offset = round_rows(weight), weight.new_zeros(len(weight))
    else:
        refit, *_ = _joint(weight, moments, 0, sparsity.ridge, group.name)
        rounded = round_weights(refit, refit, moments.ss, sparsity.ridge)
        offset = weight @ moments.x_mean - rounded.dequantized() @ moments.s_mean
    no_rank = weight.new_zeros(0, group.in_channels), weight.new_zeros(len(weight), 0)
    return rounded, offset, _lost_squares(weight, rounded.dequantized(), *no_rank, offset, moments)


def _joint(
    weight: torch.Tensor, m: PrunedStatistics, rank: int, ridge: float, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W' [N, K], A [r, K], B [N, r] and the change of bias [N]; the ridge pulls W' towards W."""
    ss_factor = cholesky(m.ss, ridge, name)
    known = torch.cholesky_solve(m.xs.T, ss_factor)  # Css^-1 Csx
    unknown = m.xx - m.xs @ known  # C_perp
    lora_down, lora_up = low_rank(weight.T, unknown, rank, ridge, name)
    low = lora_down.T @ lora_up.T  # D [K, N]
    change = torch.cholesky_solve((m.xs.T - m.ss) @ weight.T - m.xs.T @ low, ss_factor)
    refit = weight + change.T
    offset = weight @ m.x_mean - refit @ m.s_mean - lora_up @ (lora_down @ m.x_mean)
    return refit, lora_down, lora_up, offset


def _paper(
    weight: torch.Tensor, m: PrunedStatistics, rank: int, ridge: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K], B [N, r] that minimise |x W^T - S W^T - x A^T B^T|, W untouched and no bias to lean on."""
    xx = m.xx + torch.outer(m.x_mean, m.x_mean)
    xs = m.xs + torch.outer(m.x_mean, m.s_mean)
    target = torch.cholesky_solve((xx - xs) @ weight.T, cholesky(xx, ridge, name))  # best D of full rank
    return low_rank(target, xx, rank, ridge, name)


def _lost_squares(
    weight: torch.Tensor,
    refit: torch.Tensor,
    lora_down: torch.Tensor,
    lora_up: torch.Tensor,
    offset: torch.Tensor,
    m: PrunedStatistics,
) -> torch.Tensor:
    """E[(y_sparse - y_dense)^2] of every output channel, [N], from the moments alone."""
    on_x = weight - lora_up @ lora_down  # y_dense - y_sparse = on_x x - refit S - offset
    return (
        ((on_x @ m.xx) * on_x).sum(1) - 2 * ((on_x @ m.xs) * refit).sum(1) + ((refit @ m.ss) * refit).sum(1)
        + (on_x @ m.x_mean - refit @ m.s_mean - offset).square()
    )  # fmt: skip


def _lost_of_weights(
    weight: torch.Tensor, changed: torch.Tensor, offset: torch.Tensor, moments: LayerStatistics
) -> torch.Tensor:
    """The same where only the weights, dense ones to ``changed``, and the bias are others."""
    lost = weight - changed
    return ((lost @ moments.xx) * lost).sum(1) + (lost @ moments.x_mean - offset).square()


def _errors(group: SparseGroup, lost: torch.Tensor, dense: torch.Tensor) -> tuple[float, ...]:
    """Expected relative error of every linear of the group, from mean squares of its output channels [N]."""
    sizes = [linear.out_channels for linear in group.linears]
    pairs = zip(lost.split(sizes), dense.split(sizes), strict=True)
    return tuple(relative_error(float(a.sum()), float(b.sum())) for a, b in pairs)


def dense_weights(dit: DiT, group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """The group's weights stacked: [N, K] and [N], float32 on the CPU; nothing else of the model is read."""

    def read(name: str) -> torch.Tensor:
        return dit.checkpoint.tensor(name, torch.float32)

    weights = [
        read(f"{linear.path}.weight").flatten(1) for linear in group.linears
    ]  # a convolution's is [N, K, 1, 1]
    biases = [
        read(f"{linear.path}.bias") if linear.bias else torch.zeros(linear.out_channels)
        for linear in group.linears
    ]
    return torch.cat(weights), torch.cat(biases)


def _require_range(solved: SparseLinearWeights, dtype: torch.dtype) -> None:
    """Refuse values that ``dtype``, in which ``rewrite`` writes them, can only hold as infinities."""
    ends = list(accumulate(solved.out_channels))
    rows = [slice(end - size, end) for end, size in zip(ends, solved.out_channels, strict=True)]
    parts = [(linear, solved.weight[own]) for linear, own in zip(solved.linears, rows, strict=True)]
    parts += [(linear, solved.bias[own]) for linear, own in zip(solved.linears, rows, strict=True)]
    for linear, values in (*parts, (solved.linears[0], solved.lora_down)):
        if not torch.isfinite(torch.stack(torch.aminmax(values.float())).to(dtype)).all():
            raise StageError(
                "compensate",
                f"a weight of '{linear}' is {float(values.abs().max()):.4g} now, "
                f"more than {str(dtype).removeprefix('torch.')} holds ({torch.finfo(dtype).max:.4g}).",
                "Set model.dtype to bf16, raise sparsity.ridge, or name the linear in sparsity.exclude.",
            )
