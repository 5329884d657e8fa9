# SPDX-License-Identifier: Apache-2.0
"""Arrays in and out of an engine: numpy's, and anybody's through DLPack, without a copy and without torch.

bf16, which numpy lacks, is ``ml_dtypes.bfloat16`` there.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lynx_compile.engine.cuda import Gpu, Memory
from lynx_compile.errors import InputError

DL_CPU, DL_CUDA, DL_CUDA_HOST, DL_CUDA_MANAGED = 1, 2, 3, 13
LEGACY_STREAM = 1  # how DLPack and CUDA name the default stream, for which DLPack forbids 0
MOST_DIMENSIONS = 8  # of TensorRT


@dataclass(frozen=True)
class Dtype:
    """A dtype of the manifest in numpy, in DLPack (code, bits) and in safetensors."""

    numpy: np.dtype[Any]
    dlpack: tuple[int, int]
    safetensors: str


DTYPES = {
    "bf16": Dtype(np.dtype(ml_dtypes.bfloat16), (4, 16), "BF16"),
    "fp16": Dtype(np.dtype(np.float16), (2, 16), "F16"),
    "fp32": Dtype(np.dtype(np.float32), (2, 32), "F32"),
    "fp64": Dtype(np.dtype(np.float64), (2, 64), "F64"),
    "int64": Dtype(np.dtype(np.int64), (0, 64), "I64"),
    "int32": Dtype(np.dtype(np.int32), (0, 32), "I32"),
    "int8": Dtype(np.dtype(np.int8), (0, 8), "I8"),
    "uint8": Dtype(np.dtype(np.uint8), (1, 8), "U8"),
    "bool": Dtype(np.dtype(np.bool_), (6, 8), "BOOL"),
}


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].numpy.itemsize


@dataclass(frozen=True)
class View:
    """Where the elements of somebody's array are. ``owner`` keeps them there."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    on_gpu: bool
    owner: Any

    @property
    def size(self) -> int:
        return size_of(self.dtype, self.shape)


def view(name: str, array: Any, gpu: Gpu, stream: int, *, write: bool = False) -> View:
    """Look into a numpy array or a DLPack tensor, in host memory or on ``gpu``.

    Args:
        name: of the tensor, for messages.
        stream: its owner's pending work on the GPU is made to come before what ``stream`` gets next.
        write: the array is a result's place.

    Raises:
        InputError: it is neither, of no known dtype, not contiguous, read-only, or on another GPU.
    """
    if isinstance(array, np.ndarray):
        return _numpy_view(name, array, write)
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        raise InputError(
            f"'{name}' is a {type(array).__name__}.",
            "Give a numpy array or a tensor with DLPack (torch, cupy).",
        )
    try:
        kind, index = array.__dlpack_device__()
        on_gpu = int(kind) in (DL_CUDA, DL_CUDA_MANAGED)
        # DLPack's stream is where the array will be used.
        capsule = array.__dlpack__(stream=stream or LEGACY_STREAM) if on_gpu else array.__dlpack__()
        found = _tensor_in(capsule)
    except Exception as error:  # each library has its own: requires_grad, conjugated, another backend ...
        raise InputError(
            f"'{name}' cannot be read through DLPack ({error}).", "Give a plain tensor without a gradient."
        ) from None
    if not on_gpu and int(kind) not in (DL_CPU, DL_CUDA_HOST):
        raise InputError(f"'{name}' is on a device of DLPack's kind {int(kind)}.", _PLACES)
    if on_gpu and index != gpu.index:
        raise InputError(f"'{name}' is on GPU {index}, and the engine on GPU {gpu.index}.", _PLACES)
    dtype = _dlpack_dtypes.get((found.dtype.code, found.dtype.bits))
    if dtype is None or found.dtype.lanes != 1:
        raise InputError(f"'{name}' has a dtype that no engine takes.", f"Use one of {', '.join(DTYPES)}.")
    shape = tuple(found.shape[: found.ndim])
    if found.strides and not _is_contiguous(shape, tuple(found.strides[: found.ndim])):
        raise InputError(f"'{name}' is not contiguous.", _CONTIGUOUS)
    return View((found.data or 0) + found.byte_offset, dtype, shape, on_gpu, (array, capsule))


