# SPDX-License-Identifier: Apache-2.0
"""What the machine code of the plugin library proves without a GPU: sparse tensor cores, no spills, occupancy.

    python plugins/tests/static_evidence.py [LIBRARY]

prints a line for each kernel of each GPU architecture, then what is wrong, and exits with 1 if anything is. Needs
cuobjdump and nvdisasm: from a CUDA toolkit in PATH, or ``pip install --no-deps -r requirements/toolchain.txt``;
and c++filt, which comes with g++.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2] / "lynx_compile" / "lib" / "liblynx_plugin.so"

# Bytes of stack that a kernel may take, by the title of its line in the table; the others spill nothing. These, whose
# sums take 192 of 240 registers, keep a tile's place there, which is stored and loaded once a tile, outside the loop of
# products.
SPILLS_ALLOWED = {
    f"fp8 {element} {kernel} gated": most
    for element in ("bf16", "fp16")
    for kernel, most in (("dense 128x192", 16), ("weight 256x192 stream-K", 8))
}

REGISTERS = 64 * 1024  # of an SM
KIB = 1024
# Of an SM, by architecture; a thread block's share is 1 KiB larger than what it asks for.
SHARED_BYTES = {
    "80": 164 * KIB,
    "86": 100 * KIB,
    "89": 100 * KIB,
    "90": 228 * KIB,
    "90a": 228 * KIB,
    "120": 100 * KIB,
}
RESERVED_BYTES = 1 * KIB

ELEMENTS = ("bf16", "fp16")
OPERANDS = ("activation", "weight")  # which side of a GEMM is sparse
VARIANTS = ("plain", "norm", "act")  # Variant of prune_tile.cuh
RANKS = (0, 16, 32, 64, 128)
RANKS_OF_A_WARP = 64  # at most
FINISH_THREADS = 256


@dataclass(frozen=True)
class Tile:
    """One configuration of tile_config.h: its shape, stages and the threads of its kernel."""

    m: int
    n: int
    k: int
    stages: int
    threads: int

    @property
    def shared_bytes(self) -> int:
        """Values, dense operand and metadata of every stage."""
        return self.stages * (self.m * self.k + self.n * self.k * 2 + self.m * self.k // 8)


# What tile_config.h says; tests/plugins/test_static_evidence.py has the compiler compare it. A library has all of
# sm_90a's, or the first.
MMA_TILES = (Tile(128, 128, 64, 3, 128), Tile(64, 128, 64, 4, 128))
WGMMA_TILES = (Tile(128, 256, 64, 5, 384), Tile(256, 192, 64, 4, 384), Tile(128, 128, 64, 8, 384))


# The FP8 GEMMs by operand, as fp8_tiles.h has them: M x N, and whether stream-K; a library has all, each
# a second time for gates, and those of promoted sums, or the first for gates alone, which serves all calls.
FP8_TILES = {
    "weight": ("256x192", "256x144", "128x128", "256x192 stream-K"),
    "dense": ("128x192", "128x160", "128x144", "128x128"),
    "activation": ("256x192", "256x144", "128x128"),
}
PROMOTED_TILES = {
    "weight": ("128x192", "128x176", "128x128", "128x160"),
    "dense": ("128x192", "128x160", "128x144", "128x128"),
    "activation": ("128x192", "128x176", "128x128"),
}
GATED_SUFFIX, PROMOTED_SUFFIX = " gated", " promoted"
FP8_THREADS = 384
FP8_OPERANDS = tuple(FP8_TILES)  # by their numbers in Fp8Operand


@dataclass(frozen=True)
class Fp8MmaTile:
    """One configuration of fp8_tiles_sm89.h: its shape and stages."""

    m: int
    n: int
    stages: int

    def shared_bytes(self, operand: str) -> int:
        """Values, dense operand and metadata of every stage of 64 channels."""
        return self.stages * (self.m * (64 if operand == "dense" else 40) + self.n * 64)

    @property
    def title(self) -> str:
        return f"{self.m}x{self.n}"


# The FP8 GEMMs by mma, of every operand; a library has the first or all.
FP8_MMA_TILES = (Fp8MmaTile(256, 128, 4), Fp8MmaTile(128, 128, 4), Fp8MmaTile(128, 64, 4))
FP8_MMA_THREADS = 256
FP8_MMA_ARCHITECTURES = ("89", "120")
ROUND_THREADS = 256  # of the rounding pass at most
MAKES = ("plain", "norm", "gelu", "gated")  # Make of fp8_round.cu
ROUND_BLOCKS = (2, 3, 4, 6, 8)  # of 16 channels that a thread holds


def prune_threads(rank: int) -> int:
    """Threads of a block of the pruning kernel."""
    return 512 if rank > RANKS_OF_A_WARP else 256


def blocks_per_sm(rank: int, variant: str) -> int:
    """Thread blocks of the pruning kernel that share an SM, as prune_tile.cuh claims."""
    if rank >= RANKS_OF_A_WARP:
        return 1024 // prune_threads(rank) // 2
    return 3 if variant == "plain" else 2


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for ``arch``, and its tensor-core and local-memory instructions.

    An opcode begins with ``@`` where a lane's predicate decides about it, and with ``?`` where it stands in a branch
    that lanes of a warp take apart.
    """

    arch: str  # "80", "90a"
    name: str  # demangled
    registers: int
    stack: int
    shared: int
    opcodes: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


