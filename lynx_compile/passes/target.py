# SPDX-License-Identifier: Apache-2.0
"""What a recipe compiles for: a TensorRT or torch, and which GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lynx_compile import recipe
from lynx_compile.engine import trt


@dataclass(frozen=True)
class Target:
    """``name``: tensorrt, tensorrt_rtx or torch, of this ``version``. ``gpus``: architectures that the engine is for.

    ``metadata_layout``: of 2:4 weights in 16 bits. ``gpu``: the one that it is built on and for; None where it is for
    any of ``gpus``.
    """

    name: str
    version: str
    gpus: tuple[str, ...]
    metadata_layout: Literal[80, 90]
    gpu: str | None


def target_of(engine: recipe.Engine) -> Target:
    """What ``engine`` asks for, on this machine.

    Raises:
        InputError: its TensorRT is not here, or has no GPU where it needs one.
    """
    if engine.backend == "torch":
        here = trt.gpu()
        gpus = (here,) if here else engine.gpus
        return Target("torch", str(torch.__version__), gpus, 90 if gpus == ("sm90",) else 80, None)
    backend = trt.backend(engine.backend)
    gpus = engine.gpus if backend.ahead_of_time else (trt.gpu() or "unknown",)
    return Target(backend.name, backend.version, gpus, trt.metadata_layout(backend), trt.build_gpu(backend))
