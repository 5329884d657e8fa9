# SPDX-License-Identifier: Apache-2.0
"""Puts compiled linears where a module's own were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lynx_compile.torch_ops.module_gates import ModuleGate
from lynx_compile.torch_ops.readers import Merged, Reader


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor: their paths, output channels, and the channel from which on GELU follows.

    ``channels_first``: they are convolutions of kernel 1, whose channels are on axis 1. ``gate``: the gated activation
    of them that the product makes; then without GELU.
    """

    linears: tuple[str, ...]
    sizes: tuple[int, ...]
    gelu_from: int
    channels_first: bool = False
    gate: ModuleGate | None = None


@dataclass(frozen=True)
class Change:
    """``new`` stands where ``old`` did: as ``name`` of ``holder``; ``was_there``: rather than its class's."""

    holder: nn.Module
    name: str
    old: Any
    new: Any
    was_there: bool = True


def merge(module: nn.Module, group: Group, linear: nn.Module) -> list[Change]:
    """Put readers of ``linear`` where the group's linears and their activations are."""
    return (
        _merge_gated(module, group, group.gate, linear) if group.gate else _merge_plain(module, group, linear)
    )


def undo(module: nn.Module, changes: Sequence[Change]) -> None:
    """Everything as it was before ``changes``; a new module is replaced where it stands by now."""
    places = {
        id(child): (holder, name) for holder in module.modules() for name, child in holder._modules.items()
    }
    for change in reversed(changes):
        holder, name = places.get(id(change.new), (change.holder, change.name))
        if change.was_there:
            setattr(holder, name, change.old)
        else:
            delattr(holder, name)


def _merge_plain(module: nn.Module, group: Group, linear: nn.Module) -> list[Change]:
    merged, changes = Merged(linear, group.sizes, group.channels_first), []
    start = 0
    for index, (path, size) in enumerate(zip(group.linears, group.sizes, strict=True)):
        reader = Reader(merged, index)
        activation = gelu_behind(module, path) if start >= group.gelu_from else None
        start += size
        if activation is None or not path.startswith(f"{activation}."):
            changes.append(replace(module, path, reader))
        if activation is not None:
            whole = path.startswith(f"{activation}.")
            changes.append(replace(module, activation, reader if whole else nn.Identity()))
    return changes


def _merge_gated(module: nn.Module, group: Group, gate: ModuleGate, linear: nn.Module) -> list[Change]:
    """The linears with rows of their own first, the gated channels last, as the product returns them."""
    parts = {place: size for place, size in _plain_parts(group, gate).items() if size}
    parts[gate.reader] = parts.pop(gate.reader, 0) + gate.channels
    merged = Merged(linear, list(parts.values()), group.channels_first)
    changes = [replace(module, place, Reader(merged, index)) for index, place in enumerate(parts)]
    changes += [replace(module, path, nn.Identity()) for path in gate.idle]
    for (path, name), value in gate.attributes.items():
        holder = module.get_submodule(path)
        changes.append(Change(holder, name, getattr(holder, name), value, name in holder.__dict__))
        setattr(holder, name, value)
    return changes


def _plain_parts(group: Group, gate: ModuleGate) -> dict[str, int]:
    """Rows that are neither activated nor gates, of every linear; that of the gate under the path of its reader."""
    parts, start = {}, 0
    for path, size in zip(group.linears, group.sizes, strict=True):
        taken = sum(
            max(0, min(start + size, first + gate.channels) - max(start, first))
            for first in (gate.x, gate.gate)
        )
        parts[gate.reader if path == gate.linear else path] = size - taken
        start += size
    return parts


def is_gate_last(group: Group, gate: ModuleGate) -> bool:
    """Whether the gate's linear has no rows of its own, or no other linear has some behind them."""
    parts = _plain_parts(group, gate)
    return not parts[gate.reader] or [place for place, size in parts.items() if size][-1] == gate.reader


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


def replace(module: nn.Module, path: str, new: nn.Module) -> Change:
    """Put ``new`` at ``path``."""
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    change = Change(holder, name, holder.get_submodule(name), new)
    setattr(holder, name, new)
    return change