@dataclass(frozen=True)
class Role:
    """Which of our kernels a symbol is."""

    family: str  # prune, finish, mma.sp, wgmma.sp, round, fp8, fp8 mma
    element: str = ""
    layout: str = ""
    rank: int = 0
    variant: str = ""
    tile: Tile | None = None
    operand: str = ""

    @property
    def title(self) -> str:
        if self.family == "prune":
            return f"prune {self.element} layout {self.layout} rank {self.rank} {self.variant}"
        if self.family in ("fp8", "fp8 mma"):
            return f"{self.family} {self.element} {self.operand} {self.variant}"
        if self.family == "round":
            return f"round {self.element} {self.variant} {self.operand} {self.rank}"
        if self.family == "finish":
            return f"finish {self.element} layout {self.layout}"
        if self.tile is None:
            return self.family
        return f"{self.family} {self.element} {self.tile.m}x{self.tile.n}x{self.tile.k} {self.operand}"


METADATA = r"<lynx::(Bf16|Fp16), lynx::Sm(80Metadata|90Metadata<64>)"
PRUNE_NAME = re.compile(
    "prune_kernel" + METADATA + r", (\d+), \(lynx::\(anonymous namespace\)::Variant\)(\d)>"
)
FINISH_NAME = re.compile("finish_kernel" + METADATA)
MMA_NAME = re.compile(r"SparseMmaMultistage<cutlass::gemm::GemmShape<(\d+), (\d+), (\d+)>")
WGMMA_NAME = re.compile(
    r"MainloopSm90TmaGmmaWarpSpecializedSparse<(\d+), .*?Cooperative>, "
    r"cute::tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<(\d+)> ?>"
)
# Which of our epilogues a GEMM has tells its operand. With sparse weights, output channels lie along D's rows.
EPILOGUES = {
    "activation": re.compile(r"lynx::ActivatedStore<|lynx::(GeluFrom|Fp8Finish)<cutlass::\w+, 1[,>]"),
    "weight": re.compile(r"lynx::TransposedEpilogue<|lynx::(GeluFrom|Fp8Finish)<cutlass::\w+, 0[,>]"),
    "gated": re.compile(r"lynx::GatedStore<"),
}
FP8_NAME = re.compile(
    r"MainloopSm90TmaGmmaWarpSpecialized(Sparse)?(?:<\d+, .*?FP8FastAccum|(FP8)<\d+, .*?Cooperative)>, "
    r"cute::tuple<cute::C<(\d+)>, cute::C<(\d+)>, cute::C<128> ?>"
)
FP8_MMA_NAME = re.compile(r"fp8_mma_kernel<lynx::(Bf16|Fp16), \(lynx::Fp8Operand\)(\d), (\d)>")
ROUND_NAME = re.compile(
    r"round_kernel<lynx::(Bf16|Fp16), \(lynx::\(anonymous namespace\)::Make\)(\d), (true|false), (\d)>"
)


