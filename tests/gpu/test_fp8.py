# SPDX-License-Identifier: Apache-2.0
"""The FP8 kernels against the definition: the rounded operand to the bit, y within what tensor cores add up to."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from lynx_compile.errors import InputError
from lynx_compile.ops.fp8 import E4M3, Rounded, pack, round_rows
from lynx_compile.ops.sparse_linear import (
    APART,
    GATE_FIRST,
    GELU_ERF,
    GELU_TANH,
    SILU,
    X_FIRST,
    Gated,
    Gelu,
    Norm,
    activate,
    keep_mask,
    produce,
)
from lynx_compile.passes.speed_table import FP8_WORKS, CostTable
from lynx_compile.tools import bench_fp8
from lynx_compile.tools.bench import Shape
from lynx_compile.torch_ops.bindings import DTYPES, LIBRARY
from lynx_compile.torch_ops.fp8_bindings import (
    INSTRUCTIONS,
    OPERANDS,
    Fp8Linear,
    Instructions,
    Operand,
    load_fp8_library,
    tile_count,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="needs the plugin library: make plugin"),
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load_fp8_library()


@pytest.fixture(params=list(DTYPES), ids=str)
def dtype(request: pytest.FixtureRequest, library: ctypes.CDLL) -> torch.dtype:
    if not library.lynx_fp8_runs(DTYPES[request.param]):
        pytest.skip("needs a GPU from sm_89 on and a library with FP8 GEMMs of this type for it")
    return request.param


@pytest.fixture(params=INSTRUCTIONS[1:])
def instructions(request: pytest.FixtureRequest, library: ctypes.CDLL, dtype: torch.dtype) -> Instructions:
    if tile_count(library, dtype, "dense", request.param) == 0:
        pytest.skip(
            f"this GPU has no {request.param}, or the library: README.md of plugins/ says how to build it"
        )
    return request.param


def _op(
    library: ctypes.CDLL, operand: Operand, x: torch.Tensor, out_channels: int, **options: object
) -> tuple[Fp8Linear, Rounded]:
    channels = int(options.pop("channels", x.shape[1]))  # type: ignore[call-overload]
    weight = torch.randn(out_channels, channels, device="cuda") * channels**-0.5
    keep = keep_mask(weight) if operand == "sparse weight" else None
    rounded, bias = round_rows(weight, keep), torch.randn(out_channels, device="cuda").to(x.dtype)
    return Fp8Linear(library, rounded, bias, rows=len(x), operand=operand, keep=keep, **options), rounded  # type: ignore[arg-type]


def _exact(op: Fp8Linear, weight: Rounded, z: torch.Tensor, operand: Operand) -> torch.Tensor:
    rounded = round_rows(z, keep_mask(z) if operand == "sparse activation" else None)
    product = rounded.dequantized(torch.float64) @ weight.dequantized(torch.float64).T
    return product + op.bias.double()


def _assert_rounded(op: Fp8Linear, z: torch.Tensor, operand: Operand) -> None:
    """What the last pass left is round_rows(z), to the bit, in its packed form."""
    values, metadata, scale = op.rounded()
    keep = keep_mask(z) if operand == "sparse activation" else None
    wanted = round_rows(z, keep)
    assert torch.equal(scale.view(torch.int32), wanted.scale.view(torch.int32))
    bits = wanted.values.view(torch.uint8)
    if keep is None:
        found = values.view(torch.uint8)
        assert torch.equal(found[:, : z.shape[1]], bits) and not found[:, z.shape[1] :].any()
    else:
        kept, words = pack(wanted.values, keep)
        assert torch.equal(values.view(torch.uint8), kept.view(torch.uint8)) and torch.equal(metadata, words)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize(
    ("rows", "channels", "out_channels"),
    [
        (1, 64, 8),
        (33, 208, 200),
        (129, 128, 264),
        (300, 3072, 72),
        (512, 3072, 3072),
        (130, 15360, 520),
        (77, 24576, 64),
    ],
)
def test_equals_the_definition(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    instructions: Instructions,
    operand: Operand,
    rows: int,
    channels: int,
    out_channels: int,
) -> None:
    torch.manual_seed(rows)
    x = (torch.randn(rows, channels, device="cuda") * torch.logspace(-2, 2, rows, device="cuda")[:, None]).to(
        dtype
    )
    op, weight = _op(library, operand, x, out_channels, instructions=instructions)
    wanted = _exact(op, weight, x, operand)
    bound = 2.0**-7  # of bf16, and of what the tensor cores' short sums lose at 24576 channels
    for tile in range(-1, tile_count(library, dtype, operand, instructions)):
        guarded = torch.full((rows * out_channels + 2048,), float("nan"), device="cuda", dtype=dtype)
        op.write_to(guarded[1024:-1024].view(rows, out_channels))
        y = op(x, tile).double()
        errors = (y - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert errors.max() < bound, tile
        assert torch.equal(op(x, tile).double(), y), "a second run gives other bits"
        assert guarded[:1024].isnan().all() and guarded[-1024:].isnan().all()
        _assert_rounded(op, x, operand)
        assert torch.equal(op.gemm(x, tile).double(), y)


def test_another_weight_is_noticed(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The test above must be able to fail."""
    x = torch.randn(129, 256, device="cuda").to(dtype)
    op, weight = _op(library, "sparse weight", x, 200)
    other = Rounded(weight.values.view(torch.uint8).roll(1, 0).view(E4M3), weight.scale)
    wanted = _exact(op, other, x, "sparse weight")
    assert (op(x).double() - wanted).norm() > 0.5 * wanted.norm()


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize(
    ("activation", "activation_from", "gated"),
    [
        (GELU_TANH, 320, False),
        (GELU_ERF, 0, False),
        (SILU, 320, True),
        (SILU, 0, True),
        (GELU_ERF, 64, True),
        (GELU_TANH, 448, True),
    ],
)
def test_activations_from_a_channel_on(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    instructions: Instructions,
    operand: Operand,
    activation: int,
    activation_from: int,
    gated: bool,
) -> None:
    x = torch.randn(205, 512, device="cuda").to(dtype)
    options = {"activation": activation, "activation_from": activation_from, "gated": gated}
    op, weight = _op(library, operand, x, 592, instructions=instructions, **options)
    wanted = activate(_exact(op, weight, x, operand), activation, activation_from, gated)
    shape = (205, activation_from + (592 - activation_from) // 2 if gated else 592)
    assert wanted.shape == shape
    for tile in range(tile_count(library, dtype, operand, instructions)):
        guarded = torch.full((shape[0] * shape[1] + 2048,), float("nan"), device="cuda", dtype=dtype)
        op.write_to(guarded[1024:-1024].view(shape))
        errors = (op(x, tile).double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert errors.max() < 2.0**-7, tile
        assert guarded[:1024].isnan().all() and guarded[-1024:].isnan().all()


@pytest.mark.parametrize("operand", OPERANDS)
def test_zeros_infinities_and_nans(
    library: ctypes.CDLL, dtype: torch.dtype, instructions: Instructions, operand: Operand
) -> None:
    x = torch.randn(70, 256, device="cuda").to(dtype)
    x[3], x[5, 7], x[9, 100], x[11] = 0.0, float("inf"), float("nan"), -0.0
    op, weight = _op(library, operand, x, 72, instructions=instructions)
    y = op(x)
    _assert_rounded(op, x, operand)
    assert torch.equal(y[3], op.bias) and torch.equal(y[11], op.bias)
    assert y[5].isnan().all() and y[9].isnan().all()
    fine = torch.tensor([row for row in range(70) if row not in (5, 9)], device="cuda")
    wanted = _exact(op, weight, x, operand)[fine]
    assert (y[fine].double() - wanted).norm() < 2.0**-7 * wanted.norm()


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("channels", [208, 3072, 12288, 24576])
@pytest.mark.parametrize(
    "name",
    ["layer norm", "rms norm", "gelu", "gelu by erf", "gated", "gated by the first half", "gated apart"],
)
def test_producers_are_fused(
    library: ctypes.CDLL, dtype: torch.dtype, operand: Operand, channels: int, name: str
) -> None:
    """z differs in close calls of its rounding to x's dtype, which e4m3 lets through at one value in some hundreds."""
    torch.manual_seed(channels)
    rows = 66
    halves = {"gated": X_FIRST, "gated by the first half": GATE_FIRST}.get(name, APART)
    x = torch.randn(rows, channels * (2 if halves else 1), device="cuda").to(dtype)
    gate = x if halves else torch.randn(rows, channels, device="cuda").to(dtype)
    gain, shift = (torch.randn(3, channels, device="cuda").to(dtype) for _ in range(2))
    norm = Norm(gain, shift, rms=name == "rms norm")
    gated = Gated(gate, GELU_ERF if halves == GATE_FIRST else SILU, halves)
    fused = {"gelu": Gelu(), "gelu by erf": Gelu(GELU_ERF)}.get(name, gated if "gated" in name else norm)
    z = produce(x.double(), fused).to(dtype)  # type: ignore[arg-type]
    op, weight = _op(library, operand, x, 136, producer=fused, channels=channels)
    wanted = _exact(op, weight, z, operand)
    assert (op(x).double() - wanted).norm() < 2.0**-5 * wanted.norm()
    values, _, scale = op.rounded()
    keep = keep_mask(z) if operand == "sparse activation" else None
    due = round_rows(z, keep)
    assert torch.allclose(scale, due.scale, rtol=2.0**-6)
    due_values = pack(due.values, keep)[0] if keep is not None else due.values
    differs = values[:rows, : due_values.shape[1]].float() != due_values[:rows].float()
    assert differs.float().mean() < 0.1


def test_wrong_arguments_are_refused(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = torch.randn(64, 256, device="cuda").to(dtype)
    op, _ = _op(library, "dense", x, 72, activation=GELU_TANH, activation_from=8)  # no multiple of 64
    with pytest.raises(InputError, match="CUDA error 1"):
        op(x)
    with pytest.raises(InputError, match="should be"):
        op(x[:, :128])


def test_bench_measures_every_form(library: ctypes.CDLL, tmp_path: Path) -> None:
    if not library.lynx_fp8_runs(DTYPES[torch.bfloat16]):
        pytest.skip("needs a GPU of compute capability 9.0 and a library with FP8 GEMMs of bf16")
    shape = Shape("FLUX.1-dev", "ff down", 512, 3072, 3072, "gelu")
    measured = bench_fp8.bench_fp8([shape], rounds=3)
    (result,) = measured.results
    assert all(error < bench_fp8.TOLERANCE for error in result.errors.values()) and len(result.errors) == 5
    table = CostTable.load(bench_fp8.save(measured, tmp_path)[0])
    for form in FP8_WORKS:
        assert table.gain(512, 3072, 3072, form, 0) == result.ratios[FP8_WORKS[form]]
    assert table.architecture == "sm90"
