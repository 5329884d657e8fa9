# SPDX-License-Identifier: Apache-2.0
"""The arguments of a call, nested as its caller wrote them, as flat named tensors and constants, and back.

A tensor is anything of torch's, numpy's or cupy's: it has a ``shape``, a ``dtype`` and ``__dlpack__``. Results
of a call flatten in the same way. The structure is plain JSON, one node a value:

    {"tensor": "x.0"}  {"constant": null}  {"list": [node, ...]}  {"tuple": [node, ...]}
    {"dict": [[key, node], ...]}  {"dataclass": "module:Class", "fields": [[name, node], ...]}
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from lynx_compile.errors import InputError

Constant = str | int | float | bool | None
Structure = dict[str, Any]
MOST_LEVELS = 32  # of a structure that is read from a file


@dataclass(frozen=True)
class Arguments:
    """A flattened value. Names are paths: ``hidden_states``, ``x.0``, ``added_cond_kwargs.resolution``.

    ``tensors`` and ``constants`` (every other leaf, None included) are in the order of the value.
    ``structure``: what ``unflatten`` needs beside the tensors; it holds the constants too.
    """

    structure: Structure
    tensors: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorType:
    """What stays the same of a tensor when only sizes change. ``dtype``: as torch and numpy name it."""

    dtype: str
    rank: int

    def __str__(self) -> str:
        return f"a tensor ({self.dtype}, {self.rank} dimensions)"


@dataclass(frozen=True)
class Schema:
    """What one graph is compiled for: two calls of equal schema differ at most in sizes and values of tensors."""

    tensors: dict[str, TensorType]
    constants: dict[str, Constant]


@dataclass(frozen=True)
class Parameter:
    """A parameter of ``forward``. ``kind``: as ``inspect`` names it. ``default``: None if it must be given."""

    name: str
    kind: str
    default: Structure | None


def flatten(value: Any, name: str = "") -> Arguments:
    """Flatten bound arguments (a dict: its keys start the names) or a result.

    Args:
        name: starts the names of what is not a dict: ``flatten((a, b), "output")`` has output.0 and output.1.

    Raises:
        InputError: a leaf is neither a tensor nor a plain constant, or two leaves get one name.
    """
    flat = Arguments({})
    flat.structure.update(_flatten(value, name, flat))
    return flat


def unflatten(structure: Structure, tensors: Mapping[str, Any]) -> Any:
    """The nested value again. ``tensors``: at least those that the structure names.

    A dataclass is made from a class of its name that the program has imported already; nothing is imported here.

    Raises:
        InputError: a tensor is missing, or a dataclass is not there.
    """
    if "tensor" in structure:
        if structure["tensor"] not in tensors:
            raise InputError(
                f"The tensor '{structure['tensor']}' is missing.", "Give every tensor of the call."
            )
        return tensors[structure["tensor"]]
    if "constant" in structure:
        return structure["constant"]
    if "dataclass" in structure:
        members = {name: unflatten(node, tensors) for name, node in structure["fields"]}
        return _dataclass(structure["dataclass"])(**members)
    if "dict" in structure:
        return {key: unflatten(node, tensors) for key, node in structure["dict"]}
    if "tuple" in structure:
        return tuple(unflatten(node, tensors) for node in structure["tuple"])
    return [unflatten(node, tensors) for node in structure["list"]]


def tensors_of(structure: Any) -> tuple[str, ...]:
    """The tensors' names in a structure that may come from a file.

    Raises:
        ValueError: it is no structure.
    """
    return tuple(_tensors_of(structure, 0))


def check_parameters(known: Sequence[Parameter]) -> None:
    """Whether parameters that come from a file are those of a Python function, with plain defaults.

    Raises:
        ValueError: they are not.
    """
    for parameter in known:
        if parameter.default is not None and tensors_of(parameter.default):
            raise ValueError(f"the default of {parameter.name!r:.100} is a tensor")
    try:
        signature(known)
    except KeyError as error:
        raise ValueError(f"{error!s:.100} is no kind of parameter") from None


def parameters(forward: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of a ``forward``: of a class (its ``self`` is left out) or bound.

    Raises:
        InputError: a default is no plain value.
    """
    found = list(inspect.signature(forward).parameters.values())
    if found and found[0].name == "self":
        found = found[1:]
    return tuple(Parameter(p.name, p.kind.name, _default(p)) for p in found)


def signature(known: Sequence[Parameter]) -> inspect.Signature:
    """As ``inspect`` has it.

    Raises:
        KeyError: a kind is none of Python's.
    """

    def default(parameter: Parameter) -> Any:
        return inspect.Parameter.empty if parameter.default is None else unflatten(parameter.default, {})

    kinds = inspect._ParameterKind
    return inspect.Signature([inspect.Parameter(p.name, kinds[p.kind], default=default(p)) for p in known])


