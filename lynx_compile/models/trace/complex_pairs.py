# SPDX-License-Identifier: Apache-2.0
"""Complex tensors as pairs of real ones: ONNX has no complex numbers, and rotary embeddings are written with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import resolve_name
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_any, tree_map

from lynx_compile.errors import StageError
from lynx_compile.models.trace.rule import Rule


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions that treat the real and the imaginary part alike: f(a + ib) = f(a) + i f(b).
_PARTWISE = words(
    """
    __getitem__ __setitem__ __iter__ add __add__ __radd__ add_ __iadd__ sub __sub__ subtract __rsub__
    neg __neg__ cat concat concatenate stack hstack vstack dstack split chunk unbind tensor_split
    split_with_sizes narrow select unsqueeze squeeze flatten unflatten view reshape view_as reshape_as
    permute transpose t swapaxes swapdims movedim moveaxis T mT expand expand_as repeat tile
    broadcast_to repeat_interleave roll flip index_select gather take_along_dim masked_select scatter
    index_put where sum mean cumsum clone contiguous detach data copy_ cpu cuda requires_grad_
    zeros_like empty_like new_zeros pad pad_sequence
    """
)
# Functions of the wrapper itself: its shape, dtype, device.
_ABOUT = words(
    """
    shape size dim ndim ndimension numel nelement dtype device layout is_complex is_floating_point
    __len__ requires_grad is_contiguous is_cuda is_cpu is_meta __hash__ element_size itemsize
    storage_offset is_sparse grad_fn is_nested
    """
)
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {real: kind for kind, real in _REAL.items()}


class ComplexPair(torch.Tensor):
    """A complex tensor to Python (its shape, dtype and class), two real ones to the trace."""

    real_part: torch.Tensor
    imaginary_part: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor, imaginary: torch.Tensor) -> ComplexPair:
        with torch._C.DisableTorchFunction():
            pair: ComplexPair = torch.Tensor._make_wrapper_subclass(
                cls, real.shape, dtype=_COMPLEX[real.dtype], device=real.device
            )
        pair.__dict__.update(real_part=real, imaginary_part=imaginary)
        return pair

    def __init__(self, *_: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _refusal(str(func))


class ComplexPairs(Rule):
    """Turns complex constants into pairs where they are met, and does the arithmetic on the pairs."""

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[int, tuple[torch.Tensor, ComplexPair]] = {}

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = _name(function)
        if name in _MAKERS:
            return _MAKERS[name](*args, **kwargs)
        if not tree_any(_is_complex, (args, kwargs)):
            wanted = next(
                (v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype) and v in _REAL), None
            )
            return function(*args, **kwargs) if wanted is None else _made(function, args, kwargs)
        if name in _ABOUT:
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)
        args, kwargs = tree_map(self._as_pair, (args, kwargs))
        if name in _ARITHMETIC:
            return _ARITHMETIC[name](*args, **kwargs)
        if name in _PARTWISE:
            return _partwise(function, args, kwargs)
        raise _refusal(resolve_name(function) or name)

    def _as_pair(self, value: Any) -> Any:
        """A complex constant as a pair of constants, the same at every use."""
        if not isinstance(value, torch.Tensor) or isinstance(value, ComplexPair) or not _is_complex(value):
            return value
        if id(value) not in self._constants:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                pair = ComplexPair(value.real.contiguous(), value.imag.contiguous())
            self._constants[id(value)] = value, pair
        return self._constants[id(value)][1]


@contextmanager
def complex_buffers_as_constants(module: torch.nn.Module) -> Iterator[None]:
    """While this is open, complex buffers are plain attributes: a buffer is an input of the traced graph."""
    moved = [
        (m, name, buffer)
        for m in module.modules()
        for name, buffer in m._buffers.items()
        if buffer is not None and buffer.is_complex()
    ]
    for submodule, name, buffer in moved:
        del submodule._buffers[name]
        submodule.__dict__[name] = buffer
    try:
        yield
    finally:
        for submodule, name, buffer in moved:
            submodule.__dict__.pop(name, None)
            submodule._buffers[name] = buffer


def _name(function: Callable[..., Any]) -> str:
    """``mul`` of ``torch.mul`` and of ``Tensor.mul``; ``shape`` of its getter."""
    name = getattr(function, "__name__", "")
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def _is_complex(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        with torch._C.DisableTorchFunction():
            return value.is_complex()
    return isinstance(value, complex)


def _parts(value: Any) -> tuple[Any, Any]:
    """Real and imaginary part of a pair, a real tensor or a number; None for an imaginary part of zero."""
    if isinstance(value, ComplexPair):
        return value.real_part, value.imaginary_part
    if isinstance(value, complex):
        return value.real, value.imag
    return value, None


def _partwise(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``function`` of the real parts and of the imaginary parts, paired again."""
    targets_real = args and not tree_any(lambda v: isinstance(v, ComplexPair), args[0])
    if _name(function) in ("__setitem__", "copy_") and targets_real:
        raise _refusal("writing complex values into a real tensor")
    mixed = _name(function) in _MIXED

    def part(index: int, value: Any) -> Any:
        if isinstance(value, ComplexPair | complex):
            return _parts(value)[index]
        if mixed and index and isinstance(value, torch.Tensor) and value.is_floating_point():
            return torch.zeros_like(value)
        return 0 if mixed and index and isinstance(value, float) else value

    real, imaginary = (tree_map(partial(part, index), (args, kwargs)) for index in (0, 1))
    return _paired(function(*real[0], **real[1]), function(*imaginary[0], **imaginary[1]))


