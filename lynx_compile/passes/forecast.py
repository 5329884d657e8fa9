# SPDX-License-Identifier: Apache-2.0
"""What a compilation will take of memory and disk, from the model's config and headers: nothing is loaded or run.

Activations are not counted: they are small beside the weights, but for calls side by side, which ``memory_gib`` bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lynx_compile.errors import DiskFullError, OutOfMemoryError
from lynx_compile.files.disk import free_bytes
from lynx_compile.models.blocks import block_paths
from lynx_compile.models.checkpoint import Checkpoint
from lynx_compile.models.dtypes import DTYPES
from lynx_compile.models.onnx_source import OnnxSource
from lynx_compile.models.place import on_gpu
from lynx_compile.models.streamed import free_memory, has_room
from lynx_compile.passes.calibrate import measurements
from lynx_compile.passes.select import MEASURED_FP8_GPUS, SparsityPlan
from lynx_compile.passes.speed_table import Form
from lynx_compile.passes.target import Target
from lynx_compile.recipe import Recipe

GIB = 2**30
PROCESS = int(0.55 * GIB)  # torch, diffusers, ONNX and TensorRT, with nothing loaded
FLOAT, HALF = 4, 2  # bytes
BUILDER = GIB  # TensorRT, besides the constants that it holds twice
WORK_ON_A_NODE = 4  # times its float32 weights: they, what is made of them, masks and what is in between
WORK_ON_A_MOMENT = 4  # times: the moments, a factor of them, and its inverse
BYTES_OF_A_WEIGHT = {  # in the rewritten file; 4 bits of metadata for every four
    Form("activation"): 2.0,
    Form("weight"): 1 + 1 / 8,
    Form("none", fp8=True): 1.0,
    Form("activation", fp8=True): 1.0,
    Form("weight", fp8=True): 1 / 2 + 1 / 8,
}


@dataclass(frozen=True)
class Need:
    """Bytes that a stage takes: anonymous memory of the host and memory of the GPU while it runs; disk from then on."""

    stage: str
    host: int
    gpu: int
    disk: int


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
        """Of all stages together: what they leave stays in the cache."""
        return sum(need.disk for need in self.needs)

    def describe(self) -> list[str]:
        """Lines for the user."""
        lines = [
            f"{self.parameters / 1e9:.2f} billion parameters, {self.changed / 1e9:.2f} of them in linears that "
            f"change{'; loaded block by block' if self.streamed else ''}"
        ]
        lines += [
            f"{need.stage:<11} {need.host / GIB:6.1f} GiB of memory"
            + (f", {need.gpu / GIB:.1f} GiB on the GPU" if need.gpu else "")
            + f", {need.disk / GIB:6.1f} GiB of disk"
            for need in self.needs
        ]
        free = "" if self.free_disk is None else f", of which {self.free_disk / GIB:.1f} are free"
        return [*lines, f"{self.disk / GIB:.1f} GiB of disk in all{free}"]

    def require(self, folder: Path, there: int = 0) -> None:
        """Refuse what cannot end well.

        Args:
            folder: that of the outputs. there: bytes of them that an earlier run has left.

        Raises:
            DiskFullError: there is no room for all stages. OutOfMemoryError: no memory for one.
        """
        if self.free_disk is not None and self.disk - there > self.free_disk:
            raise DiskFullError(
                f"The compilation takes about {self.disk / GIB:.1f} GiB of disk, and "
                f"{self.free_disk / GIB:.1f} GiB are free in {folder}.",
                "Free some space, or choose another output or --cache.",
            )
        worst = max(self.needs, key=lambda need: need.host)
        if self.free_host is not None and worst.host > self.free_host:
            raise OutOfMemoryError(
                f"Stage '{worst.stage}' takes about {worst.host / GIB:.1f} GiB of memory, and "
                f"{self.free_host / GIB:.1f} GiB are free.",
                "End other programs, set 'weights: external' under engine or lower calibration.memory_gib, or use a "
                "machine with more.",
            )


def forecast(
    recipe: Recipe,
    checkpoint: Checkpoint | OnnxSource,
    target: Target,
    folder: Path,
    plan: SparsityPlan | None = None,
) -> Forecast:
    """The needs of one engine, on this machine.

    Args:
        folder: of the outputs, whose disk counts.
        plan: of the recorded calls; None: all linears of blocks count as sparse, each by itself, which is at most.
    """
    dtype, with_gpu = DTYPES[recipe.model.dtype], on_gpu()
    place = (dtype, "cuda") if with_gpu else (torch.float32, "cpu")
    stored = isinstance(checkpoint, Checkpoint)
    streamed = isinstance(checkpoint, Checkpoint) and not has_room(checkpoint, *place)
    sizes = _sizes(checkpoint, recipe, target, plan)
    budget = int(recipe.calibration.memory_gib * GIB)
    module = _loaded(checkpoint, sizes, *place, streamed)
    copied = 0 if stored and _is_stored(checkpoint, dtype) else HALF * sizes.parameters
    node, square = sizes.largest, sizes.square
    work = WORK_ON_A_NODE * node + WORK_ON_A_MOMENT * square
    tuned = recipe.sparsity.needs_moments and (
        recipe.compensation.tune == "blockwise" or (recipe.compensation.tune == "auto" and with_gpu)
    )
    written = sizes.lynx + HALF * (sizes.parameters - sizes.changed)
    embedded = recipe.engine.weights == "embedded" and target.name != "torch"
    engine = written if embedded else 0
    needs = [
        Need("calibrate", *_split(with_gpu, module + min(sizes.moments, budget)), sizes.moments),
        Need("compensate", *_split(with_gpu, work), sizes.solved),
        Need("tune", *_split(with_gpu, module + budget), 2 * sizes.solved),
        Need("export", PROCESS + copied, 0, copied),
        Need("rewrite", PROCESS + WORK_ON_A_NODE * node // 2, 0, written),
        Need("build", PROCESS + (BUILDER + 2 * engine if target.name != "torch" else 0), 0, engine),
    ]
    skipped = {"calibrate"} if not recipe.sparsity.needs_moments else set()
    skipped |= set() if tuned else {"tune"}
    return Forecast(
        parameters=sizes.parameters,
        changed=sizes.changed,
        streamed=streamed,
        needs=tuple(need for need in needs if need.stage not in skipped),
        free_disk=free_bytes(next(path for path in (folder, *folder.parents) if path.exists())),
        free_host=free_memory("cpu"),
        free_gpu=free_memory("cuda") if with_gpu else None,
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights, and bytes of what stages make of them.

    ``largest``: float32 bytes of the largest node. ``square``: of the largest moments. ``moments``: of all.
    ``solved``: of what ``compensate`` writes. ``lynx``: of the rewritten weights.
    """

    parameters: int
    changed: int
    largest_block: int
    outside: int
    largest: int
    square: int
    moments: int
    solved: int
    lynx: int


