# SPDX-License-Identifier: Apache-2.0
"""What a compilation will take of memory and disk, from the model's config and headers: nothing is loaded or run.

Activations are not counted: they are small beside the weights, but for calls side by side, which ``memory_gib`` bounds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lynx_compile.errors import DiskFullError, OutOfMemoryError
from lynx_compile.files.disk import free_bytes
from lynx_compile.files.outputs import Outputs
from lynx_compile.models.blocks import block_paths
from lynx_compile.models.checkpoint import Checkpoint
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.onnx_source import OnnxSource
from lynx_compile.models.place import on_gpu
from lynx_compile.models.streamed import free_memory, has_room
from lynx_compile.passes.calibrate import measurements
from lynx_compile.passes.durations import Calls, seconds_of_stages
from lynx_compile.passes.end_to_end import leaves_room
from lynx_compile.passes.lanes import COPIES
from lynx_compile.passes.select import MEASURED_FP8_GPUS, Candidates, SparsityPlan
from lynx_compile.passes.sensitivity import AT_ONCE
from lynx_compile.passes.speed_table import DENSE_FP8, Form
from lynx_compile.passes.target import Target
from lynx_compile.passes.tune import SMALL, TOKENS_A_STEP
from lynx_compile.recipe import Recipe
from lynx_compile.solve.tune import BYTES_A_WEIGHT, SAVED

GIB = 2**30
PROCESS = int(0.55 * GIB)  # torch, diffusers, ONNX and TensorRT, with nothing loaded
# With a GPU, as three runs of FLUX.1-dev's size on an H100 and an H200 took: what CUDA's libraries hold of the host
# while the module runs and later, and of the GPU besides tensors.
CUDA_RUNNING, CUDA_LOADED, CONTEXT = int(2.2 * GIB), int(0.7 * GIB), GIB
GRAPH = 3 << 20  # of a block while it is traced
FLOAT, HALF = 4, 2  # bytes
BUILDER, BUILDER_A_NODE = GIB // 2, int(5.5 * 2**20)  # TensorRT, besides the constants that it holds twice
REWRITTEN = 10 << 20  # of a block while nodes are matched and replaced
PACKING = 2.0  # times a node's float32 weights: they, and what is written of them
# Of a weight, what tuning end to end could go on with, Adam's two moments among it; twice, while a new file takes the
# old one's place.
SHELVED = 2 * FLOAT * (len(SAVED) + 2)
STEP = 3.0  # times what linears read and return: kept for a step's backward pass, and gradients of it
WORK_ON_THE_LARGEST = 2.0  # times a node's float32 weights, where the largest are kept and nothing is solved
# What a solve holds, as measured, while it works on weights and while it factorises moments: so many times the float32
# weights of its node, and so many times K x K.
WORK = {
    Form("weight"): ((9.0, 2.0), (2.0, 5.6)),
    Form("weight", fp8=True): ((9.0, 2.0), (3.0, 5.7)),
    DENSE_FP8: ((6.5, 2.5), (2.0, 4.2)),
    Form("activation"): ((8.0, 6.0), (3.0, 8.5)),
    Form("activation", fp8=True): ((7.0, 6.0), (3.0, 7.5)),
}
BYTES_OF_A_WEIGHT = {  # in the rewritten file; 4 bits of metadata for every four
    Form("activation"): 2.0,
    Form("weight"): 1 + 1 / 8,
    DENSE_FP8: 1.0,
    Form("activation", fp8=True): 1.0,
    Form("weight", fp8=True): 1 / 2 + 1 / 8,
}


@dataclass(frozen=True)
class Need:
    """Bytes that a stage takes: anonymous memory of the host and memory of the GPU while it runs; disk from then on.

    ``seconds``: None where they cannot be told. ``there``: bytes of the disk that an earlier run has left.
    ``is_done``: whether that run finished the stage; it does not run again if what it depends on is unchanged.
    """

    stage: str
    host: int
    gpu: int
    disk: int
    seconds: float | None = None
    there: int = 0
    is_done: bool = False

    @property
    def left_seconds(self) -> float:
        """As far as they can be told."""
        if self.is_done or self.seconds is None:
            return 0.0
        return self.seconds * (1 - min(self.there / max(self.disk, 1), 1.0))

    @property
    def words(self) -> str:
        return (
            f"{self.stage:<11} {self.host / GIB:6.2f} GiB of memory"
            + (f", {self.gpu / GIB:.1f} GiB on the GPU" if self.gpu else "")
            + f", {self.disk / GIB:6.1f} GiB of disk, "
            + ("an earlier run has done it" if self.is_done else _time_in_words(self.seconds))
        )


@dataclass(frozen=True)
class Forecast:
    """``changed``: weights in linears that change, of ``parameters``. ``streamed``: a block is in memory at a time.

    ``free_disk``, ``free_host``, ``free_gpu``: bytes that there are now; None where the system does not tell, or there
    is no GPU.
    """

    parameters: int
    changed: int
    streamed: bool
    needs: tuple[Need, ...]
    free_disk: int | None
    free_host: int | None
    free_gpu: int | None

    @property
    def disk(self) -> int:
        """That all stages together still take: what they leave stays in the cache."""
        return sum(max(need.disk - need.there, 0) for need in self.needs)

    def describe(self) -> list[str]:
        """Lines for the user."""
        lines = [
            f"{self.parameters / 1e9:.2f} billion parameters, {self.changed / 1e9:.2f} of them in linears that "
            f"change{'; loaded block by block' if self.streamed else ''}"
        ]
        lines += [need.words for need in self.needs]
        there = sum(min(need.there, need.disk) for need in self.needs)
        left = f", besides {there / GIB:.1f} GiB that an earlier run has left" if there else ""
        free = "" if self.free_disk is None else f"; {self.free_disk / GIB:.1f} GiB are free"
        told = sum(need.left_seconds for need in self.needs)
        others = [need.stage for need in self.needs if need.seconds is None and not need.is_done]
        more = f", and what {' and '.join(others)} takes" if others else ""
        lines.append(f"{self.disk / GIB:.1f} GiB of disk in all{left}{free}")
        return lines if len(others) == len(self.needs) else [*lines, f"{_time_in_words(told)} in all{more}"]

    def require(self, folder: Path) -> None:
        """Refuse what cannot end well.

        Args:
            folder: that of the outputs.

        Raises:
            DiskFullError: there is no room for all stages. OutOfMemoryError: no memory for one.
        """
        if self.free_disk is not None and self.disk > self.free_disk:
            raise DiskFullError(
                f"The compilation takes about {self.disk / GIB:.1f} GiB of disk, and "
                f"{self.free_disk / GIB:.1f} GiB are free in {folder}.",
                "Free some space, or choose another output or --cache.",
            )
        left = [need for need in self.needs if not need.is_done]
        worst = max(left, key=lambda need: need.host, default=None)
        if worst is not None and self.free_host is not None and worst.host > self.free_host:
            raise OutOfMemoryError(
                f"Stage '{worst.stage}' takes about {worst.host / GIB:.1f} GiB of memory, and "
                f"{self.free_host / GIB:.1f} GiB are free.",
                "End other programs, set 'weights: external' under engine or lower calibration.memory_gib, or use a "
                "machine with more.",
            )


def _time_in_words(seconds: float | None) -> str:
    if seconds is None:
        return "time unknown"
    if seconds < 90:
        return f"about {max(round(seconds), 1)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def forecast(
    recipe: Recipe,
    checkpoint: Checkpoint | OnnxSource,
    target: Target,
    outputs: Outputs,
    found: Candidates | None = None,
    calls: Calls | None = None,
) -> Forecast:
    """The needs of one engine, on this machine.

    Args:
        outputs: whose folder's disk counts, and what an earlier run has left there.
        found: what linears could become, of the recorded calls; None: all linears of blocks count as sparse, each by
            itself, which is at most.
        calls: those that were recorded; without them there are no times, and activations do not count.
    """
    dtype, with_gpu = DTYPES[recipe.model.dtype], on_gpu()
    place = (dtype, "cuda") if with_gpu else (torch.float32, "cpu")
    stored = isinstance(checkpoint, Checkpoint)
    streamed = isinstance(checkpoint, Checkpoint) and not has_room(checkpoint, *place)
    plan = None if found is None else found.everything()
    sizes = _sizes(checkpoint, recipe, target, plan)
    budget = int(recipe.calibration.memory_gib * GIB)
    module = _loaded(checkpoint, sizes, *place, streamed)
    copied = 0 if stored and _is_stored(checkpoint, dtype) else dtype.itemsize * sizes.parameters
    is_open = found is None or bool(found.open)
    judged = recipe.judge is not None and is_open
    tuned = recipe.sparsity.needs_moments and (
        recipe.compensation.tune in ("blockwise", "end_to_end")
        or (recipe.compensation.tune == "auto" and (with_gpu or sizes.changed <= SMALL))
    )
    written = sizes.lynx + dtype.itemsize * (sizes.parameters - sizes.changed)
    embedded = recipe.engine.weights == "embedded" and target.name != "torch"
    engine = written if embedded else 0
    building = BUILDER + BUILDER_A_NODE * sizes.nodes + 2 * engine
    kept = sizes.moments <= budget
    activations = _activations(calls, place[0])
    run = module + activations
    side_by_side = _between_blocks(calls, place[0], budget)
    by_block = run + sizes.block_moments + side_by_side(2)
    measured = run + sizes.moments if kept and not streamed else by_block
    solving = sizes.solve
    if recipe.sparsity.needs_moments:
        solving += module if kept else measured
    in_floats = FLOAT * sizes.node_weights
    probed = in_floats if in_floats <= budget else AT_ONCE * sizes.largest
    tuning = place[0].itemsize * sizes.largest_block + BYTES_A_WEIGHT * sizes.block_changed
    tuning += int(STEP * _calls_a_step(calls, place[1]) * activations)
    free = (free_memory("cuda") or 0) - module if with_gpu else float("inf")
    to_end = recipe.compensation.tune == "end_to_end" or (
        recipe.compensation.tune == "auto" and leaves_room(sizes.changed, free)
    )
    process = PROCESS + (CUDA_LOADED if with_gpu else 0)  # of what comes after the module has run
    packing = int(PACKING * sizes.largest)
    packs_on_host, packs_on_gpu = (0, CONTEXT + packing) if with_gpu else (packing, 0)
    tuned_disk = sizes.solved + sizes.tuned + (SHELVED * sizes.changed if to_end else 0)
    needs = [
        Need("calibrate", *_split(with_gpu, measured), sizes.moments),
        Need("compensate", *_split(with_gpu, solving), sizes.solved),
        Need("sensitivity", *_split(with_gpu, 2 * run - module + probed), 0),
        Need("tune", *_split(with_gpu, run + side_by_side(COPIES) + tuning), tuned_disk),
        Need("verify", *_split(with_gpu, run + place[0].itemsize * sizes.changed), 0),
        Need("export", process + GRAPH * sizes.blocks + copied, 0, copied),
        Need("rewrite", process + REWRITTEN * sizes.blocks + packs_on_host, packs_on_gpu, written),
        Need("build", process + (building if target.name != "torch" else 0), 0, engine),
    ]
    skipped = {"calibrate"} if not recipe.sparsity.needs_moments or not kept else set()
    skipped |= set() if tuned else {"tune"}
    skipped |= set() if judged else {"sensitivity", "verify"}
    times: dict[str, float] = {}
    if plan is not None and calls is not None:
        times = seconds_of_stages(
            recipe,
            plan,
            calls,
            kept=kept,
            judged=judged,
            blocks=sizes.blocks,
            solved=sizes.solved,
            written=written,
        )
        if target.name == "torch":
            times["build"] = 1.0
    return Forecast(
        parameters=sizes.parameters,
        changed=sizes.changed,
        streamed=streamed,
        needs=tuple(
            replace(need, seconds=times.get(need.stage), **_left(outputs, need.stage))
            for need in needs
            if need.stage not in skipped
        ),
        free_disk=free_bytes(
            next(path for path in (outputs.folder, *outputs.folder.parents) if path.exists())
        ),
        free_host=free_memory("cpu"),
        free_gpu=free_memory("cuda") if with_gpu else None,
    )


FOLDERS = {  # of the cache, in which stages write
    "calibrate": "statistics",
    "compensate": "weights",
    "tune": "tuned",
    "export": "dense",
    "rewrite": "lynx",
    "build": "engine",
}


def _left(outputs: Outputs, stage: str) -> dict[str, Any]:
    """What an earlier run has left of a stage: bytes, and whether it was done; its files may have been published."""
    folder = outputs.cache / FOLDERS[stage] if stage in FOLDERS else None
    published = {"rewrite": (outputs.onnx, outputs.weights), "build": (outputs.engine, outputs.plugin)}
    is_done = (outputs.cache / f"{stage}.stamp.json").exists()
    files = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    files += [path for path in published.get(stage, ()) if is_done and path.exists()]
    return {"there": sum(path.stat().st_size for path in files), "is_done": is_done}


def _between_blocks(calls: Calls | None, dtype: torch.dtype, budget: int) -> Callable[[int], int]:
    """Bytes of the calls that wait between two blocks, of so many copies each: what the budget holds, at most."""
    if calls is None:
        return lambda copies: budget
    of_all = dtype.itemsize * calls.state * (calls.fitted + calls.held_out)
    return lambda copies: min(budget, copies * of_all)


def _activations(calls: Calls | None, dtype: torch.dtype) -> int:
    """Bytes of a block's in one call: what its linears read and return."""
    if calls is None:
        return 0
    blocks: Counter[str] = Counter()
    for group in calls.groups:
        block = ".".join(group.name.split(".")[:2])
        width = group.in_channels + sum(linear.out_channels for linear in group.linears)
        blocks[block] += dtype.itemsize * group.tokens * width
    return max(blocks.values(), default=0)


