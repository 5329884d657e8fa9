# SPDX-License-Identifier: Apache-2.0
"""The plugin's kernels called from torch, without TensorRT: for measuring and testing them (``bench``, tests/gpu).

Mirrors ``plugins/c_api.cpp``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from lynx_compile.errors import InputError
from lynx_compile.sparsity import padded_width

LIBRARY = Path(__file__).resolve().parent / "lib" / "liblynx_plugin.so"
DTYPES = {torch.bfloat16: 0, torch.float16: 1}


class _Call(ctypes.Structure):
    """``LynxSparseLinear`` of c_api.cpp."""

    _fields_ = [
        ("fp16", ctypes.c_int32), ("rank", ctypes.c_int32), ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int32), ("out_channels", ctypes.c_int32),
        ("norm_scale", ctypes.c_int32), ("tile", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in
          ("x", "weight", "lora_down", "bias", "order", "centre", "saliency", "y", "workspace")),
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
        library.lynx_workspace_bytes.restype = ctypes.c_int64
        library.lynx_workspace_bytes.argtypes = [ctypes.POINTER(_Call)]
        library.lynx_tile_count.argtypes = []
        for name in ("lynx_sparse_linear", "lynx_prune", "lynx_sparse_gemm"):
            getattr(library, name).argtypes = [ctypes.POINTER(_Call), ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise InputError(
            f"The plugin library {path} cannot be used ({error}).", "Build it again with 'make plugin'."
        ) from None
    return library


class SparseLinear:
    """One ``LynxSparseLinear`` on the GPU, its output and workspace allocated once.

    Args:
        weight: [N, padded_width(K, rank)]. lora_down: [max(rank, 1), K]. bias: [N]. All of x's dtype, bf16 or fp16.

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
            norm_scale=norm_scale, tile=-1,
            weight=weight.data_ptr(), lora_down=lora_down.data_ptr(), bias=bias.data_ptr(),
        )  # fmt: skip
        self.y = torch.empty(rows, out_channels, dtype=weight.dtype, device=weight.device)
        size = library.lynx_workspace_bytes(self._call)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=weight.device)
        self._call.y, self._call.workspace = self.y.data_ptr(), self._workspace.data_ptr()
        self.tensors = (weight, lora_down, bias)  # the call holds their addresses

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y [rows, N] for x [rows, K]; the same tensor at every call. On torch's current stream."""
        return self._run("lynx_sparse_linear", x)

    def prune(self, x: torch.Tensor) -> None:
        """The pruning pass alone: leaves the compressed operand in the workspace."""
        self._run("lynx_prune", x)

    def gemm(self, x: torch.Tensor, tile: int = -1) -> torch.Tensor:
        """The GEMM alone, on what the last pruning pass left; ``tile``: a configuration, -1 the dispatcher's."""
        self._call.tile = tile
        return self._run("lynx_sparse_gemm", x)

    def _run(self, function: str, x: torch.Tensor) -> torch.Tensor:
        _check("x", x, (self._call.rows, self._call.channels), self.y.dtype)
        self._call.x = x.data_ptr()
        stream = torch.cuda.current_stream(x.device).cuda_stream
        error = getattr(self._library, function)(self._call, stream)
        if error:
            raise InputError(
                f"{function} failed with CUDA error {error}.", "Check that the GPU is sm_80 or later."
            )
        return self.y


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or dtype not in DTYPES:
        raise InputError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} and should be {dtype} {list(shape)}.",
            "Use bf16 or fp16 and the shapes of lynx_compile.sparsity.",
        )
    if not (tensor.is_cuda and tensor.is_contiguous()):
        raise InputError(f"{name} is not a contiguous CUDA tensor.", "Move it to the GPU.")
