# SPDX-License-Identifier: Apache-2.0
"""The kernels as torch's own operators, ``torch.ops.lynx``: they trace, compile and go into CUDA graphs.

Each op has three faces: on a GPU the plugin library's kernel, on torch's current stream, without a word to the host; on
a CPU the definition in ``ops/``; and for a compiler the shape of its result. Workspaces come from torch's allocator, so
that a graph's belong to its pool. All tensors are contiguous; a slice that starts at an odd place is copied first.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from lynx_compile.errors import EngineError
from lynx_compile.ops import fp8, sparse_linear, sparse_weight_linear
from lynx_compile.ops.fp8 import Rounded
from lynx_compile.ops.sparse_linear import APART, GELU_TANH, SILU, X_FIRST, Gated, Gelu, Norm, produce
from lynx_compile.ops.sparse_weight_linear import MetadataLayout
from lynx_compile.torch_ops.bindings import ANY_TILE, DTYPES, LIBRARY, _Call, _WeightCall
from lynx_compile.torch_ops.epilogue import NO_EPILOGUE, Epilogue
from lynx_compile.torch_ops.fp8_bindings import OPERANDS, _Fp8Call, load_fp8_library

ALIGNMENT = 16  # bytes, of every tensor that a kernel reads
PRODUCERS = ("none", "norm", "gelu", "gated")  # by their numbers in c_api.h
ACTIVATION_OF = {"gelu": GELU_TANH, "gated": SILU}


@torch.library.custom_op("lynx::sparse_weight_linear", mutates_args=(), device_types="cpu")
def sparse_weight(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor,
    metadata_layout: int,
    activation: int,
    activation_from: int,
    gated: bool,
) -> torch.Tensor:
    """y [M, N] for x [M, K], values [Np, K / 2], metadata int32 [K / 64, Np / 64, 128], bias [N]; ops has the epilogue.

    Where it is gated, y is [M, activation_from + (N - activation_from) / 2].
    """
    return sparse_weight_linear.sparse_weight_linear(
        x, values, metadata, bias, metadata_layout=90 if metadata_layout == 90 else 80,
        activation=activation, activation_from=activation_from, gated=gated,
    )  # fmt: skip


@sparse_weight.register_kernel("cuda")
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor,
    metadata_layout: int,
    activation: int,
    activation_from: int,
    gated: bool,
) -> torch.Tensor:
    x, y = _ready(x), _result(x, bias, Epilogue(activation, activation_from, gated))
    if not len(x):
        return y
    call = _WeightCall(
        fp16=DTYPES[x.dtype], metadata_layout=metadata_layout, rows=len(x), channels=x.shape[1],
        out_channels=len(bias), tile=ANY_TILE, activation=activation, activation_from=activation_from, gated=gated,
        x=x.data_ptr(), values=values.data_ptr(), metadata=metadata.data_ptr(), bias=bias.data_ptr(), y=y.data_ptr(),
    )  # fmt: skip
    _launch("lynx_sparse_weight_linear", "lynx_weight_workspace_bytes", call, x)
    return y


@torch.library.custom_op("lynx::sparse_linear", mutates_args=(), device_types="cpu")
def sparse_activation(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_down: torch.Tensor,
    bias: torch.Tensor,
    rank: int,
    norm_scale: bool,
    gelu_from: int,
    producer: str,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate: torch.Tensor | None,
    rms: bool,
    epsilon: float,
) -> torch.Tensor:
    """y [M, N] for x [M, K], whose activations are pruned; the tensors as ``ops.sparse_linear`` has them.

    ``producer``: what x is made into before: "none", "norm" with gain and shift [rows, K], "gelu", or "gated" with gate
    [M, K].
    """
    return sparse_linear.sparse_linear(
        _produced(x, producer, gain, shift, gate, rms, epsilon), weight, lora_down, bias,
        rank=rank, norm_scale=norm_scale, activation=int(gelu_from < len(bias)), activation_from=gelu_from,
    )  # fmt: skip


@sparse_activation.register_kernel("cuda")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_down: torch.Tensor,
    bias: torch.Tensor,
    rank: int,
    norm_scale: bool,
    gelu_from: int,
    producer: str,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate: torch.Tensor | None,
    rms: bool,
    epsilon: float,
) -> torch.Tensor:
    x, y = _ready(x), _result(x, bias)
    if not len(x):
        return y
    gain, shift, gate = (None if t is None else _ready(t) for t in (gain, shift, gate))
    call = _Call(
        fp16=DTYPES[x.dtype], rank=rank, rows=len(x), channels=x.shape[1], out_channels=len(bias),
        norm_scale=norm_scale, tile=ANY_TILE, **_gelu(gelu_from, bias), producer=PRODUCERS.index(producer),
        producer_activation=ACTIVATION_OF.get(producer, 0), rms=rms, epsilon=epsilon,
        gain_rows=0 if gain is None else len(gain), x=x.data_ptr(), gain=_address(gain), shift=_address(shift),
        gate=_address(gate), weight=weight.data_ptr(), lora_down=lora_down.data_ptr(), bias=bias.data_ptr(),
        y=y.data_ptr(),
    )  # fmt: skip
    _launch("lynx_sparse_linear", "lynx_workspace_bytes", call, x)
    return y


@torch.library.custom_op("lynx::fp8_linear", mutates_args=(), device_types="cpu")
def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    metadata: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    operand: str,
    activation: int,
    activation_from: int,
    gated: bool,
    producer: str,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    rms: bool,
    epsilon: float,
) -> torch.Tensor:
    """y [M, N] in FP8 for x [M, K]: a rounding pass, which makes x first where there is a producer, and the GEMM.

    Where it is gated, y is [M, activation_from + (N - activation_from) / 2].

    ``weight``: e4m3 [N, K'], with its metadata and [Np, K' / 2] where ``operand`` is "sparse weight". ``producer``: as
    of ``sparse_activation``; "gated" takes x [M, 2 K], SiLU of whose first half is multiplied by the second.
    """
    gate = None
    if producer == "gated":
        x, gate = x.chunk(2, -1)
    z = _produced(x, producer, gain, shift, gate, rms, epsilon)
    return fp8.fp8_linear(
        z, _unpacked(weight, metadata, weight_scale, z.shape[1]), bias,
        prune=operand == "sparse activation", activation=activation, activation_from=activation_from, gated=gated,
    )  # fmt: skip


@fp8_linear.register_kernel("cuda")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    metadata: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    operand: str,
    activation: int,
    activation_from: int,
    gated: bool,
    producer: str,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    rms: bool,
    epsilon: float,
) -> torch.Tensor:
    x, y = _ready(x), _result(x, bias, Epilogue(activation, activation_from, gated))
    if not len(x):
        return y
    gain, shift = (None if t is None else _ready(t) for t in (gain, shift))
    call = _Fp8Call(
        fp16=DTYPES[x.dtype], operand=_number(operand), rows=len(x),
        channels=x.shape[1] // (2 if producer == "gated" else 1), out_channels=len(bias),
        activation=activation, activation_from=activation_from, gated=gated,
        tile=ANY_TILE, producer=PRODUCERS.index(producer), producer_activation=ACTIVATION_OF.get(producer, 0),
        halves=X_FIRST if producer == "gated" else APART, rms=rms, epsilon=epsilon,
        gain_rows=0 if gain is None else len(gain), x=x.data_ptr(), gain=_address(gain), shift=_address(shift),
        gate=x.data_ptr() if producer == "gated" else 0, weight=weight.data_ptr(), metadata=_address(metadata),
        weight_scale=weight_scale.data_ptr(), bias=bias.data_ptr(), y=y.data_ptr(),
    )  # fmt: skip
    _launch("lynx_fp8_linear", "lynx_fp8_workspace_bytes", call, x)
    return y


@torch.library.custom_op("lynx::fp8_product", mutates_args=(), device_types="cpu")
def fp8_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    metadata: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    activation: int,
    activation_from: int,
    gated: bool,
) -> torch.Tensor:
    """The GEMM alone, for x e4m3 [M, K'] that torch rounded (``fp8.round_rows``), x_scale [M]; y in bias's dtype.

    A compiler fuses torch's rounding with whatever makes x, of which our pass knows a few kinds only.
    """
    rounded = Rounded(x, x_scale).dequantized()
    full = _unpacked(weight, metadata, weight_scale, x.shape[1]).dequantized()[: len(bias)]
    y = rounded @ full.T + bias.float()
    return sparse_linear.activate(y, activation, activation_from, gated).to(bias.dtype)


@fp8_product.register_kernel("cuda")
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    metadata: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    activation: int,
    activation_from: int,
    gated: bool,
) -> torch.Tensor:
    epilogue = Epilogue(activation, activation_from, gated)
    x, x_scale, y = _ready(x), _ready(x_scale), _result(x, bias, epilogue)
    if not len(x):
        return y
    call = _Fp8Call(
        fp16=DTYPES[bias.dtype], operand=_number("dense" if metadata is None else "sparse weight"), rows=len(x),
        channels=x.shape[1], out_channels=len(bias), tile=ANY_TILE,
        activation=activation, activation_from=activation_from, gated=gated,
        weight=weight.data_ptr(), metadata=_address(metadata), weight_scale=weight_scale.data_ptr(),
        bias=bias.data_ptr(), y=y.data_ptr(),
    )  # fmt: skip
    _launch("lynx_fp8_product", "lynx_fp8_product_bytes", call, x, x.data_ptr(), x_scale.data_ptr())
    return y


@sparse_weight.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor,
    metadata_layout: int,
    activation: int,
    activation_from: int,
    gated: bool,
) -> torch.Tensor:
    return _result(x, bias, Epilogue(activation, activation_from, gated))


@sparse_activation.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, lora_down: torch.Tensor, bias: torch.Tensor, *_: object
) -> torch.Tensor:
    return _result(x, bias)


@fp8_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    metadata: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    operand: str,
    activation: int,
    activation_from: int,
    gated: bool,
    *_: object,
) -> torch.Tensor:
    return _result(x, bias, Epilogue(activation, activation_from, gated))


@fp8_product.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    metadata: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    activation: int,
    activation_from: int,
    gated: bool,
) -> torch.Tensor:
    return _result(x, bias, Epilogue(activation, activation_from, gated))


def metadata_layout(dtype: torch.dtype) -> MetadataLayout:
    """Which metadata of 2:4 weights the kernels of the current GPU read, 80 or 90."""
    return 90 if _library().lynx_metadata_layout(DTYPES[dtype]) == 90 else 80


def kernels_run(dtype: torch.dtype) -> bool:
    """Whether there is a GPU here for which the library has kernels of this type."""
    if dtype not in DTYPES or not torch.cuda.is_available() or not _path.exists():
        return False
    return bool(_library().lynx_tile_count(DTYPES[dtype]))


def fp8_kernels_run(dtype: torch.dtype) -> bool:
    """The same of its FP8 kernels."""
    return kernels_run(dtype) and bool(_library().lynx_fp8_runs(DTYPES[dtype]))


def use_library(path: Path) -> None:
    """Take the kernels from this build of the plugin library from now on.

    Raises:
        InputError: it is missing, cannot be loaded, or is of another version.
    """
    global _path
    load_fp8_library(path)
    _path = path


def _library() -> ctypes.CDLL:
    return _loaded(_path)


_path = LIBRARY
_loaded = functools.cache(load_fp8_library)


def _result(x: torch.Tensor, bias: torch.Tensor, epilogue: Epilogue = NO_EPILOGUE) -> torch.Tensor:
    return x.new_empty((x.shape[0], epilogue.width(bias.shape[0])), dtype=bias.dtype)


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and where the kernels can read 16 bytes at once."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _gelu(gelu_from: int, bias: torch.Tensor) -> dict[str, int]:
    """The epilogue of a call."""
    return {"activation": GELU_TANH, "activation_from": gelu_from} if gelu_from < len(bias) else {}


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _number(operand: str) -> int:
    return [str(each) for each in OPERANDS].index(operand)


def _launch(function: str, workspace_bytes: str, call: ctypes.Structure, x: torch.Tensor, *more: int) -> None:
    """Queue ``function`` on x's GPU and the current stream, with as much workspace as ``workspace_bytes`` says."""
    size = getattr(_library(), workspace_bytes)(call)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=x.device)
    call.workspace = workspace.data_ptr()
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = getattr(_library(), function)(call, *more, stream)
    if error:
        raise EngineError(
            f"{function} failed with CUDA error {error} on {torch.cuda.get_device_name(x.device)}.",
            "Check that the plugin library was built for this GPU and this dtype.",
        )


def _produced(
    x: torch.Tensor,
    producer: str,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate: torch.Tensor | None,
    rms: bool,
    epsilon: float,
) -> torch.Tensor:
    """What a producer makes of x, by the definition."""
    if producer == "norm":
        assert gain is not None and shift is not None
        return produce(x, Norm(gain, shift, rms, epsilon))
    if producer == "gelu":
        return produce(x, Gelu())
    if producer == "gated":
        assert gate is not None
        return produce(x, Gated(gate))
    return x


def _unpacked(
    weight: torch.Tensor, metadata: torch.Tensor | None, weight_scale: torch.Tensor, channels: int
) -> Rounded:
    """W_q [N, K] out of what the GEMM reads."""
    full = weight if metadata is None else fp8.unpack(weight, metadata)
    return Rounded(full[: len(weight_scale), :channels], weight_scale)
