# SPDX-License-Identifier: Apache-2.0
"""What no general rule of tracing serves: a file a family, each changing instances of its classes for a trace."""

from __future__ import annotations

import torch

from lynx_compile.models.families.hidream import every_expert

FAMILIES = (every_expert,)


def prepare(module: torch.nn.Module) -> None:
    """Give submodules of the families methods that can be exported; they hide the class's until deleted."""
    for change in FAMILIES:
        change(module)