# Here a real tensor beside a complex one is a summand, not an index.
_MIXED = words(
    """
    add __add__ __radd__ add_ __iadd__ sub __sub__ subtract __rsub__ cat concat concatenate stack where
    hstack vstack dstack __setitem__ copy_
    """
)


def _paired(real: Any, imaginary: Any) -> Any:
    if isinstance(real, torch.Tensor):
        return ComplexPair(real, imaginary)
    if isinstance(real, list | tuple):
        return type(real)(_paired(r, i) for r, i in zip(real, imaginary, strict=True))
    if hasattr(real, "__next__"):
        return iter([_paired(r, i) for r, i in zip(real, imaginary, strict=True)])
    return None


def _made(function: Callable[..., Any], args: Any, kwargs: Any) -> ComplexPair:
    """A complex tensor out of a real one, or out of nothing: ``x.to(torch.complex64)``, ``torch.zeros``."""
    args, kwargs = tree_map(lambda v: _REAL.get(v, v) if isinstance(v, torch.dtype) else v, (args, kwargs))
    real = function(*args, **kwargs)
    return ComplexPair(real, torch.zeros_like(real))


def _multiply(a: Any, b: Any) -> Any:
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    if ai is None:
        return ComplexPair(ar * br, ar * bi)
    if bi is None:
        return ComplexPair(ar * br, ai * br)
    return ComplexPair(ar * br - ai * bi, ar * bi + ai * br)


def _divide(a: Any, b: Any) -> Any:
    real, imaginary = _parts(b)
    if imaginary is None:
        return _multiply(a, 1 / real)
    square = real * real + imaginary * imaginary
    return _multiply(a, ComplexPair(real / square, -imaginary / square))


def _exponential(z: ComplexPair) -> ComplexPair:
    return _polar(z.real_part.exp(), z.imaginary_part)


def _polar(abs: torch.Tensor, angle: torch.Tensor) -> ComplexPair:
    return ComplexPair(abs * angle.cos(), abs * angle.sin())


def _absolute(z: ComplexPair) -> torch.Tensor:
    return (z.real_part * z.real_part + z.imaginary_part * z.imaginary_part).sqrt()


def _to(z: ComplexPair, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``to`` of a device or another dtype; a real dtype drops the imaginary part, as in torch."""
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if wanted and wanted[0] not in _REAL:
        return z.real_part.to(*args, **kwargs)
    args, kwargs = tree_map(lambda a: _REAL.get(a, a) if isinstance(a, torch.dtype) else a, (args, kwargs))
    return ComplexPair(z.real_part.to(*args, **kwargs), z.imaginary_part.to(*args, **kwargs))


def _refusal(function: str) -> StageError:
    return StageError(
        "export",
        f"the model uses complex numbers in '{function}', which no rule covers.",
        "Report the model.",
    )


_MAKERS: dict[str, Callable[..., Any]] = {
    "view_as_complex": lambda x: ComplexPair(x[..., 0], x[..., 1]),
    "polar": _polar,
    "complex": lambda real, imag: ComplexPair(real, imag),
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "view_as_real": lambda z: torch.stack((z.real_part, z.imaginary_part), -1),
    "real": lambda z: z.real_part,
    "imag": lambda z: z.imaginary_part,
    "conj": lambda z: ComplexPair(z.real_part, -z.imaginary_part),
    "abs": _absolute,
    "__abs__": _absolute,
    "angle": lambda z: torch.atan2(z.imaginary_part, z.real_part),
    "resolve_conj": lambda z: z,
    "exp": _exponential,
    "to": _to,
    "type": _to,
    "type_as": lambda z, other: _to(z, other.dtype),
    "mul": _multiply,
    "multiply": _multiply,
    "__mul__": _multiply,
    "__rmul__": lambda a, b: _multiply(b, a),
    "div": _divide,
    "true_divide": _divide,
    "__truediv__": _divide,
    "float": lambda z: z.real_part.float(),
}