class DeviceArray:
    """A result in GPU memory, which it owns: ``torch.from_dlpack(it)`` and ``cupy.from_dlpack(it)`` share it.

    ``dtype``: of the manifest. ``stream``: on which it is computed; None when it is there already.
    """

    def __init__(
        self, memory: Memory, dtype: str, shape: tuple[int, ...], gpu: Gpu, stream: int | None
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self._memory = memory
        self._gpu = gpu
        self._stream = stream

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy in host memory."""
        array = np.empty(self.shape, DTYPES[self.dtype].numpy)
        stream = LEGACY_STREAM if self._stream is None else self._stream
        self._gpu.copy(array.ctypes.data, self._memory.value, array.nbytes, stream)
        self._gpu.synchronize(stream)
        return array

    def __dlpack_device__(self) -> tuple[int, int]:
        return DL_CUDA, self._gpu.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule (unversioned, which every consumer takes) of the same memory.

        Args:
            stream: the consumer's, None for the default one, -1 for no ordering; it is made to wait.
        """
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__()):
            raise BufferError("an engine's result can only be shared, on the GPU where it is")
        consumer = LEGACY_STREAM if stream is None else stream
        if self._stream is not None and consumer not in (-1, self._stream):
            event = self._gpu.event()
            self._gpu.record(event, self._stream)
            self._gpu.follow(consumer, event)
        return capsule_of(self._memory.value, self.dtype, self.shape, self.__dlpack_device__(), self._memory)


def capsule_of(address: int, dtype: str, shape: tuple[int, ...], device: tuple[int, int], owner: Any) -> Any:
    """A DLPack capsule that keeps ``owner`` alive until its consumer (or nobody) is done with it."""
    managed = _Managed()
    extents = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    code, bits = DTYPES[dtype].dlpack
    managed.tensor = _Tensor(
        address, _Device(*device), len(shape), _DataType(code, bits, 1), extents, None, 0
    )
    managed.deleter = _delete
    key = ctypes.addressof(managed)
    _exported[key] = (managed, extents, owner)
    return _new_capsule(key, b"dltensor", _abandoned)


_PLACES = "Put it into host memory or on the engine's GPU."
_CONTIGUOUS = "Make it contiguous (numpy.ascontiguousarray, torch's .contiguous())."


def _numpy_view(name: str, array: np.ndarray[Any, Any], write: bool) -> View:
    dtype = _numpy_dtypes.get(array.dtype)  # another byte order is another dtype
    if dtype is None:
        raise InputError(
            f"'{name}' has the dtype {array.dtype}, which no engine takes.",
            f"Use one of {', '.join(DTYPES)}.",
        )
    if not array.flags.c_contiguous:
        raise InputError(f"'{name}' is not contiguous.", _CONTIGUOUS)
    if write and not array.flags.writeable:
        raise InputError(f"'{name}' is read-only.", "Give an array that can be written.")
    return View(array.ctypes.data, dtype, array.shape, False, array)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    due = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != due:
            return math.prod(shape) == 0
        due *= extent
    return True


# DLPack's structures and Python's capsules (dlpack.h; "The Python Specification for DLPack").


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # of a capsule that is being destroyed: no reference
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, _Destructor),
)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_is_valid = ctypes.PyDLL(None).PyCapsule_IsValid  # an object of its own: its argument is a bare address
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p)
_bare_pointer = ctypes.PyDLL(None).PyCapsule_GetPointer
_bare_pointer.restype, _bare_pointer.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)

_exported: dict[int, tuple[Any, ...]] = {}  # address of what was handed out: what must stay alive for it


def _release(managed: int) -> None:
    """The consumer is done."""
    _exported.pop(managed, None)


def _release_if_not_taken(capsule: int) -> None:
    """The capsule goes; if a consumer had taken it, it would have been renamed."""
    if _is_valid(capsule, b"dltensor"):
        _exported.pop(_bare_pointer(capsule, b"dltensor"), None)


_delete = _Deleter(_release)
_abandoned = _Destructor(_release_if_not_taken)


def _tensor_in(capsule: Any) -> _Tensor:
    """The capsule keeps the tensor alive as long as it is not renamed, and returns it when it goes."""
    found: _Tensor = _Managed.from_address(_pointer(capsule, b"dltensor")).tensor
    if not 0 <= found.ndim <= MOST_DIMENSIONS:
        raise ValueError(f"{found.ndim} dimensions")
    return found


_numpy_dtypes = {dtype.numpy: name for name, dtype in DTYPES.items()}
_dlpack_dtypes = {dtype.dlpack: name for name, dtype in DTYPES.items()}
