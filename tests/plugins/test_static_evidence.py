# SPDX-License-Identifier: Apache-2.0
"""plugins/tests/static_evidence.py finds the built library in order, and notices what is not."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lynx_compile.passes import verify
from plugins.tests import static_evidence as evidence
from plugins.tests.static_evidence import Kernel, Role, Tile

from .native import LIBRARY, PLUGINS, require_gxx

ELEMENT_NAMES = {"bf16": ("Bf16", "bfloat16_t", ".BF16"), "fp16": ("Fp16", "half_t", "")}
METADATA = {"80": "Sm80Metadata", "90": "Sm90Metadata<64>"}


def finish_kernel(arch: str, element: str, layout: str) -> Kernel:
    name = ELEMENT_NAMES[element][0]
    return Kernel(arch, f"finish_kernel<lynx::{name}, lynx::{METADATA[layout]}>", 40, 0, 8256)


def prune_kernel(arch: str, element: str, layout: str, rank: int, variant: int) -> Kernel:
    name, _, suffix = ELEMENT_NAMES[element]
    arguments = f"lynx::{name}, lynx::{METADATA[layout]}, {rank}"
    name = f"prune_kernel<{arguments}, (lynx::(anonymous namespace)::Variant){variant}>"
    opcodes = Counter({f"HMMA.16816.F32{suffix}": min(rank, 64) // 2})
    return Kernel(arch, name, 80, 0, 1088 + 512 * rank // 2, opcodes)


def gemm_kernel(arch: str, element: str, tile: Tile, operand: str) -> Kernel:
    _, name, suffix = ELEMENT_NAMES[element]
    weight = operand == "weight"
    if arch == "90a":
        shape = ", ".join(f"cute::C<{extent}>" for extent in (tile.m, tile.n, tile.k))
        cluster = "cute::tuple<cute::C<2>, cute::C<1>, cute::C<1> >"
        name = (
            f"MainloopSm90TmaGmmaWarpSpecializedSparse<{tile.stages}, {cluster}, "
            f"cutlass::gemm::KernelTmaWarpSpecializedCooperative>, cute::tuple<{shape} >, cutlass::{name}, "
            + (
                "lynx::GatedStore<"
                if operand == "gated"
                else f"lynx::GeluFrom<cutlass::{name}, {int(not weight)}>"
            )
        )
        turned = Counter({"MOVM.16.MT88": 16} if operand == "gated" else {})
        products = Counter({f"HGMMA.SP.64x{tile.n}x32.F32{suffix}": 2})
        return Kernel(arch, name, 168, 0, 1024, products + turned)
    epilogue = "TransposedEpilogue<" if weight else "ActivatedStore<"
    shape = f"cutlass::gemm::GemmShape<{tile.m}, {tile.n}, {tile.k}>"
    name = f"SparseMmaMultistage<{shape}, cutlass::{name}, lynx::{epilogue}"
    turned = Counter({"MOVM.16.MT88": 64} if weight else {})
    return Kernel(arch, name, 252, 0, 0, Counter({f"HMMA.SP.16832.F32{suffix}": 64}) + turned)


def fp8_kernel(element: str, operand: str, tile: str, gated: bool = False, promoted: bool = False) -> Kernel:
    _, name, _ = ELEMENT_NAMES[element]
    m, n = tile.split()[0].split("x")
    sparse = "" if operand == "dense" else "Sparse"
    cluster = "cute::tuple<cute::C<1>, cute::C<1>, cute::C<1> >"
    sums, fast = ("FP8", "") if promoted else ("", "FP8FastAccum")
    name = (
        f"MainloopSm90TmaGmmaWarpSpecialized{sparse}{sums}<4, {cluster}, cutlass::gemm::KernelTmaWarpSpecialized"
        f"Cooperative{fast}>, cute::tuple<cute::C<{m}>, cute::C<{n}>, cute::C<128> >, cutlass::float_e4m3_t, "
        f"lynx::{'Fp8Finish' if gated else 'GeluFrom'}<cutlass::{name}, {int(operand == 'activation')}>"
    ) + (", lynx::StreamK" if "stream-K" in tile else "")
    opcode = f"QGMMA{'.SP' if sparse else ''}.64x{n}x{64 if sparse else 32}.F32.E4M3.E4M3"
    turned = Counter({"MOVM.16.MT88": 48} if gated and operand != "activation" else {})
    return Kernel("90a", name, 168, 0, 1024, Counter({opcode: 8}) + turned)


def fp8_mma_kernel(arch: str, element: str, operand: str, tile: int) -> Kernel:
    number = evidence.FP8_OPERANDS.index(operand)
    name = f"fp8_mma_kernel<lynx::{ELEMENT_NAMES[element][0]}, (lynx::Fp8Operand){number}, {tile}>"
    opcode = "QMMA.16832.F32.E4M3.E4M3" if operand == "dense" else "QMMA.SP.16864.F32.E4M3.E4M3"
    return Kernel(arch, name, 218, 0, 0, Counter({opcode: 64}))


def round_kernel(arch: str, element: str, make: int, pruned: bool, blocks: int) -> Kernel:
    make_of = f"(lynx::(anonymous namespace)::Make){make}"
    name = f"round_kernel<lynx::{ELEMENT_NAMES[element][0]}, {make_of}, {str(pruned).lower()}, {blocks}>"
    return Kernel(arch, name, 80, 0, 1120)


@pytest.fixture
def kernels() -> list[Kernel]:
    """A library for sm_80 and sm_90a, and in FP8 for sm_89, in order."""
    out = []
    for element in evidence.ELEMENTS:
        for arch, layout in (("80", "80"), ("90", "90")):
            out.append(finish_kernel(arch, element, layout))
            out += [
                prune_kernel(arch, element, layout, rank, variant)
                for rank in evidence.RANKS
                for variant in range(len(evidence.VARIANTS))
            ]
        for operand in evidence.OPERANDS:
            out += [gemm_kernel("80", element, tile, operand) for tile in evidence.MMA_TILES]
        for operand in (*evidence.OPERANDS, "gated"):
            out += [gemm_kernel("90a", element, tile, operand) for tile in evidence.WGMMA_TILES]
        out += [fp8_kernel(element, operand, tiles[0], True) for operand, tiles in evidence.FP8_TILES.items()]
        out += [fp8_mma_kernel("89", element, operand, 0) for operand in evidence.FP8_OPERANDS]
        out += [
            round_kernel(arch, element, make, pruned, blocks)
            for arch in ("89", "90a")
            for make in range(len(evidence.MAKES))
            for pruned in (False, True)
            for blocks in evidence.ROUND_BLOCKS
        ]
    return out


def test_library_in_order_passes(kernels: list[Kernel]) -> None:
    assert evidence.check(kernels) == []


def test_one_fp8_tile_or_all(kernels: list[Kernel]) -> None:
    more = [
        fp8_kernel(element, operand, tile, gated)
        for element in evidence.ELEMENTS
        for operand, tiles in evidence.FP8_TILES.items()
        for tile in tiles
        for gated in (False, True)
        if (tile, gated) != (tiles[0], True)
    ]
    promoted = [
        fp8_kernel(element, operand, tile, promoted=True)
        for element in evidence.ELEMENTS
        for operand, tiles in evidence.PROMOTED_TILES.items()
        for tile in tiles
    ]
    assert evidence.check([*kernels, *more, *promoted]) == []
    assert any("neither one nor all" in each for each in evidence.check([*kernels, *more]))
    assert any("neither one nor all" in each for each in evidence.check([*kernels, more[0]]))
    ungated = [kernel for kernel in kernels if "Fp8Finish" not in kernel.name]
    assert any("neither one nor all" in each for each in evidence.check(ungated))
    more = [
        fp8_mma_kernel("89", element, operand, tile)
        for element in evidence.ELEMENTS
        for operand in evidence.FP8_OPERANDS
        for tile in (1, 2)
    ]
    assert evidence.check([*kernels, *more]) == []
    assert any("sm_89: neither one nor all" in each for each in evidence.check([*kernels, more[0]]))


def test_one_wgmma_tile_or_all(kernels: list[Kernel]) -> None:
    def tile_of(kernel: Kernel) -> Tile | None:
        role = evidence.role_of(kernel.name)
        return role.tile if role and role.family == "wgmma.sp" else None

    first, *others = evidence.WGMMA_TILES
    one = [kernel for kernel in kernels if tile_of(kernel) not in others]
    assert evidence.check(one) == []
    more = next(kernel for kernel in kernels if tile_of(kernel) == others[-1])
    assert any("kernels where 1" in each for each in evidence.check([*one, more]))
    none = [kernel for kernel in one if tile_of(kernel) != first or "GatedStore" not in kernel.name]
    wrong = evidence.check(none)
    assert [each.split(":")[0] for each in wrong] == [
        f"sm_90a wgmma.sp {element} 128x256x64 gated" for element in evidence.ELEMENTS
    ]


def test_fp8_by_mma_goes_with_its_architectures(kernels: list[Kernel]) -> None:
    of_ada = [replace(kernel, arch="89") for kernel in kernels if kernel.arch == "80"]
    assert evidence.check([*kernels, *of_ada]) == []
    no_fp8 = [kernel for kernel in kernels if "fp8_mma" not in kernel.name]
    wrong = evidence.check([*no_fp8, *of_ada])
    assert any("sm_89: neither one nor all fp8 mma GEMMs of fp16: none" in each for each in wrong)


PRUNE = "prune bf16 layout 80 rank 64 plain"
FP8, FP8_MMA = "fp8 bf16 weight 256x192 gated", "fp8 mma fp16 weight 256x128"
MMA, WGMMA = "mma.sp fp16 128x128x64 weight", "wgmma.sp bf16 256x192x64 activation"


@pytest.mark.parametrize(
    ("title", "doctored", "reason"),
    [
        (PRUNE, {"stack": 4}, "4 bytes of stack"),
        (PRUNE, {"registers": 136}, "2 thread blocks take 69632 registers"),
        (PRUNE, {"shared": 82 * 1024}, "2 thread blocks take 169984 bytes"),
        (PRUNE, {"opcodes": Counter()}, "fewer than 32 HMMA of bf16"),
        (PRUNE, {"opcodes": Counter({"HMMA.16816.F32": 64})}, "fewer than 32 HMMA of bf16"),
        (PRUNE, {"opcodes": Counter({"HMMA.16816.F32.BF16": 64, "STL.64": 1})}, "accesses to local memory"),
        (PRUNE, {"name": "foo()"}, "unknown kernel foo()"),
        (MMA, {"opcodes": Counter({"HMMA.16816.F32": 64})}, "no HMMA.SP of fp16"),
        (MMA, {"opcodes": Counter({"HMMA.SP.16832.F32.BF16": 64})}, "no HMMA.SP of fp16"),
        (MMA, {"opcodes": Counter({"HMMA.SP.16832.F16": 64})}, "no HMMA.SP of fp16 with float32"),
        (MMA, {"opcodes": Counter({"HMMA.SP.16832.F32": 64, "HMMA.16816.F32": 1})}, "dense tensor-core"),
        (MMA, {"opcodes": Counter({"HMMA.SP.16832.F32": 64})}, "no MOVM"),
        *(
            (
                MMA,
                {
                    "opcodes": Counter(
                        {"HMMA.SP.16832.F32": 64, "MOVM.16.MT88": 63, apart + "MOVM.16.MT88": 1}
                    )
                },
                "a MOVM that some lanes",
            )
            for apart in ("@", "?", "@?")
        ),
        (FP8, {"opcodes": Counter({"QGMMA.64x192x32.F32.E4M3.E4M3": 8})}, "no QGMMA of e4m3"),
        (FP8, {"opcodes": Counter({"QGMMA.SP.64x192x64.F32.E4M3.E4M3": 8, "LDL": 1})}, "local memory"),
        (FP8, {"registers": 176}, "1 thread blocks take 67584 registers"),
        (FP8, {"opcodes": Counter({"QGMMA.SP.64x192x64.F32.E4M3.E4M3": 8})}, "no MOVM"),
        (FP8_MMA, {"opcodes": Counter({"QMMA.16832.F32.E4M3.E4M3": 64})}, "no QMMA of e4m3"),
        (
            FP8_MMA,
            {"opcodes": Counter({"QMMA.SP.16864.F32.E4M3.E4M3": 64, "QMMA.16832.F32.E4M3.E4M3": 1})},
            "dense tensor-core",
        ),
        (FP8_MMA, {"stack": 8}, "8 bytes of stack"),
        (FP8_MMA, {"shared": 30 * 1024}, "bytes of an SM's 102400"),
        ("round bf16 norm dense 4", {"registers": 136}, "2 thread blocks take 69632 registers"),
        (WGMMA, {"opcodes": Counter({"HGMMA.64x192x16.F32.BF16": 4})}, "no HGMMA.SP of bf16"),
        (WGMMA, {"registers": 176}, "1 thread blocks take 67584 registers"),
        (WGMMA, {"shared": 60 * 1024}, "bytes of an SM's 233472"),
    ],
)
def test_doctored_kernel_is_noticed(
    kernels: list[Kernel], title: str, doctored: dict[str, object], reason: str
) -> None:
    at = next(i for i, k in enumerate(kernels) if (role := evidence.role_of(k.name)) and role.title == title)
    kernels[at] = replace(kernels[at], **doctored)
    assert any(reason in each for each in evidence.check(kernels))


@pytest.mark.parametrize("at", [0, 1, -1])
def test_missing_kernel_is_noticed(kernels: list[Kernel], at: int) -> None:
    role = evidence.role_of(kernels.pop(at).name)
    assert role is not None
    (wrong,) = evidence.check(kernels)
    assert role.title in wrong and "where" in wrong


def test_tiles_of_as_many_stages_are_told_apart(
    kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, tall, narrow = evidence.WGMMA_TILES
    doubled = (wide, tall, replace(narrow, stages=wide.stages))
    others = [
        kernel
        for kernel in kernels
        if kernel.arch != "90a"
        or (role := evidence.role_of(kernel.name)) is None
        or role.family != "wgmma.sp"
    ]
    monkeypatch.setattr(evidence, "WGMMA_TILES", doubled)
    gemms = [
        gemm_kernel("90a", element, tile, operand)
        for element in evidence.ELEMENTS
        for operand in (*evidence.OPERANDS, "gated")
        for tile in doubled
    ]
    assert evidence.check([*others, *gemms]) == []
    of_another_operand = replace(gemms[0], name=gemms[0].name.replace(", 1>", ", 0>"))
    wrong = evidence.check([*others, of_another_operand, *gemms[1:]])
    assert any("128x256x64 activation: 0 kernels where 1" in each for each in wrong)
    assert any("128x256x64 weight: 2 kernels where 1" in each for each in wrong)


def test_an_element_type_may_do_without_wgmma(kernels: list[Kernel]) -> None:
    def of_fp16(kernel: Kernel) -> bool:
        role = evidence.role_of(kernel.name)
        assert role is not None
        return kernel.arch in ("90", "90a") and role.element == "fp16"

    assert evidence.check([kernel for kernel in kernels if not of_fp16(kernel)]) == []


def test_missing_architecture_is_noticed(kernels: list[Kernel]) -> None:
    wrong = evidence.check(k for k in kernels if k.arch != "90")
    assert any("sm_90 finish bf16 layout 90: 0 kernels where 1" in each for each in wrong)
    assert evidence.check([]) == ["the library has no GEMM"]


def test_reports_are_read() -> None:
    resources = """\
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Zone:
  REG:168 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:2688 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Ztwo:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    sass = """\
arch = sm_90a
\t\tFunction : _Zone
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
        /*19b0*/                   HGMMA.SP.64x256x32.F32.BF16 R24, gdesc[UR8], R24, R2, gsb0 ;
        /*19c0*/              @!P1 STL [R1+0x4], R7 ;                           /* 0x0000040701007387 */
        /*19e0*/              @!P2 MOVM.16.MT88 R5, R5 ;
        /*19f0*/                   BSSY B0, 0x1a20 ;
        /*19f8*/                   MOVM.16.MT88 R5, R5 ;
        /*19fc*/               @P0 BRA 0x1a10 ;
        /*1a00*/                   MOVM.16.MT88 R5, R5 ;
        /*1a10*/                   BSYNC B0 ;
        /*1a20*/                   MOVM.16.MT88 R5, R5 ;
        /*119d0*/             @UP0 HGMMA.SP.64x256x32.F32.BF16 R24, gdesc[UR4], R24, R3 ;
\t\tFunction : _Ztwo
        /*0000*/                   EXIT ;
"""
    opcodes = evidence.parse_sass(sass.splitlines())
    assert opcodes["90a", "_Zone"] == {
        "HGMMA.SP.64x256x32.F32.BF16": 2,
        "STL": 1,
        "@MOVM.16.MT88": 1,
        "?MOVM.16.MT88": 1,
        "MOVM.16.MT88": 2,
    }
    assert opcodes["90a", "_Ztwo"] == {}
    one, two = evidence.parse_resources(resources.splitlines())
    assert (one.arch, one.name, one.registers, one.stack, one.shared) == ("90a", "_Zone", 168, 12, 1024)
    assert (two.name, two.registers, two.stack) == ("_Ztwo", 32, 0)


