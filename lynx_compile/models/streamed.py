# SPDX-License-Identifier: Apache-2.0
"""A module whose repeated blocks hold their weights only while they are in use: one block in memory, others on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from lynx_compile.models.blocks import block_paths
from lynx_compile.models.checkpoint import Checkpoint

SHARE = 0.5  # of the memory that is free, which the weights may take; activations and moments need the rest


class Streamed:
    """``module``: in ``dtype`` on ``device``; what stands outside of its blocks has weights all the time.

    A block that runs loads them and drops them again. ``resident`` keeps them over several runs.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._users: Counter[str] = Counter()
        self.module = checkpoint.build("cpu", dtype)
        blocks = block_paths(self.module)
        checkpoint.fill(self.module, dtype=dtype, without=blocks)
        self.module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        for path in blocks:
            block = self.module.get_submodule(path)
            block.forward = self._streaming(path, block.forward)

    @contextmanager
    def resident(self, path: str) -> Iterator[None]:
        """The block's weights are there meanwhile."""
        block = self.module.get_submodule(path)
        if not self._users[path]:
            self._checkpoint.fill(block, path, self._dtype)
            block.to(self._device)
        self._users[path] += 1
        try:
            yield
        finally:
            self._users[path] -= 1
            if not self._users[path]:
                nothing = {name: t.to("meta") for name, t in block.state_dict().items()}
                block.load_state_dict(nothing, assign=True)
                block.requires_grad_(False)

    def _streaming(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.resident(path):
                return forward(*args, **kwargs)

        return run


def has_room(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> bool:
    """Whether the whole module fits into memory. Weights that are mapped as they are stored take none of their own."""
    needed = sum(
        tensor.bytes // tensor.dtype.itemsize * dtype.itemsize
        for tensor in checkpoint.tensors.values()
        if device != "cpu" or tensor.dtype != dtype
    )
    free = free_memory(device)
    return free is None or needed <= SHARE * free


def free_memory(device: str) -> int | None:
    """Bytes that may be taken there; None where the system does not tell."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