def _calls_a_step(calls: Calls | None, device: str) -> int:
    """How many recorded ones a step of tuning joins."""
    longest = 0 if calls is None else max((group.tokens for group in calls.groups), default=0)
    return math.ceil(TOKENS_A_STEP[device] / longest) if longest else 0


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights, and bytes of what stages make of them.

    ``solve``: of what solving the worst node takes. ``largest``: float32 bytes of the largest node.
    ``moments``: of all, and ``block_moments`` of the worst block. ``block_changed``: weights of a block that change, at
    most. ``solved``: of what ``compensate`` writes. ``lynx``: of the rewritten weights.
    ``tuned``: of what tuning keeps of blocks until all are done. ``node_weights``: numbers in all nodes that could be.
    """

    parameters: int
    changed: int
    blocks: int
    nodes: int
    largest_block: int
    block_changed: int
    outside: int
    largest: int
    solve: int
    moments: int
    block_moments: int
    solved: int
    tuned: int
    lynx: int
    node_weights: int


@dataclass(frozen=True)
class _Node:
    """``linears``: path and rows of each. ``channels``: K."""

    linears: tuple[tuple[str, int], ...]
    channels: int
    form: Form

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.linears)

    def solve_bytes(self, *, needs_moments: bool) -> int:
        """That solving it takes at most, its weights and moments included."""
        phases = WORK[self.form] if needs_moments else ((WORK_ON_THE_LARGEST, 0.0),)
        most = max(weights * self.rows + square * self.channels for weights, square in phases)
        return int(FLOAT * self.channels * most)


def _sizes(
    checkpoint: Checkpoint | OnnxSource, recipe: Recipe, target: Target, plan: SparsityPlan | None
) -> _Sizes:
    module = checkpoint.build("meta", torch.bfloat16)
    of_blocks = {path: _count(module.get_submodule(path)) for path in block_paths(module)}
    parameters, needs = _count(module), recipe.sparsity.needs_moments
    nodes, moments = _every_linear(module, recipe, target) if plan is None else _planned(plan)
    changed: dict[str, int] = {}
    forms: defaultdict[str, set[Form]] = defaultdict(set)
    for node in nodes:
        for path, rows in node.linears:
            changed[path] = rows * node.channels
            forms[path].add(node.form)

    def at_most(bytes_of: Callable[[Form], float]) -> int:
        """All that change, each in the form that takes most."""
        return int(sum(weights * max(map(bytes_of, forms[path])) for path, weights in changed.items()))

    return _Sizes(
        parameters=parameters,
        changed=sum(changed.values()),
        blocks=len(of_blocks),
        nodes=len(nodes),
        largest_block=max(of_blocks.values(), default=0),
        block_changed=_most_in_a_block(changed, of_blocks),
        outside=parameters - sum(of_blocks.values()),
        largest=max((FLOAT * node.rows * node.channels for node in nodes), default=0),
        solve=max((node.solve_bytes(needs_moments=needs) for node in nodes), default=0),
        moments=sum(moments.values()) if needs else 0,
        block_moments=_most_in_a_block(moments, of_blocks) if needs else 0,
        solved=sum(node.rows * node.channels * (1 if node.form.fp8 else HALF) for node in nodes),
        tuned=at_most(lambda form: 1 if form.fp8 else FLOAT),
        lynx=at_most(BYTES_OF_A_WEIGHT.__getitem__),
        node_weights=sum(node.rows * node.channels for node in nodes),
    )


def _most_in_a_block(sizes: Mapping[str, int], blocks: Iterable[str]) -> int:
    """Of what belongs to modules, by path, the most of any block; what is in none counts as one."""
    found: Counter[str] = Counter()
    for path, size in sizes.items():
        found[next((block for block in blocks if path.startswith(f"{block}.")), "")] += size
    return max(found.values(), default=0)


def _planned(plan: SparsityPlan) -> tuple[list[_Node], dict[str, int]]:
    """The plan's nodes, and the bytes of the moments of what they read, by the path of a reader."""
    nodes = [
        _Node(
            tuple((linear.path, linear.out_channels) for linear in group.linears),
            group.in_channels,
            group.form,
        )
        for group in plan.groups
    ]
    return nodes, {one.path: one.bytes for one in measurements(plan)}


