# SPDX-License-Identifier: Apache-2.0
"""The FP8 kernels called from torch, without TensorRT. Mirrors ``plugins/fp8_c_api.h``."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Literal

import torch

from lynx_compile.errors import InputError
from lynx_compile.ops.fp8 import E4M3, ROW_STEP, STEP, Rounded, pack, pack_dense
from lynx_compile.ops.sparse_linear import Gated, Gelu, Norm
from lynx_compile.torch_ops.bindings import ANY_TILE, DTYPES, LIBRARY, load_library

Operand = Literal["sparse weight", "dense", "sparse activation"]
OPERANDS: tuple[Operand, ...] = ("sparse weight", "dense", "sparse activation")  # by their numbers
Instructions = Literal["fastest", "mma", "wgmma"]
INSTRUCTIONS: tuple[Instructions, ...] = ("fastest", "mma", "wgmma")  # likewise


class _Fp8Call(ctypes.Structure):
    """``LynxFp8Linear`` of fp8_c_api.h."""

    _fields_ = [
        ("fp16", ctypes.c_int32), ("operand", ctypes.c_int32), ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int32), ("out_channels", ctypes.c_int32),
        ("activation", ctypes.c_int32), ("activation_from", ctypes.c_int32), ("gated", ctypes.c_int32),
        ("tile", ctypes.c_int32), ("producer", ctypes.c_int32), ("producer_activation", ctypes.c_int32),
        ("halves", ctypes.c_int32), ("rms", ctypes.c_int32), ("epsilon", ctypes.c_float),
        ("gain_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in
          ("x", "gain", "shift", "gate", "weight", "metadata", "weight_scale", "bias", "y", "workspace")),
        ("set", ctypes.c_int32),
    ]  # fmt: skip


def load_fp8_library(path: Path = LIBRARY) -> ctypes.CDLL:
    """Open the plugin library and declare its FP8 functions.

    Raises:
        InputError: it is missing, cannot be loaded, or is of another version.
    """
    library = load_library(path)
    try:
        declare(library)
    except AttributeError as error:
        raise InputError(
            f"The plugin library {path} cannot be used ({error}).", "Build it again with 'make plugin'."
        ) from None
    return library


def declare(library: ctypes.CDLL) -> None:
    """Of its FP8 functions; raises AttributeError where one is missing."""
    library.lynx_fp8_workspace_bytes.restype = ctypes.c_int64
    library.lynx_fp8_workspace_bytes.argtypes = [ctypes.POINTER(_Fp8Call)]
    library.lynx_fp8_tile_count.argtypes = [ctypes.c_int] * 3
    library.lynx_fp8_runs.argtypes = [ctypes.c_int]
    library.lynx_fp8_product_bytes.restype = ctypes.c_int64
    library.lynx_fp8_product_bytes.argtypes = [ctypes.POINTER(_Fp8Call)]
    library.lynx_fp8_product.argtypes = [ctypes.POINTER(_Fp8Call), *[ctypes.c_void_p] * 3]
    for name in ("lynx_fp8_linear", "lynx_fp8_round", "lynx_fp8_gemm"):
        getattr(library, name).argtypes = [ctypes.POINTER(_Fp8Call), ctypes.c_void_p]


def tile_count(
    library: ctypes.CDLL, dtype: torch.dtype, operand: Operand, instructions: Instructions = "fastest"
) -> int:
    """Number of tile configurations of a GEMM; 0 where this GPU or the library lacks its instructions."""
    call = (DTYPES[dtype], OPERANDS.index(operand), INSTRUCTIONS.index(instructions))
    return int(library.lynx_fp8_tile_count(*call))


class Fp8Linear:
    """One FP8 linear on the GPU, its output and workspace allocated once.

    Args:
        weight: W_q [N, K] and its scales. bias: [N], of x's dtype, bf16 or fp16.
        keep: bool [N, K], what a 2:4 weight keeps; with operand "sparse weight" alone.
        activation: 0 none, or one of ``ACTIVATIONS``, for the weight's rows from ``activation_from`` on, a multiple of
            64. gated: whether two of them make an output channel; without, the activation is a GELU.
        producer: what x is made into before it is rounded.
        instructions: whose GEMM to run, where not the fastest that the GPU gets.

    Raises:
        InputError: the kernels do not run here.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Rounded,
        bias: torch.Tensor,
        *,
        rows: int,
        operand: Operand,
        keep: torch.Tensor | None = None,
        activation: int = 0,
        activation_from: int = 0,
        gated: bool = False,
        producer: Norm | Gelu | Gated | None = None,
        instructions: Instructions = "fastest",
    ) -> None:
        out_channels, channels = weight.values.shape
        self._library, self._dtype, self._device = library, bias.dtype, bias.device
        self._call = _Fp8Call(
            fp16=DTYPES[bias.dtype], operand=OPERANDS.index(operand), rows=rows, channels=channels,
            out_channels=out_channels, activation=activation, activation_from=activation_from, gated=gated,
            tile=ANY_TILE, weight_scale=weight.scale.data_ptr(), bias=bias.data_ptr(),
            set=INSTRUCTIONS.index(instructions),
        )  # fmt: skip
        values, metadata = (pack_dense(weight.values), None) if keep is None else pack(weight.values, keep)
        self._call.weight, self._call.metadata = (
            values.data_ptr(),
            0 if metadata is None else metadata.data_ptr(),
        )
        self._set_producer(producer)
        self.bias = bias
        y_channels = activation_from + (out_channels - activation_from) // 2 if gated else out_channels
        self.write_to(torch.empty(rows, y_channels, dtype=bias.dtype, device=bias.device))
        size = library.lynx_fp8_workspace_bytes(self._call)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=bias.device)
        self._call.workspace = self.workspace.data_ptr()
        self.tensors = (values, metadata, weight.scale, bias, producer)  # the call holds their addresses

    def _set_producer(self, producer: Norm | Gelu | Gated | None) -> None:
        call = self._call
        if isinstance(producer, Norm):
            call.producer, call.rms, call.epsilon = 1, producer.rms, producer.epsilon
            call.gain, call.shift = producer.gain.data_ptr(), producer.shift.data_ptr()
            call.gain_rows = len(producer.gain)
        elif isinstance(producer, Gelu):
            call.producer, call.producer_activation = 2, producer.activation
        elif isinstance(producer, Gated):
            call.producer, call.producer_activation, call.halves = 3, producer.activation, producer.halves
            call.gate = producer.gate.data_ptr()

    def write_to(self, y: torch.Tensor) -> None:
        """``y`` [rows, N] is where the calls from here on put their result."""
        self.y = y
        self._call.y = y.data_ptr()

    def __call__(self, x: torch.Tensor, tile: int = ANY_TILE) -> torch.Tensor:
        """y [rows, N] for x [rows, K], or [rows, 2 K] with its gate; the same tensor at every call.

        On torch's current stream.
        """
        return self._run("lynx_fp8_linear", x, tile)

    def round(self, x: torch.Tensor) -> None:
        """The rounding pass alone: leaves the FP8 operand in the workspace."""
        self._run("lynx_fp8_round", x, ANY_TILE)

    def gemm(self, x: torch.Tensor, tile: int = ANY_TILE) -> torch.Tensor:
        """The GEMM alone, on what the last rounding pass left."""
        return self._run("lynx_fp8_gemm", x, tile)

    def rounded(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What the last rounding pass left: values, metadata (of 2:4 activations) and scales."""
        rows, width = self._call.rows, -(-self._call.channels // STEP) * STEP
        padded, pruned = (
            -(-rows // ROW_STEP) * ROW_STEP,
            self._call.operand == OPERANDS.index("sparse activation"),
        )
        sizes = (padded * width // 2, padded * width // 8) if pruned else (rows * width, 0)
        parts, at = [], 0
        for size in (*sizes, 4 * padded):
            parts.append(self.workspace[at : at + size])
            at += -(-size // 256) * 256
        values = parts[0].view(E4M3).view(-1, width // 2 if pruned else width)
        metadata = parts[1].view(torch.int32).view(width // STEP, padded, 4) if pruned else None
        return values, metadata, parts[2].view(torch.float32)[:rows]

    def _run(self, function: str, x: torch.Tensor, tile: int) -> torch.Tensor:
        width = self._call.channels * (2 if self._call.halves else 1)
        if tuple(x.shape) != (self._call.rows, width) or x.dtype != self._dtype or not x.is_contiguous():
            raise InputError(
                f"x is {x.dtype} {list(x.shape)} and should be {self._dtype} {[self._call.rows, width]}.",
                "Use one contiguous CUDA tensor of that shape.",
            )
        self._call.x, self._call.tile = x.data_ptr(), tile
        error = getattr(self._library, function)(self._call, torch.cuda.current_stream(x.device).cuda_stream)
        if error:
            raise InputError(
                f"{function} failed with CUDA error {error}.",
                "Check that the GPU is sm_89 or newer, and the library built for it.",
            )
        return self.y
