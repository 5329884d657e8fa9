# SPDX-License-Identifier: Apache-2.0
"""The plugin's kernels called from torch, without TensorRT: for measuring and testing them (``bench``, tests/gpu).

Mirrors ``plugins/c_api.h``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from lynx_compile.errors import InputError
from lynx_compile.ops.sparse_linear import Gated, Gelu, Norm, padded_width
from lynx_compile.ops.sparse_weight_linear import STEP

LIBRARY = Path(__file__).resolve().parents[1] / "lib" / "liblynx_plugin.so"
ANY_TILE = -1  # the dispatcher's choice
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
ABI = 5  # LYNX_ABI of c_api.h
OTHER_VERSION = -1


class _Sized(ctypes.Structure):
    """A structure that says first how large it is, so that a library of another version refuses it."""

    def __init__(self, **fields: int | float | None) -> None:
        super().__init__(struct_bytes=ctypes.sizeof(self), **fields)


class _Call(_Sized):
    """``LynxSparseLinear`` of c_api.h."""

    _fields_ = [
        ("struct_bytes", ctypes.c_int32), ("fp16", ctypes.c_int32), ("rank", ctypes.c_int32), ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int32), ("out_channels", ctypes.c_int32),
        ("norm_scale", ctypes.c_int32), ("activation", ctypes.c_int32), ("activation_from", ctypes.c_int32),
        ("tile", ctypes.c_int32), ("producer", ctypes.c_int32), ("producer_activation", ctypes.c_int32),
        ("halves", ctypes.c_int32), ("rms", ctypes.c_int32), ("epsilon", ctypes.c_float),
        ("gain_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in
          ("x", "gain", "shift", "gate", "weight", "lora_down", "bias",
           "y", "workspace")),
    ]  # fmt: skip


class _WeightCall(_Sized):
    """``LynxSparseWeightLinear`` of c_api.h."""

    _fields_ = [
        ("struct_bytes", ctypes.c_int32), ("fp16", ctypes.c_int32), ("metadata_layout", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int32), ("out_channels", ctypes.c_int32),
        ("activation", ctypes.c_int32), ("activation_from", ctypes.c_int32), ("gated", ctypes.c_int32),
        ("tile", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "values", "metadata", "bias", "y", "workspace")),
    ]  # fmt: skip


def load_library(path: Path = LIBRARY) -> ctypes.CDLL:
    """Open the plugin library and declare its C functions.

    Raises:
        InputError: it is missing, cannot be loaded, or is of another version.
    """
    if not path.is_file():
        raise InputError(f"The plugin library {path} does not exist.", "Run 'make plugin' in the sources.")
    try:
        library = ctypes.CDLL(str(path))
        library.lynx_abi.argtypes = []
        abi = library.lynx_abi()
        library.lynx_workspace_bytes.restype = ctypes.c_int64
        library.lynx_workspace_bytes.argtypes = [ctypes.POINTER(_Call)]
        library.lynx_weight_workspace_bytes.restype = ctypes.c_int64
        library.lynx_weight_workspace_bytes.argtypes = [ctypes.POINTER(_WeightCall)]
        library.lynx_holds.argtypes = [ctypes.c_int, ctypes.c_int]
        library.lynx_tile_count.argtypes = [ctypes.c_int]
        library.lynx_metadata_layout.argtypes = [ctypes.c_int]
        for name in ("lynx_sparse_linear", "lynx_prune", "lynx_pruned_gemm"):
            getattr(library, name).argtypes = [ctypes.POINTER(_Call), ctypes.c_void_p]
        library.lynx_sparse_weight_linear.argtypes = [ctypes.POINTER(_WeightCall), ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise InputError(
            f"The plugin library {path} cannot be used ({error}).", "Build it again with 'make plugin'."
        ) from None
    if abi != ABI:
        raise InputError(
            f"The plugin library {path} is of another version: its interface is {abi}, and {ABI} is due.",
            "Build it again with 'make plugin'.",
        )
    return library


class SparseLinear:
    """One ``LynxSparseLinear`` on the GPU, its output and workspace allocated once.

    Args:
        weight: [N, padded_width(K, rank)]. lora_down: [max(rank, 1), K]. bias: [N]. All of x's dtype, bf16 or fp16.
        activation: 0 none, or a GELU, for the output channels from ``activation_from`` on, a multiple of 64.
        producer: what x is made into before it is pruned.

    Raises:
        InputError: a tensor is not a contiguous CUDA tensor of the right shape and dtype.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: torch.Tensor,
        lora_down: torch.Tensor,
        bias: torch.Tensor,
        *,
        rows: int,
        rank: int = 0,
        norm_scale: bool = False,
        activation: int = 0,
        activation_from: int = 0,
        producer: Norm | Gelu | Gated | None = None,
    ) -> None:
        channels, out_channels = lora_down.shape[1], len(bias)
        for name, tensor, shape in (
            ("weight", weight, (out_channels, padded_width(channels, rank))),
            ("lora_down", lora_down, (max(rank, 1), channels)),
            ("bias", bias, (out_channels,)),
        ):
            _check(name, tensor, shape, weight.dtype)
        self._library = library
        self._call = _Call(
            fp16=DTYPES[weight.dtype], rank=rank, rows=rows, channels=channels, out_channels=out_channels,
            norm_scale=norm_scale, activation=activation, activation_from=activation_from, tile=ANY_TILE,
            weight=weight.data_ptr(), lora_down=lora_down.data_ptr(), bias=bias.data_ptr(),
        )  # fmt: skip
        self._x_channels = channels
        self._set_producer(producer)
        self.y = torch.empty(rows, out_channels, dtype=weight.dtype, device=weight.device)
        size = library.lynx_workspace_bytes(self._call)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=weight.device)
        self._call.y, self._call.workspace = self.y.data_ptr(), self._workspace.data_ptr()
        self.tensors = (weight, lora_down, bias)  # the call holds their addresses

    def _set_producer(self, producer: Norm | Gelu | Gated | None) -> None:
        call, dtype = self._call, next(dtype for dtype, code in DTYPES.items() if code == self._call.fp16)
        if isinstance(producer, Norm):
            for name in ("gain", "shift"):
                tensor = getattr(producer, name)
                _check(name, tensor, (len(producer.gain), call.channels), dtype)
                setattr(call, name, tensor.data_ptr())
            call.producer, call.rms, call.epsilon = 1, producer.rms, producer.epsilon
            call.gain_rows = len(producer.gain)
        elif isinstance(producer, Gelu):
            call.producer, call.producer_activation = 2, producer.activation
        elif isinstance(producer, Gated):
            self._x_channels *= 2 if producer.halves else 1
            _check("gate", producer.gate, (call.rows, self._x_channels), dtype)
            call.producer, call.producer_activation, call.halves = 3, producer.activation, producer.halves
            call.gate = producer.gate.data_ptr()
        self._producer = producer  # the call holds its addresses

    def __call__(self, x: torch.Tensor, tile: int = ANY_TILE) -> torch.Tensor:
        """y [rows, N] for x [rows, K], or [rows, 2 K] with its gate; the same tensor at every call.

        On torch's current stream.
        """
        return self._run("lynx_sparse_linear", x, tile)

    def prune(self, x: torch.Tensor) -> None:
        """The pruning pass alone: leaves the compressed operand in the workspace."""
        self._run("lynx_prune", x, ANY_TILE)

    def gemm(self, x: torch.Tensor, tile: int = ANY_TILE) -> torch.Tensor:
        """The GEMM alone, on what the last pruning pass left; ``tile``: a configuration, or the dispatcher's."""
        return self._run("lynx_pruned_gemm", x, tile)

    def _run(self, function: str, x: torch.Tensor, tile: int) -> torch.Tensor:
        _check("x", x, (self._call.rows, self._x_channels), self.y.dtype)
        self._call.x, self._call.tile = x.data_ptr(), tile
        _launch(self._library, function, self._call, x)
        return self.y