def role_of(name: str) -> Role | None:
    """What the kernel ``name`` is, None if it is none of ours."""
    if match := PRUNE_NAME.search(name):
        element, layout, rank, variant = match.groups()
        return Role("prune", element.lower(), layout[:2], int(rank), VARIANTS[int(variant)])
    if match := FINISH_NAME.search(name):
        return Role("finish", match[1].lower(), match[2][:2])
    if match := ROUND_NAME.search(name):
        element, make, pruned, blocks = match.groups()
        operand = "pruned" if pruned == "true" else "dense"
        return Role("round", element.lower(), rank=int(blocks), variant=MAKES[int(make)], operand=operand)
    if match := FP8_MMA_NAME.search(name):
        element, number, tile = match.groups()
        operand = FP8_OPERANDS[int(number)]
        return Role("fp8 mma", element.lower(), variant=FP8_MMA_TILES[int(tile)].title, operand=operand)
    element = "bf16" if "bfloat16_t" in name else "fp16"
    operand = next((operand for operand, epilogue in EPILOGUES.items() if epilogue.search(name)), "")
    if match := FP8_NAME.search(name):
        variant = f"{match[3]}x{match[4]}" + (" stream-K" if "lynx::StreamK" in name else "")
        variant += GATED_SUFFIX if "lynx::Fp8Finish<" in name else PROMOTED_SUFFIX if match[2] else ""
        operand = operand if match[1] else "dense"
        return Role("fp8", element, variant=variant, operand=operand) if operand else None
    if match := MMA_NAME.search(name):
        shape = tuple(map(int, match.groups()))
        tiles = [tile for tile in MMA_TILES if (tile.m, tile.n, tile.k) == shape]
        return Role("mma.sp", element, tile=tiles[0], operand=operand) if tiles and operand else None
    if match := WGMMA_NAME.search(name):
        stages, *shape = map(int, match.groups())
        tiles = [tile for tile in WGMMA_TILES if [tile.stages, tile.m, tile.n, tile.k] == [stages, *shape]]
        return Role("wgmma.sp", element, tile=tiles[0], operand=operand) if tiles and operand else None
    return None


def check(kernels: Iterable[Kernel]) -> list[str]:
    """What is wrong with a library of these kernels; one sentence each."""
    kernels = list(kernels)
    wrong = [*_check_complete(kernels), *_check_fp8_complete(kernels)]
    for kernel in kernels:
        role = role_of(kernel.name)
        if role is None:
            wrong.append(f"sm_{kernel.arch}: unknown kernel {kernel.name}")
        else:
            found = [*_check_instructions(kernel, role), *_check_resources(kernel, role)]
            wrong += [f"sm_{kernel.arch} {role.title}: {each}" for each in found]
    return wrong


def _check_complete(kernels: list[Kernel]) -> list[str]:
    """Every architecture has every kernel it needs, for the element types that it has GEMMs of."""
    found = Counter((kernel.arch, role.title) for kernel in kernels if (role := role_of(kernel.name)))
    roles = [(kernel.arch, role) for kernel in kernels if (role := role_of(kernel.name)) and role.tile]
    gemms = {(arch, role.element) for arch, role in roles}
    one = all(role.tile == WGMMA_TILES[0] for _, role in roles if role.family == "wgmma.sp")
    archs = {kernel.arch for kernel in kernels}
    wrong = [] if gemms else ["the library has no GEMM"]
    for arch in sorted(archs | ({"90"} if "90a" in archs else set())):
        due = _roles_due(arch, gemms, WGMMA_TILES[:1] if one else WGMMA_TILES)
        wrong += [
            f"sm_{arch} {title}: {found[arch, title]} kernels where {number} are due"
            for title, number in due.items()
            if found[arch, title] != number
        ]
    return wrong


