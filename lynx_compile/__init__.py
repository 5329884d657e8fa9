# SPDX-License-Identifier: Apache-2.0
"""Offline compiler from diffusion transformers to TensorRT engines with 2:4 sparse linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lynx_compile.extras import require

if TYPE_CHECKING:
    from torch import nn

    from lynx_compile.engine.module import EngineModule
    from lynx_compile.files.progress import Progress

__version__ = "0.1.0"


def load(
    path: str | Path,
    *others: str | Path,
    device: int = 0,
    cuda_graph: bool = False,
    progress: Progress | None = None,
) -> EngineModule:
    """Load an engine in the place of a diffusers transformer.

        pipe = FluxPipeline.from_pretrained(..., transformer=None, dtype=torch.bfloat16)
        pipe.transformer = lynx_compile.load("flux.engine")
        pipe.to("cuda")

    Args:
        path: the engine, with its manifest beside it.
        others: of the same transformer, where its pipeline calls it in several ways; each call runs in the first that
            serves it.
        device: number of the GPU.
        cuda_graph: replay a CUDA graph, which saves launches.
        progress: called with what is loaded, bytes done and bytes in all.

    Raises:
        InputError: a file is missing, damaged or of another engine; TensorRT, the plugin library or the GPU is not
            what the engine was built for; it was compiled from no torch module; or torch or diffusers is not
            installed.
        EngineError: TensorRT or CUDA fails.
    """
    require("torch", "lynx_compile.load")
    from lynx_compile.engine.module import load as load_module  # torch and diffusers only where they are used

    return load_module(path, *others, device=device, cuda_graph=cuda_graph, progress=progress)


def apply(module: nn.Module, path: str | Path, *, restorable: bool = True) -> nn.Module:
    """Put an engine's linears into the diffusers transformer that it was compiled from: torch alone, no TensorRT.

        pipe = FluxPipeline.from_pretrained(..., dtype=torch.bfloat16)
        lynx_compile.apply(pipe.transformer, "flux.engine")
        pipe.to("cuda")
        pipe.transformer.compile_repeated_blocks(fullgraph=True)

    Linears that read one tensor become one product; a GELU behind them is part of it, behind 2:4 weights and in FP8
    SwiGLU and GEGLU too. Any resolution and number of tokens run. On a GPU the plugin library's kernels compute; on a
    CPU, slowly, their definitions. A LoRA that is loaded before stays beside them; diffusers' group offload comes
    after.

    Args:
        module: on any device, in the engine's dtype, without a fused LoRA.
        path: the engine (which itself is not read), with its manifest and weights beside it.
        restorable: keep the module's own linears, in host memory.

    Returns:
        ``module``.

    Raises:
        InputError: a file is missing, damaged or of another model; there are compiled linears or a fused LoRA in the
            module; it is offloaded in groups already; or safetensors is not installed.
    """
    require("torch", "lynx_compile.apply")
    from lynx_compile.torch_ops.apply import apply as apply_to  # torch only where it is used

    return apply_to(module, Path(path), restorable=restorable)


def restore(module: nn.Module) -> nn.Module:
    """Undo ``apply``: the module's own linears, to the bit, on the device where the compiled ones are.

    Raises:
        InputError: there is nothing to undo, or it was not kept.
    """
    from lynx_compile.torch_ops.apply import restore as restore_in

    return restore_in(module)