class SparseWeightLinear:
    """One ``LynxSparseWeightLinear`` on the GPU, its output and workspace allocated once.

    Args:
        values: [Np, K / 2]. metadata: int32 [K / 64, Np / 64, 128], as ``pack_weight`` makes them. bias: [N].
        metadata_layout: 80 or 90.
        activation: 0 none, or one of ``ACTIVATIONS``, for the weight's rows from ``activation_from`` on, a multiple of
            64. gated: whether two of them make an output channel; without, the activation is a GELU.

    Raises:
        InputError: a tensor is not a contiguous CUDA tensor of the right shape and dtype.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        values: torch.Tensor,
        metadata: torch.Tensor,
        bias: torch.Tensor,
        *,
        rows: int,
        metadata_layout: int,
        activation: int = 0,
        activation_from: int = 0,
        gated: bool = False,
    ) -> None:
        channels, out_channels = 2 * values.shape[1], len(bias)
        padded = -(-out_channels // STEP) * STEP
        _check("values", values, (padded, channels // 2), values.dtype)
        _check("bias", bias, (out_channels,), values.dtype)
        _check("metadata", metadata, (channels // STEP, padded // STEP, 2 * STEP), torch.int32)
        self._library = library
        self._call = _WeightCall(
            fp16=DTYPES[values.dtype], metadata_layout=metadata_layout, rows=rows, channels=channels,
            out_channels=out_channels, activation=activation, activation_from=activation_from, gated=gated,
            values=values.data_ptr(), metadata=metadata.data_ptr(), bias=bias.data_ptr(),
        )  # fmt: skip
        y_channels = activation_from + (out_channels - activation_from) // 2 if gated else out_channels
        self.y = torch.empty(rows, y_channels, dtype=values.dtype, device=values.device)
        size = library.lynx_weight_workspace_bytes(self._call)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=values.device)
        self._call.y, self._call.workspace = self.y.data_ptr(), self._workspace.data_ptr()
        self.tensors = (values, metadata, bias)  # the call holds their addresses

    def __call__(self, x: torch.Tensor, tile: int = ANY_TILE) -> torch.Tensor:
        """y [rows, N] for x [rows, K]; the same tensor at every call. On torch's current stream."""
        _check("x", x, (self._call.rows, self._call.channels), self.y.dtype)
        self._call.x, self._call.tile = x.data_ptr(), tile
        _launch(self._library, "lynx_sparse_weight_linear", self._call, x)
        return self.y


def _launch(library: ctypes.CDLL, function: str, call: ctypes.Structure, x: torch.Tensor) -> None:
    error = getattr(library, function)(call, torch.cuda.current_stream(x.device).cuda_stream)
    if error == OTHER_VERSION:
        raise InputError("The plugin library is of another version.", "Build it again with 'make plugin'.")
    if error:
        raise InputError(
            f"{function} failed with CUDA error {error}.", "Check that the GPU is sm_80 or later."
        )


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    known = dtype in DTYPES or name == "metadata"
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not known:
        raise InputError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} and should be {dtype} {list(shape)}.",
            "Use bf16 or fp16 and the shapes of lynx_compile.ops.sparse_linear.",
        )
    if not (tensor.is_cuda and tensor.is_contiguous()):
        raise InputError(f"{name} is not a contiguous CUDA tensor.", "Move it to the GPU.")
