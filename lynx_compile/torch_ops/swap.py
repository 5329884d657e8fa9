# SPDX-License-Identifier: Apache-2.0
"""Puts compiled linears where a module's own were."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lynx_compile.torch_ops.readers import Merged, Reader


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor: their paths, output channels, and the channel from which on GELU follows.

    ``channels_first``: they are convolutions of kernel 1, whose channels are on axis 1.
    """

    linears: tuple[str, ...]
    sizes: tuple[int, ...]
    gelu_from: int
    channels_first: bool = False


def merge(module: nn.Module, group: Group, linear: nn.Module) -> dict[str, nn.Module]:
    """Put readers of ``linear`` where the group's linears and their activations are.

    Returns:
        What was there, by its path.
    """
    merged, before = Merged(linear, group.sizes, group.channels_first), {}
    start = 0
    for index, (path, size) in enumerate(zip(group.linears, group.sizes, strict=True)):
        reader = Reader(merged, index)
        activation = gelu_behind(module, path) if start >= group.gelu_from else None
        start += size
        if activation is None or not path.startswith(f"{activation}."):
            before[path] = replace(module, path, reader)
        if activation is not None:
            whole = path.startswith(f"{activation}.")
            before[activation] = replace(module, activation, reader if whole else nn.Identity())
    return before


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    """The linear at ``path``."""
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear), path
    return linear


def gelu_behind(module: nn.Module, path: str) -> str | None:
    """Path of the module that applies the tanh GELU to a linear's output and to nothing else, where one is known.

    diffusers has two: an activation that holds its linear (``GELU`` with ``proj``), and FLUX's single blocks
    (``proj_mlp``, ``act_mlp``).
    """
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    if type(holder).__name__ == "GELU" and name == "proj" and getattr(holder, "approximate", "") == "tanh":
        return parent
    act = getattr(holder, "act_mlp", None) if name == "proj_mlp" else None
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return f"{parent}.act_mlp".lstrip(".")
    return None


def replace(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put ``new`` at ``path``; returns what was there."""
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    before = holder.get_submodule(name)
    setattr(holder, name, new)
    return before