def bind(known: Sequence[Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Each parameter's value in a call, by name, with its default where the call left it out.

    Raises:
        InputError: the call does not fit the parameters.
    """
    try:
        bound = signature(known).bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(p.name for p in known)
        raise InputError(f"The call does not fit its module: {error}.", f"It takes {names}.") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def spread(known: Sequence[Parameter], bound: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``bind`` backwards: positional and keyword arguments of a call, keywords wherever Python allows them."""
    variable = next((p.name for p in known if p.kind == "VAR_POSITIONAL" and bound[p.name]), None)
    by_position = {"POSITIONAL_ONLY"} | ({"POSITIONAL_OR_KEYWORD"} if variable else set())
    args = [bound[p.name] for p in known if p.kind in by_position]
    kwargs: dict[str, Any] = {}
    for parameter in known:
        if parameter.kind == "VAR_KEYWORD":
            kwargs |= bound[parameter.name]
        elif parameter.kind not in by_position | {"VAR_POSITIONAL"}:
            kwargs[parameter.name] = bound[parameter.name]
    return (*args, *(bound[variable] if variable else ())), kwargs


def schema(arguments: Arguments) -> Schema:
    """The schema of a flattened call."""
    types = {name: TensorType(dtype_of(t), len(t.shape)) for name, t in arguments.tensors.items()}
    return Schema(types, arguments.constants)


def dtype_of(tensor: Any) -> str:
    """A dtype's name, which torch and numpy share: float32, bfloat16, int64, bool."""
    return str(tensor.dtype).removeprefix("torch.")


def differences(expected: Schema, given: Schema) -> tuple[str, ...]:
    """Why ``given`` is not ``expected``, a phrase each: ``'mask' is None, not a tensor (bool, 2 dimensions)``."""
    leaves, others = ({**s.constants, **s.tensors} for s in (expected, given))
    phrases = []
    for name in leaves | others:
        if name not in others:
            phrases.append(f"'{name}' is missing, and should be {_described(leaves[name])}")
        elif name not in leaves:
            phrases.append(f"'{name}' is {_described(others[name])}, and should not be there")
        elif not _same(leaves[name], others[name]):
            phrases.append(f"'{name}' is {_described(others[name])}, not {_described(leaves[name])}")
    return tuple(phrases)


def _flatten(value: Any, name: str, flat: Arguments) -> Structure:
    """The node of ``value``; its leaves go into ``flat``."""
    if _is_tensor(value):
        return {"tensor": _put(flat.tensors, name, value, flat)}
    if is_dataclass(value) and not isinstance(value, type) and "Cache" not in type(value).__name__:
        # Before dicts, which diffusers' outputs are as well.
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        members = [(f.name, getattr(value, f.name)) for f in fields(value) if f.init]
        return {"dataclass": kind, "fields": [[k, _flatten(v, _join(name, k), flat)] for k, v in members]}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            raise InputError(
                f"A key of '{name}' is neither text nor a number.", "Such a dict cannot be recorded."
            )
        return {"dict": [[k, _flatten(v, _join(name, k), flat)] for k, v in value.items()]}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(v, _join(name, i), flat) for i, v in enumerate(value)]}
    constant = _constant(value, name)
    _put(flat.constants, name, constant, flat)
    return {"constant": constant}


def _tensors_of(node: Any, depth: int) -> Iterator[str]:
    if not isinstance(node, dict) or depth > MOST_LEVELS:
        raise ValueError("a structure is no mapping, or too deep")
    kinds = set(node)
    if kinds == {"tensor"} and isinstance(node["tensor"], str):
        yield node["tensor"]
    elif kinds == {"constant"} and isinstance(node["constant"], Constant):
        return
    elif kinds in ({"list"}, {"tuple"}) and isinstance(members := node[min(kinds)], list):
        for member in members:
            yield from _tensors_of(member, depth + 1)
    elif kinds == {"dict"} or (kinds == {"dataclass", "fields"} and isinstance(node["dataclass"], str)):
        for member in _pairs(node["fields" if "fields" in node else "dict"]):
            yield from _tensors_of(member, depth + 1)
    else:
        raise ValueError(f"a structure has {', '.join(map(repr, node)) or 'no kind'!s:.100}")


def _pairs(values: Any) -> list[Any]:
    """The second of each of some pairs, the first of which are keys."""
    if not isinstance(values, list | tuple):
        raise ValueError("a structure has no pairs")
    for pair in values:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str | int):
            raise ValueError("a structure has no pairs")
    return [member for _, member in values]


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and hasattr(value, "shape") and hasattr(value, "dtype")


def _put(leaves: dict[str, Any], name: str, leaf: Any, flat: Arguments) -> str:
    if name in flat.tensors or name in flat.constants:
        raise InputError(f"Two arguments are called '{name}'.", "Keys of dicts may not hold dots.")
    leaves[name] = leaf
    return name


def _join(name: str, key: str | int) -> str:
    return f"{name}.{key}" if name else str(key)


def _constant(value: Any, name: str) -> Constant:
    """A plain Python value; numpy's scalars become Python's."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    raise InputError(
        f"'{name}' is a {type(value).__module__}.{type(value).__qualname__}: {_reason(value)}.",
        "A compiled transformer takes tensors, None, numbers, texts, and lists, tuples and dicts of those.",
    )


def _reason(value: Any) -> str:
    """Why an object cannot be an input of a graph."""
    kind = type(value).__name__
    if "Cache" in kind:
        return "a cache that the model reads and fills, so that a call depends on those before it"
    if kind == "BlockMask":
        return "a mask of flex_attention, which is code and not a tensor"
    if callable(value):
        return "code and not a value"
    return "a Python object, which no graph takes as an input"


def _dataclass(qualified: str) -> type:
    module, _, name = qualified.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not is_dataclass(found):
        raise InputError(f"The result's class {qualified} is not imported.", f"Import {module} first.")
    return found


def _default(parameter: inspect.Parameter) -> Structure | None:
    return (
        None if parameter.default is parameter.empty else flatten(parameter.default, parameter.name).structure
    )


def _described(leaf: Any) -> str:
    return str(leaf) if isinstance(leaf, TensorType) else repr(leaf)


def _same(a: Any, b: Any) -> bool:
    """1 is 1.0 here, and not True."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
