# SPDX-License-Identifier: Apache-2.0
"""A call of the transformer against the one that was compiled: what may differ, and the form of the result."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from lynx_compile.engine.arguments import Arguments, Constant, Structure, unflatten
from lynx_compile.engine.manifest import Call
from lynx_compile.errors import InputError

OURS = "diffusers"  # the one package whose classes a manifest may name: its modules are safe to import


def check_constants(call: Call, given: Arguments) -> None:
    """Whether a call's constants are those of the compiled one, and its tensors where that one has tensors.

    An absent dict or list is None. The mask of a padded axis may be None: then everything counts.

    Raises:
        InputError: they are not; it names the first such argument and both values.
    """
    masks = {pad.mask for pad in call.padding if pad.tensor in given.tensors}
    for name in [*call.tensors, *call.constants, *given.tensors, *given.constants]:
        compiled = "a tensor" if name in call.tensors else call.constants.get(name)
        found = "a tensor" if name in given.tensors else given.constants.get(name)
        tensors = name in call.tensors, name in given.tensors
        if tensors == (True, True) or (tensors == (False, False) and _same(compiled, found)):
            continue
        if name in masks and not tensors[1] and found is None:
            continue
        raise InputError(
            f"The engine was compiled for '{name}' = {_said(compiled)}, and this call has {_said(found)}.",
            "Call it as it was recorded, or record such a call and compile another engine for it; adapters are "
            "merged into the checkpoint before."
            if compiled is None
            else "Call it as it was recorded, or record such a call and compile another engine for it.",
        )


def result_of(
    structure: Structure, outputs: Mapping[str, Any], return_dict: bool | None, returns: int | None = None
) -> Any:
    """The outputs in the form that was asked for.

    Args:
        returns: values of the tuple in a dataclass's place: all of its fields, or those that are not None.
        return_dict: as diffusers has it: False for a tuple in a dataclass's place; None where ``forward`` has no
            such parameter.

    Raises:
        InputError: a dataclass was asked for, and it is not known or not in the installed diffusers.
    """
    if return_dict is False and "dataclass" in structure:
        members = [node for _, node in structure["fields"]]
        if returns != len(members):
            members = [node for node in members if node != {"constant": None}]
        return unflatten({"tuple": members}, outputs)
    if return_dict and "dataclass" not in structure:
        raise InputError(
            "The engine was compiled from a call that returns no dataclass.",
            "Call it with return_dict=False.",
        )
    for name in _classes(structure):
        import_class(name)
    return unflatten(structure, outputs)


def import_class(qualified: str) -> type | None:
    """A class of the installed diffusers by ``module:Class``; None where it is not there, or of another package.

    A manifest is data: only that package is imported for it.
    """
    source, _, name = qualified.partition(":")
    if source.split(".")[0] != OURS:
        return None
    found: Any = None
    with suppress(ImportError):
        found = importlib.import_module(source)
        for part in name.split("."):
            found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _classes(structure: Structure) -> Iterator[str]:
    if "dataclass" in structure:
        yield structure["dataclass"]
    nodes: list[Structure] = structure.get("list") or structure.get("tuple") or []
    pairs: list[tuple[str, Structure]] = structure.get("fields") or structure.get("dict") or []
    for node in (*nodes, *(node for _, node in pairs)):
        yield from _classes(node)


def _same(a: Constant, b: Constant) -> bool:
    """1 is 1.0 here, and not True."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _said(value: Constant) -> str:
    return value if value == "a tensor" else f"{value!r:.100}"
