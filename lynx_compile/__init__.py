# SPDX-License-Identifier: Apache-2.0
"""Offline compiler from diffusion transformers to TensorRT engines with 2:4 sparse linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

        pipe = FluxPipeline.from_pretrained(..., transformer=None, torch_dtype=torch.bfloat16)
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
            what the engine was built for; or it was compiled from no torch module.
        EngineError: TensorRT or CUDA fails.
    """
    from lynx_compile.engine.module import load as load_module  # torch and diffusers only where they are used

    return load_module(path, *others, device=device, cuda_graph=cuda_graph, progress=progress)
