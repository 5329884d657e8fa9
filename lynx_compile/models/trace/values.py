# SPDX-License-Identifier: Apache-2.0
"""Python's decisions about tensors (``if mask.all()``, ``lengths.tolist()``, ``x[mask]``) by the example's values.

Beside every traced tensor that depends on the call's arguments and on constants alone, its concrete value is kept,
and used where Python asks for one or where a shape follows from one. What depends on weights is never decided on.
Everything else stays in the graph. What a decision makes constant is recorded, with the line that asks for it.
Functions of weights alone that ONNX lacks (``torch.linalg``) become constants in the same way, and so do powers of
constants alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import resolve_name
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from lynx_compile.models.trace.complex_pairs import ComplexPair, words
from lynx_compile.models.trace.rule import Rule

_DECISIONS = words(
    """
    __bool__ __int__ __float__ __index__ __complex__ item tolist numpy __array__ equal allclose
    is_nonzero
    """
)
_SIZED_BY_VALUE = frozenset(("nonzero", "argwhere", "unique", "unique_consecutive", "bincount"))
# Functions that take Python numbers, and to which a tensor of one element may be given instead.
_TAKE_NUMBERS = words(
    """
    arange view reshape expand repeat split narrow zeros ones empty chunk tile pad linspace tensor
    as_tensor __getitem__ __setitem__ new_zeros new_ones new_empty roll
    """
)
_FROM_SHAPE = words("zeros_like ones_like new_zeros new_ones new_tensor new_full full_like")
_RANDOM = words("rand randn randint randperm rand_like randn_like normal bernoulli dropout empty")
# Frequencies are made with these. Times of a million let a unit in their last place be another angle, so that they
# have to be torch's own.
_TABLES = words("exp exp2 log pow __pow__ __rpow__ float_power")
_WEIGHTS = "weights"


@dataclass(frozen=True)
class Baked:
    """A value of the call's arguments that an exported graph holds as a constant.

    ``arguments``: those it depends on. ``where``: file and line of the model that asks for it.
    ``places``: only where the value is not zero counts, or how often each element is taken.
    """

    arguments: tuple[str, ...]
    where: str
    places: bool

    def __str__(self) -> str:
        names = " and ".join(f"'{name}'" for name in self.arguments)
        kind = "the places where it is not zero are" if self.places else "the value is"
        return f"{names}: {kind} fixed to the example's, because {self.where} decides on it."


@dataclass(frozen=True)
class _Known:
    """A tensor's value in the example, and what it depends on: arguments, or the weights."""

    value: torch.Tensor
    names: frozenset[str]