def _check_fp8_complete(kernels: list[Kernel]) -> Iterator[str]:
    """Where there are GEMMs of a type, there are those of FP8: the first tile of every operand, with gates, or all."""
    found = Counter((kernel.arch, role.title) for kernel in kernels if (role := role_of(kernel.name)))
    for arch, family, element in sorted(_fp8_due(kernels)):
        if family == "fp8 mma":
            variants = {operand: [tile.title for tile in FP8_MMA_TILES] for operand in FP8_OPERANDS}
            variants_of_one = {operand: titles[:1] for operand, titles in variants.items()}
        else:
            variants = {
                operand: [tile + form for tile in tiles for form in ("", GATED_SUFFIX)]
                + [tile + PROMOTED_SUFFIX for tile in PROMOTED_TILES[operand]]
                for operand, tiles in FP8_TILES.items()
            }
            variants_of_one = {operand: [tiles[0] + GATED_SUFFIX] for operand, tiles in FP8_TILES.items()}
        first, whole = (
            {
                Role(family, element, variant=variant, operand=operand).title
                for operand, some in those.items()
                for variant in some
            }
            for those in (variants_of_one, variants)
        )
        has = {
            title for of_arch, title in found if of_arch == arch and title.startswith(f"{family} {element} ")
        }
        if has not in (first, whole):
            yield (
                f"sm_{arch}: neither one nor all {family} GEMMs of {element}: {', '.join(sorted(has)) or 'none'}"
            )
        for make, operand, blocks in itertools.product(MAKES, ("dense", "pruned"), ROUND_BLOCKS):
            title = Role("round", element, rank=blocks, variant=make, operand=operand).title
            if found[arch, title] != 1:
                yield f"sm_{arch} {title}: {found[arch, title]} kernels where 1 is due"


def _fp8_due(kernels: list[Kernel]) -> set[tuple[str, str, str]]:
    """Architecture, family and element type of the FP8 GEMMs that a library of these kernels should have."""
    due = set()
    for kernel in kernels:
        role = role_of(kernel.name)
        if role is None:
            continue
        if role.family in ("wgmma.sp", "fp8"):
            due.add((kernel.arch, "fp8", role.element))
        elif kernel.arch in FP8_MMA_ARCHITECTURES and role.family in ("mma.sp", "fp8 mma"):
            due.add((kernel.arch, "fp8 mma", role.element))
    return due


def _roles_due(arch: str, gemms: set[tuple[str, str]], wgmma_tiles: tuple[Tile, ...]) -> Counter[str]:
    """wgmma.sp is sm_90a's; the pruning pass for it is plain sm_90's. All others have both for mma.sp."""
    due: Counter[str] = Counter()
    elements = sorted(element for of_arch, element in gemms if of_arch == ("90a" if arch == "90" else arch))
    for element in elements:
        if arch != "90a":
            layout = "90" if arch == "90" else "80"
            due[Role("finish", element, layout).title] = 1
            for rank in RANKS:
                due.update(Role("prune", element, layout, rank, variant).title for variant in VARIANTS)
        if arch != "90":
            family, tiles = ("wgmma.sp", wgmma_tiles) if arch == "90a" else ("mma.sp", MMA_TILES)
            operands = (*OPERANDS, "gated") if arch == "90a" else OPERANDS  # mma.sp's weight kernel gates too
            for tile in tiles:
                due.update(Role(family, element, tile=tile, operand=operand).title for operand in operands)
    return due