def test_claims_are_those_of_the_sources(tmp_path: Path) -> None:
    """The tiles and the thread blocks per SM that the check goes by, compared by the compiler."""
    require_gxx()
    tiles = [
        *(f"kTiles[{i}].{name} == {getattr(tile, name)}"
          for i, tile in enumerate(evidence.MMA_TILES) for name in ("m", "n", "k", "stages")),
        *(f"kTiles[{i}].shared_bytes() == {tile.shared_bytes}" for i, tile in enumerate(evidence.MMA_TILES)),
        *(f"kTiles[{i}].m / kTiles[{i}].warp_m * (kTiles[{i}].n / kTiles[{i}].warp_n) * 32 == {tile.threads}"
          for i, tile in enumerate(evidence.MMA_TILES)),
        *(f"kTilesSm90[{i}].{name} == {getattr(tile, name)}"
          for i, tile in enumerate(evidence.WGMMA_TILES) for name in ("m", "n", "k", "stages")),
        *(f"kFp8{kind}MmaTiles[{i}].{name} == {getattr(tile, name)}"
          for i, tile in enumerate(evidence.FP8_MMA_TILES)
          for kind in ("Sparse", "Dense") for name in ("m", "n", "stages")),
        *(f"fp8_mma_tiles(Fp8Operand({i}))[{j}].shared_bytes({str(operand != 'dense').lower()}) == "
          f"{tile.shared_bytes(operand)}"
          for i, operand in enumerate(evidence.FP8_OPERANDS) for j, tile in enumerate(evidence.FP8_MMA_TILES)),
        *(f"fp8_mma_tiles(Fp8Operand({i}))[{j}].threads() == {evidence.FP8_MMA_THREADS}"
          for i in range(3) for j in range(3)),
        *(f"fp8_tiles(Fp8Operand({i}), Fp8Sums::k{sums})[{j}].{name} == {extent}"
          for sums, tiles in (("Fast", evidence.FP8_TILES), ("Promoted", evidence.PROMOTED_TILES))
          for i, operand in enumerate(evidence.FP8_OPERANDS) for j, tile in enumerate(tiles[operand])
          for name, extent in zip("mn", tile.split()[0].split("x"), strict=True)),
        *(f"fp8_tile_count(Fp8Operand({i})) == {len(tiles[operand])}"
          for tiles in (evidence.FP8_TILES, evidence.PROMOTED_TILES)
          for i, operand in enumerate(evidence.FP8_OPERANDS)),
        f"kPromotedWidth == {verify.PROMOTED}",
        f"kFp8MmaTiles == {len(evidence.FP8_MMA_TILES)} && int(Fp8Operand::kDense) == 1 && "
        "int(Fp8Operand::kSparseActivation) == 2",
        f"kTileConfigs == {len(evidence.MMA_TILES)} && kTileConfigsSm90 == {len(evidence.WGMMA_TILES)}",
    ]  # fmt: skip
    prune = [
        f"Warps<{rank}, Variant({i})>::{claim}"
        for rank in evidence.RANKS
        for i, variant in enumerate(evidence.VARIANTS)
        for claim in (
            f"kBlocksPerSm == {evidence.blocks_per_sm(rank, variant)}",
            f"kThreads == {evidence.prune_threads(rank)}",
            f"kRanks == {min(rank, evidence.RANKS_OF_A_WARP)}",
        )
    ]
    prune += [f"Variant::k{name.title()} == Variant({i})" for i, name in enumerate(evidence.VARIANTS)]
    prune.append(f"kFinishThreads == {evidence.FINISH_THREADS}")
    asserts = "\n".join(f"static_assert({claim});" for claim in [*tiles, *prune])
    source = tmp_path / "claims.cpp"
    source.write_text(
        '#include "device.h"\n#include "kernels/fp8_tiles_sm89.h"\n#include "kernels/prune_tokens.cuh"\n'
        f"namespace lynx {{\nnamespace {{\n{asserts}\n}}\n}}\n"
    )
    includes = [f"-I{PLUGINS}", f"-I{PLUGINS / 'tests' / 'emulation'}"]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wno-unknown-pragmas", *includes, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.slow
def test_built_library_is_in_order() -> None:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built (cmake -S plugins -B build/plugin)")
    if evidence.find_tools() is None:
        pytest.skip("cuobjdump is not installed (pip install --no-deps -r requirements/toolchain.txt)")
    kernels = evidence.read_kernels(LIBRARY)
    assert evidence.check(kernels) == []
    assert all(kernel.opcodes for kernel in kernels if _multiplies(evidence.role_of(kernel.name)))


def _multiplies(role: Role | None) -> bool:
    return role is not None and role.tile is not None