class Values(Rule):
    """Keeps the values. ``baked`` is filled as decisions are taken."""

    def __init__(self, baked: list[Baked]) -> None:
        super().__init__()
        self.baked = baked
        self._known = WeakTensorKeyDictionary()

    def know(self, traced: torch.Tensor, value: torch.Tensor, names: Iterable[str]) -> None:
        """``value`` is what ``traced`` is in the example. The module may write into it: a copy is kept."""
        if not value.is_meta:
            with _outside():
                self._known[traced] = _Known(value.clone(), frozenset(names))

    def know_weight(self, traced: torch.Tensor, value: torch.Tensor) -> None:
        """A parameter: what follows from weights alone can be folded, and is never decided on."""
        if not value.is_meta:
            self._known[traced] = _Known(value, frozenset({_WEIGHTS}))

    def decide(self, traced: torch.Tensor) -> torch.Tensor | None:
        """The value of a tensor that a rule decides on, on record; None where weights have a part in it."""
        names = self._names(traced)
        if names is None or _WEIGHTS in names:
            return None
        value: torch.Tensor = self._decide(torch.clone, (traced,), {}, names, False)
        return value

    @contextmanager
    def held_back(self) -> Iterator[list[Baked]]:
        """What is baked while this is open goes into the list given, instead."""
        kept, self.baked = self.baked, []
        try:
            yield self.baked
        finally:
            self.baked = kept

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", "")
        if name in _TAKE_NUMBERS:
            args, kwargs = self._with_numbers(name, args, kwargs)
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._with_places(args[1], name == "__setitem__" and args[2]), *args[2:])
        if name == "masked_select":
            return self._masked_select(*args, **kwargs)
        if name == "repeat_interleave":
            return self._repeat(function, *args, **kwargs)
        known = self._names((args, kwargs))
        sized = name in _SIZED_BY_VALUE or (name == "where" and len(args) + len(kwargs) == 1)
        if known is not None and (sized or name in _DECISIONS) and _WEIGHTS not in known:
            return self._decide(function, args, kwargs, known, sized)
        if known is not None and not known and name in _TABLES:
            return self._evaluate(function, args, kwargs)
        alone = known is not None and known <= {_WEIGHTS}
        if alone and (resolve_name(function) or "").startswith("torch.linalg."):
            return self._evaluate(function, args, kwargs)
        result = function(*args, **kwargs)
        self._follow(function, name, args, kwargs, result)
        return result

    def _decide(self, function: Any, args: Any, kwargs: Any, names: frozenset[str], places: bool) -> Any:
        """The concrete result, on record if it depends on an argument."""
        if names:
            record = Baked(tuple(sorted(names)), _line_of_the_model(), places)
            if record not in self.baked:
                self.baked.append(record)
        return self._evaluate(function, args, kwargs)

    def _follow(self, function: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Keep the values of what ``function`` has returned or written."""
        writes = name in ("__setitem__", "copy_") or (name.endswith("_") and not name.endswith("__"))
        writes = writes or name in _IN_PLACE or "out" in kwargs
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        names = self._names((args, kwargs))
        if names is None and name in _FROM_SHAPE and all(isinstance(size, int) for size in _shape(args[0])):
            args = (torch.empty(_shape(args[0]), dtype=args[0].dtype, device="cpu"), *args[1:])
            names = self._names((args, kwargs))
        if names is None or name in _RANDOM:
            if writes:
                self._forget(kwargs.get("out", args[0]))
            return
        if not tensors and not writes:
            return
        try:
            values = self._evaluate(function, args, kwargs)
        except Exception:  # what only the trace can do has no value
            self._forget(args[0] if writes else None)
            return
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        for traced, value in zip(tensors, leaves, strict=True):
            self._known[traced] = _Known(value, names)
        if writes:
            self._widen(kwargs.get("out", args[0]), names)

    def _widen(self, target: torch.Tensor, names: frozenset[str]) -> None:
        """What was written depends on ``names`` too, and so does what shares its memory."""
        for traced, known in self._sharing(target):
            self._known[traced] = _Known(known.value, known.names | names)

    def _forget(self, target: Any) -> None:
        """An unknown value was written into ``target``, and into what shares its memory."""
        for traced, _ in self._sharing(target):
            del self._known[traced]

    def _sharing(self, target: Any) -> list[tuple[torch.Tensor, _Known]]:
        """What has its values in the memory of ``target``'s."""
        if not isinstance(target, torch.Tensor) or target not in self._known:
            return []
        with _outside():
            written = self._known[target].value.untyped_storage().data_ptr()
            return [
                item for item in self._known.items() if item[1].value.untyped_storage().data_ptr() == written
            ]

    def _names(self, values: Any) -> frozenset[str] | None:
        """What the tensors in ``values`` depend on; None where one's value is not known.

        A value of weights and arguments together is activation: not known either.
        """
        names: set[str] = set()
        for tensor in tree_leaves(values):
            if isinstance(tensor, slice):
                tensor = None
            if isinstance(tensor, torch.SymInt):
                return None  # a size that is not the example's alone
            if not isinstance(tensor, torch.Tensor) or _is_constant(tensor):
                continue
            if tensor not in self._known:
                return None
            names |= self._known[tensor].names
        return None if _WEIGHTS in names and len(names) > 1 else frozenset(names)

    def _evaluate(self, function: Any, args: Any, kwargs: Any) -> Any:
        """``function`` of the concrete values, outside of the trace."""

        def concrete(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or _is_constant(value):
                return value
            return self._known[value].value

        with _outside():
            args, kwargs = tree_map(concrete, (args, kwargs))
            if "device" in kwargs:
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    def _with_numbers(self, name: str, args: Any, kwargs: Any) -> Any:
        """Integers of tensors (sizes, bounds of slices) as Python's; what is indexed and its index stay tensors."""

        def number(value: Any) -> Any:
            if isinstance(value, slice):
                return slice(*(number(part) for part in (value.start, value.stop, value.step)))
            is_number = isinstance(value, torch.Tensor) and value.dim() == 0 and not _is_floating(value)
            if not is_number or value.dtype == torch.bool or (names := self._names(value)) is None:
                return value
            return self._decide(torch.Tensor.item, (value,), {}, names, False)

        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if not any(isinstance(part, slice) for part in index):
                return args, kwargs
            index = tuple(number(part) if isinstance(part, slice) else part for part in index)
            return (args[0], index, *args[2:]), kwargs
        first = args[:1] if args and isinstance(args[0], torch.Tensor) else ()
        rest = args[len(first) :]
        return (*first, *(_mapped(number, value) for value in rest)), {
            k: _mapped(number, v) for k, v in kwargs.items()
        }

    def _with_places(self, index: Any, value: Any = None) -> Any:
        """An index in which boolean masks are the places where they are true.

        ``value``: what is written there; one number goes by the mask itself, whatever it is.
        """
        if value is not False and value is not None and not (isinstance(value, torch.Tensor) and value.dim()):
            return index
        if not isinstance(index, tuple):
            found = self._places(index)
            return index if found is None else found
        parts: list[Any] = []
        for part in index:
            found = self._places(part)
            parts.extend([part] if found is None else found)
        return tuple(parts)

    def _places(self, mask: Any) -> tuple[torch.Tensor, ...] | None:
        """Index tensors of a mask that is known; None where it is none."""
        if (
            not isinstance(mask, torch.Tensor)
            or mask.dtype not in (torch.bool, torch.uint8)
            or not mask.dim()
        ):
            return None
        names = self._names(mask)
        if names is None or _WEIGHTS in names:
            return None
        found = self._decide(torch.nonzero, (mask,), {}, names, True)
        return tuple(column.contiguous() for column in found.unbind(1))

    def _masked_select(self, input: torch.Tensor, mask: torch.Tensor) -> Any:
        wide = torch.broadcast_to(mask, input.shape)
        self._follow(torch.broadcast_to, "broadcast_to", (mask, input.shape), {}, wide)
        with self:
            return input[wide]

    def _repeat(self, function: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """``repeat_interleave`` by a tensor of counts is a selection of rows."""
        counts = kwargs.get("repeats", args[0] if args else None)
        alone = counts is None
        counts = input if alone else counts
        names = self._names(counts)
        if not isinstance(counts, torch.Tensor) or names is None or _WEIGHTS in names:
            result = function(input, *args, **kwargs)
            self._follow(function, "repeat_interleave", (input, *args), kwargs, result)
            return result
        rows = self._decide(torch.repeat_interleave, (counts,), {}, names, True)
        if alone:
            return rows
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if counts.numel() == 1:
            number = self._evaluate(torch.Tensor.item, (counts,), {})
            return torch.repeat_interleave(input, number, dim=dim)
        source = input.flatten() if dim is None else input
        result = torch.index_select(source, dim or 0, rows)
        self._follow(torch.index_select, "index_select", (source, dim or 0, rows), {}, result)
        return result


@contextmanager
def _outside() -> Iterator[None]:
    """While this is open, nothing is traced."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


_IN_PLACE = words(
    """
    __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __iand__ __ior__ __ixor__ __imod__ __ipow__
    __ilshift__ __irshift__
    """
)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    return tree_map(change, value) if isinstance(value, list | tuple | dict) else change(value)


def _is_constant(tensor: torch.Tensor) -> bool:
    """A tensor that the trace does not know: an attribute of the module, or made of nothing but such."""
    traced = isinstance(tensor, FakeTensor | ComplexPair | torch.nn.Parameter)
    with torch._C.DisableTorchFunction():
        return not (traced or torch._is_functional_tensor(tensor) or tensor.is_meta)


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _line_of_the_model() -> str:
    """File and line of the innermost frame outside of torch and of these rules."""
    frame = sys._getframe()
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