def _check_instructions(kernel: Kernel, role: Role) -> Iterator[str]:
    suffix = r"(\.\w+)*\.BF16" if role.element == "bf16" else r"(?!.*BF16)"
    if role.family == "wgmma.sp" and not kernel.count(r"HGMMA\.SP\.64x\d+x32\.F32" + suffix):
        yield f"no HGMMA.SP of {role.element} with float32 accumulation"
    if role.family == "fp8":
        sparse = r"\.SP" if role.operand != "dense" else ""
        if not kernel.count(rf"QGMMA{sparse}\.64x\d+x\d+\.F32\.E4M3\.E4M3"):
            yield "no QGMMA of e4m3 with float32 accumulation" + (" and 2:4" if sparse else "")
        if sparse and kernel.count(r"QGMMA(?!\.SP)"):
            yield "dense tensor-core instructions beside the sparse ones"
    if role.family == "fp8 mma":
        shape = "16832" if role.operand == "dense" else r"SP\.16864"
        if not kernel.count(rf"QMMA\.{shape}\.F32\.E4M3\.E4M3"):
            yield "no QMMA of e4m3 with float32 accumulation" + (
                "" if role.operand == "dense" else " and 2:4"
            )
        if role.operand != "dense" and kernel.count(r"QMMA(?!\.SP)"):
            yield "dense tensor-core instructions beside the sparse ones"
    if role.family == "mma.sp" and not kernel.count(r"HMMA\.SP\.16832\.F32" + suffix):
        yield f"no HMMA.SP of {role.element} with float32 accumulation"
    if role.family in ("mma.sp", "wgmma.sp") and kernel.count(r"HG?MMA(?!\.SP)"):
        yield "dense tensor-core instructions beside the sparse ones"
    # All lanes must take part in turning a block.
    turning = ("mma.sp", "weight"), ("wgmma.sp", "gated")
    turns_pairs = role.variant.endswith(GATED_SUFFIX) and role.operand != "activation"
    if turns_pairs or (role.family, role.operand) in turning:
        if not kernel.count("[@?]*MOVM"):
            yield "no MOVM: nothing turns the result"
        if kernel.count("@[?]?MOVM") or kernel.count("[?]MOVM"):
            yield "a MOVM that some lanes of a warp may not reach"
    if role.family == "prune":
        due = min(role.rank, RANKS_OF_A_WARP) // 8 * 4  # of 16x8x16 over a step of 64 channels
        if kernel.count(r"HMMA\.16816\.F32" + suffix) < due:
            yield f"fewer than {due} HMMA of {role.element} with float32 accumulation"


def _check_resources(kernel: Kernel, role: Role) -> Iterator[str]:
    if kernel.stack > SPILLS_ALLOWED.get(role.title, 0):
        yield f"{kernel.stack} bytes of stack: registers are spilled"
    if SPILLS_ALLOWED.get(role.title, 0) == 0 and kernel.count(r"(LDL|STL)"):
        yield "accesses to local memory: registers are spilled"
    threads, shared, blocks = _launch(role)
    registers = -(-kernel.registers // 8) * 8 * threads * blocks
    if registers > REGISTERS:
        yield f"{blocks} thread blocks take {registers} registers of an SM's {REGISTERS}"
    shared_bytes, there = blocks * (kernel.shared + shared + RESERVED_BYTES), SHARED_BYTES[kernel.arch]
    if shared_bytes > there:
        yield f"{blocks} thread blocks take {shared_bytes} bytes of an SM's {there} of shared memory"


def _launch(role: Role) -> tuple[int, int, int]:
    """Threads, bytes of dynamic shared memory, and thread blocks that must fit an SM."""
    if role.family == "prune":
        return prune_threads(role.rank), 0, blocks_per_sm(role.rank, role.variant)
    if role.family == "round":
        return ROUND_THREADS, 0, 2 if role.rank <= 4 else 1
    if role.family == "fp8":  # its stages are as many as fit
        return FP8_THREADS, 0, 1
    if role.family == "fp8 mma":
        tile = next(tile for tile in FP8_MMA_TILES if tile.title == role.variant)
        return FP8_MMA_THREADS, tile.shared_bytes(role.operand), 1
    if role.tile is None:
        return FINISH_THREADS, 0, 1
    return role.tile.threads, role.tile.shared_bytes, 1


# ---- Reading a library


def read_kernels(library: Path) -> list[Kernel]:
    """All kernels with machine code in ``library``."""
    opcodes = parse_sass(_cuobjdump("-sass", library))
    kernels = list(parse_resources(_cuobjdump("--dump-resource-usage", library)))
    names = _demangled([kernel.name for kernel in kernels])
    return [
        replace(kernel, name=name, opcodes=opcodes[kernel.arch, kernel.name])
        for kernel, name in zip(kernels, names, strict=True)
    ]


def _demangled(symbols: list[str]) -> list[str]:
    command = ["c++filt", "--no-recurse-limit"]  # CUTLASS's names are deep
    done = subprocess.run(command, input="\n".join(symbols), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def parse_resources(lines: Iterable[str]) -> Iterator[Kernel]:
    """Kernels, without instructions, from ``cuobjdump --dump-resource-usage``."""
    arch = name = ""
    for line in lines:
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line.rstrip()):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            yield Kernel(arch, name, registers, stack + local, shared)


INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?((?:HMMA|QMMA|HGMMA|QGMMA|LDL|STL|MOVM|BSSY|BRA|BSYNC)\b[.\w]*)"
)


