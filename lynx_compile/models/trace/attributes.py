# SPDX-License-Identifier: Apache-2.0
"""Tables that a module makes at its first call and keeps would be traced tensors: they go when the trace ends."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

# What is never asked for what it holds: a module's submodules are met anyway, and code holds no tables of its own.
OPAQUE = (
    torch.nn.Module,
    torch.Tensor,
    torch.dtype,
    torch.device,
    type,
    ModuleType,
    FunctionType,
    MethodType,
)


@contextmanager
def attributes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Afterwards every submodule has the attributes and buffers that it had before.

    So have the objects, lists and dicts that it holds, which may be no modules (a class of rotary tables, for
    instance). What its functions remember of earlier calls (``functools.lru_cache``) is forgotten before and after.
    """
    found: dict[int, Any] = {}
    for submodule in module.modules():
        _holders(vars(submodule), found)
    before = [(holder, holder.copy()) for holder in found.values()]
    _forget(module)
    try:
        yield
    finally:
        for holder, content in before:
            holder.clear()
            holder.extend(content) if isinstance(holder, list) else holder.update(content)
        _forget(module)


def _holders(value: Any, found: dict[int, Any]) -> None:
    """Every list and dict that a value holds, those of its attributes among them."""
    if isinstance(value, OPAQUE) or id(value) in found:
        return
    if type(value) in (list, dict):  # a config is a dict that cannot be written
        found[id(value)] = value
        members = value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple):
        members = value
    else:
        members = [vars(value)] if hasattr(value, "__dict__") else []
    for member in list(members):
        _holders(member, found)


def _forget(module: torch.nn.Module) -> None:
    """Clear the caches of the functions and methods beside the module's classes."""
    names = {type(submodule).__module__ for submodule in module.modules()}
    for file in [sys.modules[name] for name in names & sys.modules.keys()]:
        for value in list(vars(file).values()):
            inside = list(vars(value).values()) if isinstance(value, type) else []
            for function in (value, *inside):
                if isinstance(function, functools._lru_cache_wrapper):
                    function.cache_clear()