def _every_linear(
    module: torch.nn.Module, recipe: Recipe, target: Target
) -> tuple[list[_Node], dict[str, int]]:
    """The same for every linear of the blocks by itself."""
    fp8 = any(recipe.sparsity.precisions(bool(target.gpus) and set(target.gpus) <= set(MEASURED_FP8_GPUS)))
    form = Form("activation" if "weight" not in recipe.sparsity.operands else "weight", fp8)
    nodes = [
        _Node(((f"{block}.{path}", linear.weight.shape[0]),), linear.weight[0].numel(), form)
        for block in block_paths(module)
        for path, linear in module.get_submodule(block).named_modules()
        if isinstance(linear, torch.nn.Linear)
    ]
    squares = 3 if form.operand == "activation" else 1
    return nodes, {node.linears[0][0]: FLOAT * node.channels**2 * squares for node in nodes}


def _count(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _loaded(
    checkpoint: Checkpoint | OnnxSource, sizes: _Sizes, dtype: torch.dtype, device: str, streamed: bool
) -> int:
    """Bytes of the module that runs; what is mapped as it is stored takes none."""
    if device == "cpu" and isinstance(checkpoint, Checkpoint) and _is_stored(checkpoint, dtype):
        return 0
    return dtype.itemsize * (sizes.outside + sizes.largest_block if streamed else sizes.parameters)


def _is_stored(checkpoint: Checkpoint | OnnxSource, dtype: torch.dtype) -> bool:
    return isinstance(checkpoint, Checkpoint) and all(
        tensor.dtype == dtype for tensor in checkpoint.tensors.values() if tensor.dtype.is_floating_point
    )


def _split(with_gpu: bool, taken: int) -> tuple[int, int]:
    """Memory of the host and of the GPU, for what is where the module is."""
    return (PROCESS + CUDA_RUNNING, CONTEXT + taken) if with_gpu else (PROCESS + taken, 0)
