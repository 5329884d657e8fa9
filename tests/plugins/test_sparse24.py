# SPDX-License-Identifier: Apache-2.0
"""plugins/kernels/sparse24.h means what lynx_compile/ops/sparse_linear.py means, bit by bit, and what CUTLASS does."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lynx_compile.ops.sparse_linear import keep_mask, norm_scale_of, padded_width, scale_of_norms
from lynx_compile.ops.sparse_weight_linear import MetadataLayout, pack_weight

from .native import PLUGINS, WARNINGS, compile_cpp, header_folder, run_native

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pruned:
    values: torch.Tensor  # [rows, channels / 2]
    metadata: np.ndarray  # uint16 [rows, channels / 16]
    scale: torch.Tensor  # float32 [rows]

    def keep(self) -> torch.Tensor:
        """The mask that the metadata spell: bool [rows, channels]."""
        nibbles = self.metadata[..., None] >> np.arange(0, 16, 4) & 15  # [rows, blocks, 4]
        keep = np.zeros((*nibbles.shape, 4), bool)
        for position in (nibbles & 3, nibbles >> 2):
            np.put_along_axis(keep, position[..., None].astype(np.int64), True, -1)
        return torch.from_numpy(keep.reshape(len(keep), -1))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("native") / "sparse24.so"
    library = ctypes.CDLL(
        str(compile_cpp(PLUGINS / "tests/sparse24_c.cpp", output, "-O2", "-shared", "-fPIC", *WARNINGS))
    )
    library.lynx_padded_width.restype = ctypes.c_int64
    library.lynx_padded_width.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return library


def prune(native: ctypes.CDLL, x: torch.Tensor) -> Pruned:
    rows, channels = x.shape
    out = Pruned(
        x.new_empty(rows, channels // 2),
        np.empty((rows, channels // 16), np.uint16),
        torch.empty(rows, dtype=torch.float32),
    )
    code = native.lynx_prune(
        ctypes.c_int(x.dtype == torch.bfloat16),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(channels),
        ctypes.c_void_p(out.values.data_ptr()),
        ctypes.c_void_p(out.metadata.ctypes.data),
        ctypes.c_void_p(out.scale.data_ptr()),
    )
    assert code == 0
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def inputs(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of normal values, few-valued rows (ties), zeros of both signs, infinities, NaNs, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 192, generator=generator)
    x[100:200] = torch.randint(-2, 3, (100, 192), generator=generator).float()
    x[200:210] = 0.0
    x[205] = -0.0
    x[210:260] *= torch.finfo(dtype).tiny  # half of them subnormal
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, -1.0])
    x[260:360] = edges[torch.randint(0, len(edges), (100, 192), generator=generator)]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_equals_the_definition(native: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = inputs(dtype)
    found = prune(native, x)
    keep = keep_mask(x)
    assert torch.equal(found.keep(), keep)
    assert torch.equal(bits(found.values).flatten(), bits(x)[keep])
    scale = norm_scale_of(x, keep).flatten()
    # 192 squares summed in float32, not float64: 192 roundings of 2^-24, at random 14, halved by the root.
    torch.testing.assert_close(found.scale, scale, rtol=1e-6, atol=0, equal_nan=True)


def test_norm_scale_of_given_norms(native: ctypes.CDLL) -> None:
    kept = torch.cat([torch.logspace(-36, 36, 4096), torch.tensor([0.0, 0.0, torch.inf, torch.nan, 1e-30])])
    more = torch.rand(len(kept), generator=torch.Generator().manual_seed(2))
    all_ = torch.where(kept == 0.0, torch.tensor(0.0), kept * (1.0 + more))
    found = torch.empty(len(kept))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (all_, kept, found)]
    native.lynx_norm_scale(*pointers[:2], ctypes.c_int64(len(kept)), pointers[2])
    torch.testing.assert_close(found, scale_of_norms(all_, kept), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_group_of_small_patterns(native: ctypes.CDLL, dtype: torch.dtype) -> None:
    """All 12^4 groups of twelve values that differ by sign or by one unit in the last place."""
    one = torch.ones(1, dtype=dtype).view(torch.int16).item()
    pool = torch.tensor([0, 1, 2, one - 1, one, one + 1], dtype=torch.int16).view(dtype)
    pool = torch.cat([pool, -pool])
    x = torch.cartesian_prod(*[torch.arange(len(pool))] * 4)
    x = pool[x].reshape(-1, 64)
    found = prune(native, x)
    assert torch.equal(found.keep(), keep_mask(x))


@pytest.mark.parametrize("layout", [80, 90])
@pytest.mark.parametrize(("out_channels", "channels"), [(64, 64), (128, 192), (192, 128), (72, 320)])
def test_packed_weights_are_those_of_the_kernels(
    native: ctypes.CDLL, out_channels: int, channels: int, layout: MetadataLayout
) -> None:
    """Word by word: values and nibbles against compress_block, places against Sm80Metadata and Sm90Metadata<64>."""
    rows = -(-out_channels // 64) * 64
    weight = torch.zeros(rows, channels, dtype=torch.bfloat16)
    weight[:out_channels] = torch.randn(out_channels, channels, generator=torch.Generator().manual_seed(3))
    pruned = prune(native, weight)
    words = np.full(rows * channels // 32, 0xDEADBEEF, np.uint32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (pruned.metadata, words)]
    code = native.lynx_lay_out(
        ctypes.c_int(layout), pointers[0], ctypes.c_int64(rows), ctypes.c_int64(channels), pointers[1]
    )
    assert code == 0
    values, metadata = pack_weight(weight[:out_channels], keep_mask(weight[:out_channels]), layout)
    assert torch.equal(bits(values), bits(pruned.values))
    np.testing.assert_array_equal(metadata.numpy().view(np.uint32).flatten(), words)


def test_padded_width(native: ctypes.CDLL) -> None:
    for channels, rank in itertools.product(range(16, 400, 16), range(0, 129, 16)):
        assert native.lynx_padded_width(channels, rank) == padded_width(channels, rank)


def test_host_checks(tmp_path: Path) -> None:
    """Selection, packing, 16-bit floats and metadata addresses against independent C++ statements of them."""
    run_native(compile_cpp(PLUGINS / "tests/host_test.cpp", tmp_path / "host_test", "-O2", *WARNINGS))


def test_layouts_are_those_of_cutlass(tmp_path: Path) -> None:
    """Metadata layouts of sm_80 and sm_90 against CUTLASS's own host code."""
    cutlass = header_folder("include/cutlass/cutlass.h", "cutlass_library/source")
    cuda = header_folder("cuda_runtime.h", "nvidia/cu13/include")
    options = [
        f"-I{cutlass / 'include'}",
        f"-I{cutlass / 'tools/util/include'}",
        f"-I{cuda}",
        f"-I{cuda / 'cccl'}",
    ]
    runtime = [
        f"-L{cuda.parent / 'lib'}",
        f"-L{cuda.parent / 'lib64'}",
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
    ]
    # CUTLASS's headers are written for nvcc; g++ takes them with -fpermissive.
    source = PLUGINS / "tests/cutlass_layout_test.cpp"
    run_native(compile_cpp(source, tmp_path / "layouts", "-O1", "-w", "-fpermissive", *options, *runtime))
