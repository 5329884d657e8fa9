# SPDX-License-Identifier: Apache-2.0
"""Where torch computes: on the current GPU where there is one, else on the CPU, unless the user has chosen."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from contextlib import suppress

import torch

from lynx_compile import parallel
from lynx_compile.engine import trt
from lynx_compile.errors import InputError

_on_cpu = False


def on_gpu() -> bool:
    """Whether models run on a GPU."""
    return not _on_cpu and torch.cuda.is_available()


def device_type() -> str:
    """``cuda`` or ``cpu``."""
    return "cuda" if on_gpu() else "cpu"


def reclaim() -> None:
    """Give the system back the memory of what was forgotten just now, before someone looks at what is free."""
    gc.collect()  # modules, pipelines and their hooks refer to each other
    with suppress(OSError, AttributeError):  # glibc keeps what was freed between what was not
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def choose(device: str) -> None:
    """For the rest of this process, before anything has run on a GPU.

    Args:
        device: ``cpu``: torch leaves the GPUs alone (TensorRT builds for the first one all the same); ``cuda`` or
            ``cuda:N``: there is this GPU alone, for TensorRT too.

    Raises:
        InputError: there is no such device, or torchrun has given every process its own.
    """
    global _on_cpu
    found = re.fullmatch(r"cpu|cuda(?::(?P<number>\d+))?", device)
    if found is None:
        raise InputError(f"--device {device} is no device.", "Give cpu, cuda or cuda:N, such as cuda:1.")
    _on_cpu = device == "cpu"
    if _on_cpu:
        return
    if parallel.launched():
        raise InputError(
            f"--device {device}: torchrun gives each process its own GPU.", "Leave --device out."
        )
    # TensorRT builds in a thread of its own, where CUDA's current device is always the first one.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = int(found["number"] or 0)
    numbers = visible.split(",") if visible is not None else [str(n) for n in range(number + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers[number] if number < len(numbers) else ""
    if trt.gpu() is None:
        raise InputError(
            f"--device {device}: there is no such GPU.", "See nvidia-smi for those that are there."
        )
