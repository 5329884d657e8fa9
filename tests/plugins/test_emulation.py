# SPDX-License-Identifier: Apache-2.0
"""The op as the plugin launches it, its pruning kernels' device code run on the CPU, means what sparsity.py means.

CUTLASS's GEMM has a stand-in (plugins/tests/emulation/sparse_gemm.cpp) that reads the compressed operand as the tensor
cores do. plugins/tests/emulation_test.cpp goes deeper: it knows every byte of that operand.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from lynx_compile.ops.sparse_linear import (
    GATE_FIRST,
    GELU_ERF,
    GELU_TANH,
    SILU,
    X_FIRST,
    expand_low_rank,
    keep_mask,
    sparse_linear,
)
from lynx_compile.torch_ops.bindings import DTYPES, OTHER_VERSION, _Call, _WeightCall, load_library

from .native import PLUGINS, compile_cpp

pytestmark = pytest.mark.slow  # half a minute of g++
OUT_CHANNELS = 72
INVALID_VALUE = 1  # CUDA's
EPSILON = 1e-6
NONE, NORM, GELU, GATED = range(4)  # Producer in sparse_linear.h


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    tests = PLUGINS / "tests"
    sources = [
        *(
            tests / "emulation" / f"{name}.cpp"
            for name in ("emulation", "prune_bf16", "prune_fp16", "sparse_gemm")
        ),
        *(PLUGINS / "kernels" / f"{name}.cpp" for name in ("sparse_gemm", "sparse_linear")),
    ]
    options = ["-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{tests / 'emulation'}"]
    options += map(str, sources)
    output = tmp_path_factory.mktemp("emulation") / "emulated.so"
    return load_library(compile_cpp(PLUGINS / "c_api.cpp", output, *options))


def run(library: ctypes.CDLL, tensors: dict[str, torch.Tensor], **fields: int | float) -> torch.Tensor:
    """y of lynx_sparse_linear for the tensors by their names in the call."""
    x = tensors["x"]
    channels = tensors["lora_down"].shape[1]
    call = _Call(
        fp16=DTYPES[x.dtype], rows=len(x), channels=channels, out_channels=OUT_CHANNELS, tile=-1, **fields
    )
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())
    workspace = torch.full((library.lynx_workspace_bytes(call) + 256,), 255, dtype=torch.uint8)
    y = torch.full((len(x), OUT_CHANNELS), torch.nan, dtype=x.dtype)
    call.workspace, call.y = -(-workspace.data_ptr() // 256) * 256, y.data_ptr()
    assert library.lynx_sparse_linear(call, None) == 0
    return y


def operands(rows: int, channels: int, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows + channels + rank)
    weight = torch.randn(OUT_CHANNELS, channels).mul(channels**-0.5).to(dtype)
    return {
        "x": torch.randn(rows, channels).to(dtype),
        "weight": expand_low_rank(weight, torch.randn(OUT_CHANNELS, rank).mul(0.2).to(dtype)),
        "lora_down": torch.randn(max(rank, 1), channels).mul(channels**-0.5).to(dtype),
        "bias": torch.randn(OUT_CHANNELS).to(dtype),
    }


def assert_rows_equal(y: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within two roundings, of T / s and of y; one other channel kept would be far more."""
    bound = 2.0**-7 if y.dtype == torch.bfloat16 else 2.0**-10
    errors = (y.double() - wanted.double()).norm(dim=1) / wanted.double().norm(dim=1)
    assert errors.max() < bound


@pytest.mark.parametrize(("dtype", "capability"), list(itertools.product(DTYPES, (80, 90))))
@pytest.mark.parametrize(
    ("rows", "channels", "rank", "norm_scale"),
    [
        (70, 192, 16, True),
        (65, 208, 0, False),
        (17, 528, 64, True),
        (33, 64, 128, False),
        (9, 1040, 32, True),
    ],
)
def test_equals_the_definition(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    capability: int,
    rows: int,
    channels: int,
    rank: int,
    norm_scale: bool,
) -> None:
    tensors = operands(rows, channels, rank, dtype)
    wanted = sparse_linear(**tensors, rank=rank, norm_scale=norm_scale)
    for reverse in (0, 1):
        library.lynx_emulate(capability, reverse)
        y = run(library, tensors, rank=rank, norm_scale=norm_scale)
        assert_rows_equal(y, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    ["layer norm", "rms norm", "gelu", "gelu erf", "gated", "gated by gelu", "x first", "gate first"],
)
def test_producers_are_fused(library: ctypes.CDLL, dtype: torch.dtype, name: str) -> None:
    rows, channels = 34, 208
    tensors = operands(rows, channels, 16, dtype)
    x = tensors["x"].double()
    gain, shift, gate = (torch.randn(n, channels).to(dtype) for n in (2, 2, rows))

    def modulate(normed: torch.Tensor) -> torch.Tensor:
        of_row = torch.arange(rows) // (rows // len(gain))
        return normed * gain[of_row].double() + shift[of_row].double()

    norm = {"producer": NORM, "epsilon": EPSILON, "gain_rows": 2}
    fields, more, produced = {
        "layer norm": (
            norm,
            {"gain": gain, "shift": shift},
            modulate(layer_norm(x, [channels], eps=EPSILON)),
        ),
        "rms norm": (
            {**norm, "rms": 1},
            {"gain": gain, "shift": shift},
            modulate(rms_norm(x, [channels], eps=EPSILON)),
        ),
        "gelu": (
            {"producer": GELU, "producer_activation": GELU_TANH},
            {},
            gelu(x, approximate="tanh"),
        ),
        "gelu erf": ({"producer": GELU, "producer_activation": GELU_ERF}, {}, gelu(x)),
        "gated": (
            {"producer": GATED, "producer_activation": SILU},
            {"gate": gate},
            silu(x) * gate.double(),
        ),
        "gated by gelu": (
            {"producer": GATED, "producer_activation": GELU_ERF},
            {"gate": gate},
            gelu(x) * gate.double(),
        ),
        "x first": (
            {"producer": GATED, "producer_activation": SILU, "halves": X_FIRST},
            dict.fromkeys(("x", "gate"), torch.cat((tensors["x"], gate), 1)),
            silu(x) * gate.double(),
        ),
        "gate first": (
            {"producer": GATED, "producer_activation": GELU_TANH, "halves": GATE_FIRST},
            dict.fromkeys(("x", "gate"), torch.cat((gate, tensors["x"]), 1)),
            gelu(x, approximate="tanh") * gate.double(),
        ),
    }[name]
    wanted = sparse_linear(**{**tensors, "x": produced.to(dtype)}, rank=16, norm_scale=True)
    library.lynx_emulate(80, 0)
    y = run(library, {**tensors, **more}, rank=16, norm_scale=1, **fields)
    assert_rows_equal(y, wanted)


