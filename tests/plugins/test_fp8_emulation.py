# SPDX-License-Identifier: Apache-2.0
"""The FP8 rounding pass and the GEMMs by mma, their device code run on the CPU, make what ops/fp8.py defines.

The pass to the bit; the GEMMs but for the rounding of y. Those of CUTLASS, by wgmma, have a stand-in
(plugins/tests/emulation/fp8_gemm.cpp) that reads the operands as the tensor cores do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lynx_compile.ops.fp8 import E4M3, Rounded, fp8_linear, pack, pack_dense, round_rows
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
    keep_mask,
    produce,
)
from lynx_compile.torch_ops.bindings import DTYPES
from lynx_compile.torch_ops.fp8_bindings import INSTRUCTIONS, OPERANDS, Operand, _Fp8Call, declare, tile_count

from .native import PLUGINS, compile_cpp

pytestmark = pytest.mark.slow  # half a minute of g++
OUT_CHANNELS = 72
INVALID_VALUE, MISALIGNED, NOT_SUPPORTED = 1, 716, 801  # CUDA's
EMULATED = "LYNX_EMULATED_FP8"  # in the environment: a library of ``emulated``, of other kernels
GUARD = 4096  # bytes around the workspace that nothing may touch
Epilogue = Mapping[str, int | bool]  # arguments of fp8_linear
GATED: dict[str, int | bool] = {"activation": SILU, "activation_from": 64, "gated": True}
BUILT = ("MMA_BF16", "MMA_FP16", "WGMMA_BF16", "WGMMA_FP16")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if given := os.environ.get(EMULATED):
        library = ctypes.CDLL(given)
        declare(library)
        return library
    return emulated(
        tmp_path_factory.mktemp("emulation") / "emulated.so", *(f"-DLYNX_FP8_{it}" for it in BUILT)
    )


def emulated(output: Path, *options: str, kernels: Path = PLUGINS / "kernels") -> ctypes.CDLL:
    """The FP8 functions with the kernels on the CPU."""
    tests = PLUGINS / "tests"
    sources = [
        *(
            tests / "emulation" / f"{name}.cpp"
            for name in ("emulation", "fp8_round", "fp8_gemm", "fp8_gemm_sm89")
        ),
        *(kernels / f"{name}.cpp" for name in ("fp8_gemm", "fp8_linear")),
    ]
    command = ["-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-DLYNX_FP8", *options, *map(str, sources)]
    includes = (f"-iquote{kernels.parent}", f"-I{tests / 'emulation'}")
    library = ctypes.CDLL(str(compile_cpp(PLUGINS / "fp8_c_api.cpp", output, *includes, *command)))
    declare(library)
    return library


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends at a page that no one may touch, but for up to 15 bytes."""
    size = -(-tensor.nbytes // 16) * 16
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    address = copy.data_ptr() - (whole - size) + whole
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
    return copy.view(tensor.shape).copy_(tensor)


class Run:
    """One call of the op with random weights: y, and what the pass left in the workspace."""

    def __init__(
        self,
        library: ctypes.CDLL,
        x: torch.Tensor,
        channels: int,
        operand: Operand,
        out_channels: int = OUT_CHANNELS,
        **fields: object,
    ) -> None:
        weight = torch.randn(out_channels, channels) * channels**-0.5
        keep = keep_mask(weight) if operand == "sparse weight" else None
        self.weight, self.bias = round_rows(weight, keep), torch.randn(out_channels).to(x.dtype)
        packed = (pack_dense(self.weight.values),) if keep is None else pack(self.weight.values, keep)
        packed = tuple(map(fenced, packed))
        scale, bias = fenced(self.weight.scale), fenced(self.bias)
        self.pruned, self.rows, self.width = operand == "sparse activation", len(x), -(-channels // 128) * 128
        call = _Fp8Call(
            fp16=DTYPES[x.dtype], operand=OPERANDS.index(operand), rows=len(x), channels=channels,
            out_channels=out_channels, tile=-1, x=x.data_ptr(), weight=packed[0].data_ptr(),
            metadata=packed[1].data_ptr() if keep is not None else 0,
            weight_scale=scale.data_ptr(), bias=bias.data_ptr(),
        )  # fmt: skip
        for name, value in fields.items():
            setattr(
                call,
                name.removeprefix("call_"),
                value.data_ptr() if isinstance(value, torch.Tensor) else value,
            )
        if call.gated:
            out_channels = call.activation_from + (out_channels - call.activation_from) // 2
        self.y = fenced(torch.full((len(x), out_channels), torch.nan, dtype=x.dtype))
        size = library.lynx_fp8_workspace_bytes(call)
        whole = torch.full((size + 2 * GUARD + 256,), 0xA5, dtype=torch.uint8)
        start = -(-(whole.data_ptr() + GUARD) // 256) * 256 - whole.data_ptr()
        self.workspace = whole[start : start + size]
        call.y, call.workspace = self.y.data_ptr(), self.workspace.data_ptr()
        self.error = library.lynx_fp8_linear(call, None)
        assert (whole[:start] == 0xA5).all() and (whole[start + size :] == 0xA5).all()

    def rounded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        padded = -(-self.rows // 64) * 64
        sizes = (
            (padded * self.width // 2, padded * self.width // 8)
            if self.pruned
            else (self.rows * self.width, 0)
        )
        second = -(-sizes[0] // 256) * 256
        third = second + -(-sizes[1] // 256) * 256
        values = self.workspace[: sizes[0]].view(-1, self.width // 2 if self.pruned else self.width)
        metadata = self.workspace[second : second + sizes[1]].view(torch.int32)
        if self.pruned:
            metadata = metadata.view(-1, padded, 4)
        return values, metadata, self.workspace[third : third + 4 * self.rows].view(torch.float32)


def _assert_rounded(run: Run, z: torch.Tensor) -> None:
    values, metadata, scale = run.rounded()
    keep = keep_mask(z) if run.pruned else None
    wanted = round_rows(z, keep)
    fine = wanted.scale.isfinite()
    assert torch.equal(scale[fine], wanted.scale[fine]) and scale[~fine].isnan().all()
    if keep is None:
        due, due_metadata = pack_dense(wanted.values), None
    else:
        due, due_metadata = pack(wanted.values, keep)
        assert torch.equal(metadata, due_metadata)
    rows = torch.ones(len(values), dtype=torch.bool)
    rows[: len(fine)] = fine
    assert torch.equal(values[rows], due.view(torch.uint8)[rows])
    assert values[~rows].view(E4M3).float()[:, : z.shape[1] // 2].isnan().all()


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize(
    ("rows", "channels"), [(1, 64), (70, 192), (17, 528), (5, 4112), (3, 10256), (2, 20496), (1, 32768)]
)
def test_equals_the_definition(
    library: ctypes.CDLL, dtype: torch.dtype, operand: Operand, rows: int, channels: int
) -> None:
    torch.manual_seed(rows)
    x = (torch.randn(rows, channels) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    runs = []
    for reverse in (0, 1):
        library.lynx_emulate(90, reverse)
        torch.manual_seed(7)
        run = Run(library, x, channels, operand)
        assert run.error == 0
        _assert_rounded(run, x)
        wanted = fp8_linear(x.double(), run.weight, run.bias.double(), prune=run.pruned)
        # The scale of x in float64 is that of its float32, so that y is off by its own rounding alone.
        assert torch.allclose(run.y.double(), wanted, rtol=2.0**-8, atol=2.0**-20 * float(wanted.abs().max()))
        runs.append(run)
    assert torch.equal(runs[0].y, runs[1].y), "threads in another order leave other bytes"


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_zeros_ties_infinities_and_nans(library: ctypes.CDLL, dtype: torch.dtype, operand: Operand) -> None:
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (70, 256)).div(2).to(dtype)  # ties, in the selection and in the rounding
    x[3], x[5, 7], x[9, 100], x[11], x[20] = 0.0, float("inf"), float("nan"), -0.0, torch.finfo(dtype).tiny
    library.lynx_emulate(90, 0)
    run = Run(library, x, 256, operand)
    _assert_rounded(run, x)
    assert torch.equal(run.y[3], run.bias) and torch.equal(run.y[11], run.bias)
    assert run.y[5].isnan().all() and run.y[9].isnan().all()
    assert run.y[[row for row in range(70) if row not in (5, 9)]].isfinite().all()


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("channels", [208, 4112, 10256, 20496])
@pytest.mark.parametrize(
    "name",
    ["layer norm", "rms norm", "gelu", "gelu by erf", "gated", "gated by the first half", "gated apart"],
)
def test_producers_are_fused(library: ctypes.CDLL, operand: Operand, channels: int, name: str) -> None:
    """z itself is known up to close calls of its rounding to bf16, in a value in hundreds."""
    torch.manual_seed(channels)
    rows = 6
    halves = {"gated": X_FIRST, "gated by the first half": GATE_FIRST}.get(name, APART)
    x = torch.randn(rows, channels * (2 if halves else 1)).bfloat16()
    gate, activation = (
        x if halves else torch.randn(rows, channels).bfloat16(),
        GELU_ERF if halves == GATE_FIRST else SILU,
    )
    gated = {"producer": 3, "producer_activation": activation, "halves": halves, "gate": gate}
    gain, shift = (torch.randn(3, channels).bfloat16() for _ in range(2))
    norm = {"producer": 1, "epsilon": 1e-6, "gain_rows": 3, "gain": gain, "shift": shift}
    fields, producer = {
        "layer norm": (norm, Norm(gain, shift)),
        "rms norm": (norm | {"rms": 1}, Norm(gain, shift, rms=True)),
        "gelu": ({"producer": 2, "producer_activation": GELU_TANH}, Gelu()),
        "gelu by erf": ({"producer": 2, "producer_activation": GELU_ERF}, Gelu(GELU_ERF)),
    }.get(name, (gated, Gated(gate.double(), activation, halves)))
    z = produce(x.double(), producer).bfloat16()  # type: ignore[arg-type]
    for reverse in (0, 1):
        library.lynx_emulate(90, reverse)
        run = Run(library, x, channels, operand, **fields)  # type: ignore[arg-type]
        wanted = fp8_linear(z.double(), run.weight, run.bias.double(), prune=run.pruned)
        assert (run.y.double() - wanted).norm() < 2.0**-6 * wanted.norm()
        values, _, scale = run.rounded()
        keep = keep_mask(z) if run.pruned else None
        due = round_rows(z, keep)
        assert torch.allclose(scale, due.scale, rtol=2.0**-7)
        packed = pack_dense(due.values) if keep is None else pack(due.values, keep)[0]
        assert (values[:rows] != packed.view(torch.uint8)[:rows]).float().mean() < 0.02


def check_mma(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    operand: Operand,
    tile: int,
    shape: tuple[int, int, int],
    epilogue: Epilogue,
) -> None:
    """shape: tokens, channels, rows of the weight."""
    rows, channels, out_channels = shape
    fields = {key: int(value) for key, value in epilogue.items()}
    torch.manual_seed(rows)
    x = (torch.randn(rows, channels) * torch.logspace(-1, 1, rows)[:, None]).to(dtype)
    runs = []
    for reverse in (0, 1):
        library.lynx_emulate(89, reverse)
        torch.manual_seed(7)
        run = Run(library, x, channels, operand, out_channels, tile=tile, **fields)
        assert run.error == 0
        wanted = fp8_linear(
            x.double(),
            run.weight,
            run.bias.double(),
            prune=run.pruned,
            **epilogue,  # type: ignore[arg-type]
        )
        # GELU in float32, of y with the float32 sums' error: off by more than y's rounding near its zeros.
        assert torch.allclose(run.y.double(), wanted, rtol=2.0**-8, atol=2.0**-19 * float(wanted.abs().max()))
        runs.append(run)
    assert torch.equal(runs[0].y, runs[1].y), "threads in another order leave other bytes"


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("tile", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "shape", "epilogue"),
    [
        (torch.bfloat16, (1, 64, 8), {}),
        (torch.bfloat16, (150, 208, 328), {"activation": GELU_TANH, "activation_from": 192}),
        (torch.bfloat16, (210, 640, 72), {"activation": GELU_ERF}),
        (torch.bfloat16, (17, 1168, 600), {}),
        (torch.bfloat16, (150, 208, 336), GATED),
        (torch.float16, (150, 208, 336), GATED | {"activation": GELU_TANH}),
        (torch.float16, (17, 208, 272), {"activation": GELU_ERF, "gated": True}),
    ],
)
def test_mma_equals_the_definition(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    operand: Operand,
    tile: int,
    shape: tuple[int, int, int],
    epilogue: Epilogue,
) -> None:
    """Of one tile and of many, of full and of cut ones, of as many stages as there are, fewer and more."""
    library.lynx_emulate(89, 0)
    assert tile_count(library, dtype, operand) == 3
    check_mma(library, dtype, operand, tile, shape, epilogue)


def test_instructions_by_device(library: ctypes.CDLL) -> None:
    """mma from sm_89 on, where it is slow only if asked; wgmma on sm_90 alone; both give the same."""
    x = torch.randn(65, 256).bfloat16()
    results = {}
    for capability, instructions, error in (
        (89, "fastest", 0), (89, "mma", 0), (89, "wgmma", NOT_SUPPORTED), (90, "mma", 0), (90, "wgmma", 0),
        (90, "fastest", 0), (120, "fastest", 0), (86, "mma", NOT_SUPPORTED), (86, "fastest", NOT_SUPPORTED),
        (100, "fastest", NOT_SUPPORTED), (100, "mma", 0), (121, "fastest", 0),
    ):  # fmt: skip
        library.lynx_emulate(capability, 0)
        torch.manual_seed(3)
        run = Run(library, x, 256, "sparse weight", set=INSTRUCTIONS.index(instructions))
        assert run.error == error, (capability, instructions)
        assert (tile_count(library, x.dtype, "dense", instructions) == 0) == (error != 0)
        results[capability, instructions] = run
    mma, wgmma = results[90, "mma"], results[90, "wgmma"]
    assert torch.allclose(mma.y.float(), wgmma.y.float(), rtol=2.0**-7, atol=1e-4)
    assert len(mma.workspace) < len(wgmma.workspace), "mma has no use for the partial sums of stream-K"
    assert len(results[90, "fastest"].workspace) == len(wgmma.workspace)
    for other in ((89, "fastest"), (120, "fastest"), (89, "mma")):
        assert torch.equal(results[other].y, mma.y) and len(results[other].workspace) == len(mma.workspace)


def test_another_weight_is_noticed(library: ctypes.CDLL) -> None:
    """The comparisons above must be able to fail."""
    x = torch.randn(70, 192).bfloat16()
    library.lynx_emulate(90, 0)
    run = Run(library, x, 192, "sparse weight")
    other = Rounded(run.weight.values.view(torch.uint8).roll(1, 0).view(E4M3), run.weight.scale)
    wanted = fp8_linear(x.double(), other, run.bias.double())
    assert (run.y.double() - wanted).norm() > 0.5 * wanted.norm()
    with pytest.raises(AssertionError):
        _assert_rounded(run, x * 1.01)


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (INVALID_VALUE, {"call_channels": 200}), (INVALID_VALUE, {"call_channels": 32784}),
        (INVALID_VALUE, {"rows": 0}),
        (INVALID_VALUE, {"out_channels": 12}), (INVALID_VALUE, {"activation": 1, "activation_from": 8}),
        (INVALID_VALUE, {"activation": 3}), (INVALID_VALUE, {"gated": 1}), (INVALID_VALUE, {"metadata": 0}),
        (INVALID_VALUE, {"activation": 3, "gated": 1}),  # of 72 rows
        (INVALID_VALUE, {"producer": 2}), (INVALID_VALUE, {"producer": 3, "producer_activation": 3}),
        (INVALID_VALUE, {"weight_scale": 0}), (INVALID_VALUE, {"producer": 1}), (INVALID_VALUE, {"tile": 4}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(library: ctypes.CDLL, error: int, fields: dict[str, int]) -> None:
    library.lynx_emulate(90, 0)
    x = torch.randn(64, 256).bfloat16()
    assert Run(library, x, 256, "sparse weight", **fields).error == error


def test_other_gpus_and_misaligned_tensors_are_refused(library: ctypes.CDLL) -> None:
    x = torch.randn(65, 256).bfloat16()
    library.lynx_emulate(80, 0)
    assert Run(library, x[1:], 256, "dense").error == NOT_SUPPORTED
    library.lynx_emulate(90, 0)
    assert Run(library, x.flatten()[1:-255].view(64, 256), 256, "dense").error == MISALIGNED
