# SPDX-License-Identifier: Apache-2.0
"""``lynx-compile bench --blocks``: FLUX.1-dev's two kinds of block, dense against sparse linears, on this GPU.

diffusers' own blocks at full width with random weights, 4096 image and 512 text tokens, in torch; nothing else of the
block changes (norms, attention, gates), so that the ratio says what a whole step gains. Both sides merge the linears
that read one tensor, and both run as a CUDA graph: kernels are compared, not Python.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lynx_compile.errors import InputError, StageError
from lynx_compile.files.atomic import save_text
from lynx_compile.ops.sparse_linear import keep_mask
from lynx_compile.tools.bench import Ratio, Timing, sparse_weight_of
from lynx_compile.tools.timing import captured, file_name, quantiles, take_long_turns, take_turns
from lynx_compile.torch_ops.bindings import LIBRARY, load_library

WIDTH, HEADS, HEAD_CHANNELS = 3072, 24, 128
IMAGE_TOKENS, TEXT_TOKENS = 4096, 512
TOLERANCE = 2**-5  # relative error of a block: every kernel rounds to bf16, attention amplifies it a little


@dataclass(frozen=True)
class BlockResult:
    """One block: microseconds dense and sparse, their ratio, and the share of dense time that its linears take.

    ``steady_ratio``: ``ratio`` in turns of a quarter second. ``error``: relative, of the sparse block against the dense
    one with the same 2:4 weights.
    """

    block: str
    dense: Timing
    sparse: Timing
    ratio: Ratio
    steady_ratio: float
    linear_share: float
    error: float


@dataclass(frozen=True)
class BlockBench:
    """Both blocks on one machine."""

    device: str
    torch: str
    results: tuple[BlockResult, ...]


class _Merged(nn.Module):
    """The linears that read one tensor, as one product, with the GELU that follows the last ``gelu`` channels."""

    def __init__(
        self, linears: Sequence[nn.Linear], tokens: int, gelu: int, library: ctypes.CDLL | None
    ) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.gelu_from = sum(self.sizes) - gelu
        self.weight = torch.cat([linear.weight for linear in linears]).detach()
        self.bias = torch.cat([linear.bias for linear in linears]).detach()
        self.op = (
            None
            if library is None
            else sparse_weight_of(library, self.weight, self.bias, tokens, self.gelu_from)
        )
        self.x: torch.Tensor | None = None
        self.outputs: tuple[torch.Tensor, ...] = ()

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Output ``index`` for x; computed at the first of the readers' calls."""
        if x is not self.x:
            self.x, self.outputs = x, self.compute(x)
        return self.outputs[index]

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        if self.op is not None:
            return self.op(rows).view(*x.shape[:-1], -1).split(self.sizes, -1)
        y = torch.addmm(self.bias, rows, self.weight.T).view(*x.shape[:-1], -1)
        *plain, last = y.split(self.sizes, -1)
        return (*plain, functional.gelu(last, approximate="tanh") if self.gelu_from < y.shape[-1] else last)


class _Member(nn.Module):
    """Stands for one linear of a ``_Merged``."""

    def __init__(self, merged: _Merged, index: int) -> None:
        super().__init__()
        self.merged, self.index = merged, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.take(x, self.index)


# (linears that read one tensor, tokens, whether GELU follows the last of them); an activation module that becomes
# part of the product is named with its attribute.
DOUBLE = (
    (("attn.to_q", "attn.to_k", "attn.to_v"), IMAGE_TOKENS, None),
    (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), TEXT_TOKENS, None),
    (("attn.to_out.0",), IMAGE_TOKENS, None),
    (("attn.to_add_out",), TEXT_TOKENS, None),
    (("ff.net.0.proj",), IMAGE_TOKENS, "ff.net.0"),
    (("ff.net.2",), IMAGE_TOKENS, None),
    (("ff_context.net.0.proj",), TEXT_TOKENS, "ff_context.net.0"),
    (("ff_context.net.2",), TEXT_TOKENS, None),
)
SINGLE = (
    (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), IMAGE_TOKENS + TEXT_TOKENS, "act_mlp"),
    (("proj_out",), IMAGE_TOKENS + TEXT_TOKENS, None),
)


def bench_blocks(*, rounds: int = 30, library: Path = LIBRARY) -> BlockBench:
    """Measure both kinds of block in bf16.

    Raises:
        InputError: there is no GPU, or the plugin library cannot be used. StageError: a block's result is wrong.
    """
    if not torch.cuda.is_available():
        raise InputError("There is no GPU here to measure blocks on.", "Run it on a machine with one.")
    from diffusers.models.transformers.transformer_flux import (  # seconds, and only here
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )

    kernels = load_library(library)
    results = tuple(
        _measure(name, kind, groups, kernels, rounds)
        for name, kind, groups in (
            ("double", FluxTransformerBlock, DOUBLE),
            ("single", FluxSingleTransformerBlock, SINGLE),
        )
    )
    return BlockBench(torch.cuda.get_device_name(), torch.__version__, results)