def refusal(library: ctypes.CDLL, function: str, **fields: int) -> int:
    """What a function of the library returns for a call that is good but for ``fields``; nothing may be touched."""
    tensors = operands(34, 192, 0, torch.bfloat16)
    space = torch.zeros(2**20, dtype=torch.uint8)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    good = {"rows": 34, "channels": 192, "out_channels": OUT_CHANNELS, "tile": -1}
    at = -(-space.data_ptr() // 256) * 256
    call = _Call(**{**good, **pointers, "y": at, "workspace": at, **fields})
    error = getattr(library, function)(call, None)
    assert not space.any()
    return error


@pytest.mark.parametrize("function", ["lynx_sparse_linear", "lynx_prune", "lynx_pruned_gemm"])
@pytest.mark.parametrize(
    "fields",
    [
        {"producer": NORM, "gain": 256, "shift": 256, "epsilon": EPSILON, "gain_rows": 0},
        {"producer": NORM, "gain": 256, "shift": 256, "epsilon": EPSILON, "gain_rows": 5},
        {"producer": 4},
        {"producer": -1},
        {"producer": GATED, "producer_activation": SILU},  # and no gate
        {"producer": GATED, "gate": 256},  # and no activation
        {"producer": GATED, "gate": 256, "producer_activation": 4},
        {"producer": GATED, "gate": 256, "producer_activation": SILU, "halves": 3},
        {"producer": GELU},
        {"producer": GELU, "producer_activation": SILU},
        {"activation": GELU_ERF, "activation_from": 8},
        {"activation": SILU},
        {"rank": 24},
        {"rows": 0},
        {"rows": 2**25},
        {"x": None},
    ],
)
def test_every_function_checks_its_arguments(
    library: ctypes.CDLL, function: str, fields: dict[str, int]
) -> None:
    library.lynx_emulate(80, 0)
    assert refusal(library, function, **fields) == INVALID_VALUE


def test_caller_of_another_version_is_refused(library: ctypes.CDLL) -> None:
    call, weight = _Call(), _WeightCall(metadata_layout=80)
    call.struct_bytes += 8
    weight.struct_bytes = 0
    for function in ("lynx_sparse_linear", "lynx_prune", "lynx_pruned_gemm"):
        assert getattr(library, function)(call, None) == OTHER_VERSION
    assert library.lynx_sparse_weight_linear(weight, None) == OTHER_VERSION
    assert library.lynx_workspace_bytes(call) == library.lynx_weight_workspace_bytes(weight) == OTHER_VERSION


def test_unknown_metadata_layout_is_refused(library: ctypes.CDLL) -> None:
    library.lynx_emulate(90, 0)
    space = torch.zeros(2**16, dtype=torch.uint8)
    good = {"rows": 1, "channels": 64, "out_channels": 64, "tile": -1}
    pointers = dict.fromkeys(
        ("x", "values", "metadata", "bias", "y", "workspace"), -(-space.data_ptr() // 256) * 256
    )
    call = _WeightCall(**good, **pointers, metadata_layout=86)
    assert library.lynx_sparse_weight_linear(call, None) == INVALID_VALUE and not space.any()


def test_a_workspace_serves_every_gpu(library: ctypes.CDLL) -> None:
    sizes = set()
    for capability in (0, 80, 90):
        library.lynx_emulate(capability, 0)
        call = _Call(rows=4608, channels=3072, out_channels=9216, rank=64)
        sizes.add(library.lynx_workspace_bytes(call))
    assert len(sizes) == 1
    assert [library.lynx_holds(0, layout) for layout in (80, 86, 90)] == [1, 0, 1]


def test_another_selection_is_noticed(library: ctypes.CDLL) -> None:
    """The bound must be able to fail."""
    tensors = operands(70, 192, 16, torch.bfloat16)
    library.lynx_emulate(80, 0)
    smallest = torch.where(keep_mask(tensors["x"]), 0, tensors["x"])  # of each group, the other two
    y = run(library, {**tensors, "x": smallest}, rank=16, norm_scale=1)
    with pytest.raises(AssertionError):
        assert_rows_equal(y, sparse_linear(**tensors, rank=16, norm_scale=True))