@dataclass(frozen=True)
class _Node:
    """``linears``: path and rows of each. ``channels``: K."""

    linears: tuple[tuple[str, int], ...]
    channels: int
    form: Form

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.linears)


def _sizes(
    checkpoint: Checkpoint | OnnxSource, recipe: Recipe, target: Target, plan: SparsityPlan | None
) -> _Sizes:
    module = checkpoint.build("meta", torch.bfloat16)
    of_blocks = {path: _count(module.get_submodule(path)) for path in block_paths(module)}
    parameters = _count(module)
    if plan is None:
        nodes, moments = _every_linear(module, recipe, target)
    else:
        nodes = [
            _Node(
                tuple((linear.path, linear.out_channels) for linear in group.linears),
                group.in_channels,
                Form(group.operand, group.fp8),
            )
            for group in plan.groups
        ]
        moments = [one.bytes for one in measurements(plan)] if recipe.sparsity.needs_moments else []
    changed = {path: rows * node.channels for node in nodes for path, rows in node.linears}
    bytes_of = {  # of candidates, the largest
        path: max(BYTES_OF_A_WEIGHT[node.form] for node in nodes if path in dict(node.linears))
        for path in changed
    }
    return _Sizes(
        parameters=parameters,
        changed=sum(changed.values()),
        largest_block=max(of_blocks.values(), default=0),
        outside=parameters - sum(of_blocks.values()),
        largest=max((FLOAT * node.rows * node.channels for node in nodes), default=0),
        square=max(moments, default=0),
        moments=sum(moments),
        solved=sum(node.rows * node.channels * (1 if node.form.fp8 else HALF) for node in nodes),
        lynx=int(sum(changed[path] * most for path, most in bytes_of.items())),
    )


def _every_linear(module: torch.nn.Module, recipe: Recipe, target: Target) -> tuple[list[_Node], list[int]]:
    """Every linear of the blocks by itself, and the bytes of its moments."""
    fp8 = any(recipe.sparsity.precisions(bool(target.gpus) and set(target.gpus) <= set(MEASURED_FP8_GPUS)))
    form = Form("activation" if "weight" not in recipe.sparsity.operands else "weight", fp8)
    nodes = [
        _Node(((f"{block}.{path}", linear.weight.shape[0]),), linear.weight[0].numel(), form)
        for block in block_paths(module)
        for path, linear in module.get_submodule(block).named_modules()
        if isinstance(linear, torch.nn.Linear)
    ]
    moments = [FLOAT * node.channels**2 * (3 if form.operand == "activation" else 1) for node in nodes]
    return nodes, moments if recipe.sparsity.needs_moments else []


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
    return (PROCESS, taken) if with_gpu else (PROCESS + taken, 0)