def save(bench: BlockBench, folder: Path) -> Path:
    """Write ``DEVICE-blocks.json`` into ``folder``; returns its path."""
    path = folder / f"{file_name(bench.device)}-blocks.json"
    save_text(path, json.dumps(asdict(bench), indent=1) + "\n")
    return path


def _measure(
    name: str,
    kind: type[nn.Module],
    groups: Sequence[tuple[tuple[str, ...], int, str | None]],
    kernels: ctypes.CDLL,
    rounds: int,
) -> BlockResult:
    inputs = _inputs()
    with torch.inference_mode():
        reference = _merge(_block(kind, pruned=True), groups, None)
        checked = _merge(_block(kind, pruned=True), groups, kernels)
        wanted, found = (torch.cat([*block(**inputs)], 1).double() for block in (reference, checked))
        error = float((found - wanted).norm() / (wanted - _residual(inputs)).norm())
        if not error < TOLERANCE:
            raise StageError(
                "bench",
                f"the {name} block is off by {error:.2e} of what it adds.",
                "Do not use this build on this GPU; please report it with the GPU's name.",
            )
        dense = _merge(_block(kind, pruned=False), groups, None)
        sparse = _merge(_block(kind, pruned=False), groups, kernels)
        replays = {
            "dense": captured(lambda: dense(**inputs)),
            "sparse": captured(lambda: sparse(**inputs)),
            "linears": _captured_linears(dense),
        }
        times = take_turns(replays, rounds, 1)
        steady = take_long_turns({name: replays[name] for name in ("dense", "sparse")}, 1)
    ratios = [d / s for d, s in zip(times["dense"], times["sparse"], strict=True)]
    return BlockResult(
        block=name,
        dense=Timing(*quantiles(times["dense"])),
        sparse=Timing(*quantiles(times["sparse"])),
        ratio=Ratio(*quantiles(ratios)),
        steady_ratio=steady["dense"] / steady["sparse"],
        linear_share=statistics.median(
            part / whole for part, whole in zip(times["linears"], times["dense"], strict=True)
        ),
        error=error,
    )


def _block(kind: type[nn.Module], *, pruned: bool) -> nn.Module:
    """A block with the same random weights at every call; ``pruned``: already 2:4."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        block = kind(WIDTH, HEADS, HEAD_CHANNELS).bfloat16().eval()
    for module in block.modules() if pruned else ():
        if isinstance(module, nn.Linear):
            module.weight.mul_(keep_mask(module.weight))
    return block


def _merge(
    block: nn.Module, groups: Sequence[tuple[tuple[str, ...], int, str | None]], kernels: ctypes.CDLL | None
) -> nn.Module:
    """``block`` with its linears merged, and sparse when there are kernels."""
    for paths, tokens, activation in groups:
        linears = [block.get_submodule(path) for path in paths]
        gelu = linears[-1].out_features if activation else 0
        merged = _Merged(linears, tokens, gelu, kernels)  # type: ignore[arg-type]
        for index, path in enumerate(paths):
            if activation and path.startswith(activation + "."):
                continue  # the linear's parent goes as a whole
            _set(block, path, _Member(merged, index))
        if activation:
            whole = paths[-1].startswith(activation + ".")
            _set(block, activation, _Member(merged, len(paths) - 1) if whole else nn.Identity())
    return block


def _set(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def _inputs() -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").bfloat16()

    angles = (
        torch.rand(IMAGE_TOKENS + TEXT_TOKENS, HEAD_CHANNELS // 2, generator=generator, device="cuda") * 6
    )
    angles = angles.repeat_interleave(2, 1)
    return {
        "hidden_states": normal(1, IMAGE_TOKENS, WIDTH),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, WIDTH),
        "temb": normal(1, WIDTH),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _residual(inputs: dict[str, Any]) -> torch.Tensor:
    """What a block adds to: its input, text first."""
    return torch.cat((inputs["encoder_hidden_states"], inputs["hidden_states"]), 1).double()


def _captured_linears(block: nn.Module) -> Callable[[], None]:
    """The block's large products alone, on inputs of the right shapes."""
    found = [module.merged for module in block.modules() if isinstance(module, _Member) and module.index == 0]
    products = [
        (merged, torch.randn_like(merged.x)) for merged in dict.fromkeys(found) if merged.x is not None
    ]

    def run() -> None:
        for merged, x in products:
            torch.addmm(merged.bias, x.reshape(-1, x.shape[-1]), merged.weight.T)

    return captured(run)