def parse_sass(lines: Iterable[str]) -> dict[tuple[str, str], Counter[str]]:
    """By architecture and symbol, the tensor-core and local-memory instructions in ``cuobjdump -sass``.

    BSSY and BSYNC enclose what the lanes of a warp go through apart, from the first branch of some lanes on.
    """
    opcodes: dict[tuple[str, str], Counter[str]] = {}
    arch, current = "", Counter[str]()
    apart: list[bool] = []  # of the regions that are open, whether there was a branch
    for line in lines:
        if match := INSTRUCTION.search(line):
            predicate, opcode = match.groups()
            if opcode.startswith("BSSY"):
                apart.append(False)
            elif opcode.startswith("BSYNC"):
                apart = apart[:-1]
            elif opcode.startswith("BRA"):
                apart = [branched or bool(predicate) for branched in apart]
            elif opcode.startswith("MOVM"):
                current[("@" if predicate else "") + ("?" if any(apart) else "") + opcode] += 1
            else:
                current[opcode] += 1
        elif match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            current, apart = opcodes.setdefault((arch, match[1]), Counter()), []
    return opcodes


def _cuobjdump(option: str, library: Path) -> Iterator[str]:
    folder = find_tools()
    if folder is None:
        sys.exit(
            "error: cuobjdump and nvdisasm were not found: run `pip install --no-deps -r requirements/toolchain.txt`."
        )
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    command = [folder / "cuobjdump", option, library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} failed with exit code {process.returncode}.")


def find_tools() -> Path | None:
    """The folder with cuobjdump and nvdisasm: PATH's, the toolkit's, or the pip packages'."""
    found = shutil.which("cuobjdump")
    entries = [Path(sys.prefix) / "toolchain", *(Path(entry) for entry in sys.path if entry)]
    candidates = [
        *([Path(found).parent] if found else []),
        Path("/usr/local/cuda/bin"),
        *(entry / "nvidia" / "cu13" / "bin" for entry in entries),
    ]
    return next((f for f in candidates if (f / "cuobjdump").exists() and (f / "nvdisasm").exists()), None)


def table(kernels: Iterable[Kernel]) -> str:
    """A line a kernel: architecture, title, registers, stack, shared memory, tensor-core instructions."""
    lines = ["arch  kernel                                    registers  stack  shared  instructions"]
    for kernel in kernels:
        role = role_of(kernel.name)
        instructions = ", ".join(f"{number} {opcode}" for opcode, number in sorted(kernel.opcodes.items()))
        lines.append(
            f"{kernel.arch:<5} {role.title if role else kernel.name:<42} {kernel.registers:>8}  {kernel.stack:>5}"
            f"  {kernel.shared:>6}  {instructions}"
        )
    return "\n".join(lines)


def main() -> int:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    if not library.exists():
        sys.exit(f"error: {library} does not exist: run `make plugin`.")
    kernels = read_kernels(library)
    print(table(kernels))
    wrong = check(kernels)
    print(f"{len(kernels)} kernels, {len(wrong)} things wrong")
    for each in wrong:
        print(f"WRONG {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
