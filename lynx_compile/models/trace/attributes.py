# SPDX-License-Identifier: Apache-2.0
"""Tables that a module makes at its first call and keeps would be traced tensors: they go when the trace ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def attributes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Afterwards every submodule has the attributes and buffers that it had before."""
    before = [(m, dict(m.__dict__), dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for submodule, attributes, buffers in before:
            submodule.__dict__.clear()
            submodule.__dict__.update(attributes)
            submodule._buffers.clear()
            submodule._buffers.update(buffers)
