// SPDX-License-Identifier: Apache-2.0
// The tile configurations of the FP8 GEMMs by mma and mma.sp of e4m3 (sm_89 on), and which one a problem
// gets.
#pragma once

#include <cstdint>

#include "fp8_tiles.h"
#include "tile_config.h"

namespace lynx {

constexpr int kFp8MmaStage = 64;  // channels in a stage, before compression

// Tile M x N, a warp's part of it, pipeline stages of kFp8MmaStage channels, and the time of one tile
// relative to the first of its table. M is the side of the sparse operand, else of the weight.
struct Fp8MmaTile {
  int m, n;
  int warp_m, warp_n;
  int stages;
  double time;

  constexpr int threads() const { return m / warp_m * (n / warp_n) * 32; }

  // Values, dense operand and metadata of a stage, and of all.
  constexpr int stage_bytes(bool sparse) const {
    return m * (sparse ? kFp8MmaStage / 2 + kFp8MmaStage / 8 : kFp8MmaStage) + n * kFp8MmaStage;
  }
  constexpr int shared_bytes(bool sparse) const { return stages * stage_bytes(sparse); }
};

// By arithmetic, not measured: no GPU of these architectures was at hand. An SM of a data-center Ada card
// (L40S) does a 16 x 8 x 32 product, or 16 x 8 x 64 of a 2:4 operand, in 4 cycles, a GeForce in 8; shared
// memory gives 128 bytes a cycle, L2 about 16 for each SM.
//  - A warp's 64 x 64 products take 208 bytes of shared memory each (128 of dense operands), 64 x 32 take 288
//    (192): below the 512 of 4 cycles, and what fills the stages comes on top.
//  - From L2 a stage of 256 x 128 takes 18 KiB in the 1024 cycles of its 2:4 products: as much as there is,
//  so
//    the tile is as large as registers allow (128 accumulators a thread), and its long side that of the
//    sparse operand, whose rows take 40 bytes and the dense one's 64.
//  - 8 warps, two a scheduler, so that one has products while the other waits at a barrier or for fragments.
//  - 3 stages ahead are 3072 cycles: several times the way to L2. All fit the 99 KiB that a thread block
//  gets.
// The smaller tiles' times lie between their share of the products (0.5, 0.25) and of the bytes (0.72, 0.5).
constexpr Fp8MmaTile kFp8SparseMmaTiles[] = {
    {256, 128, 64, 64, 4, 1.0},
    {128, 128, 64, 32, 4, 0.6},
    // For few tokens and few output channels: as many thread blocks as there can be.
    {128, 64, 32, 32, 4, 0.4},
};
constexpr Fp8MmaTile kFp8DenseMmaTiles[] = {
    {256, 128, 64, 64, 4, 1.0},
    {128, 128, 64, 32, 4, 0.6},
    {128, 64, 32, 32, 4, 0.4},
};
constexpr int kFp8MmaTiles = int(sizeof kFp8SparseMmaTiles / sizeof(Fp8MmaTile));
static_assert(sizeof kFp8SparseMmaTiles == sizeof kFp8DenseMmaTiles);
static_assert(kFp8MmaTiles <= fp8_tile_count(Fp8Operand::kSparseActivation) &&
                  kFp8MmaTiles <= fp8_tile_count(Fp8Operand::kDense),
              "fp8_tile_count says how many tactics there are at most, on any GPU");

constexpr auto& fp8_mma_tiles(Fp8Operand operand) {
  return operand == Fp8Operand::kDense ? kFp8DenseMmaTiles : kFp8SparseMmaTiles;
}

constexpr bool fp8_mma_tiles_fit() {
  for (int i = 0; i < kFp8MmaTiles; ++i) {
    if (kFp8SparseMmaTiles[i].shared_bytes(true) > kSmallestSharedMemory ||
        kFp8DenseMmaTiles[i].shared_bytes(false) > kSmallestSharedMemory) {
      return false;
    }
  }
  return true;
}
static_assert(fp8_mma_tiles_fit(), "sm_89 and sm_120 have 99 KiB for a thread block");

// Tiles of D, and the waves of them: a thread block at a time on each SM.
constexpr int64_t tiles_of(const Fp8MmaTile& tile, int64_t rows, int64_t columns) {
  return ((rows + tile.m - 1) / tile.m) * ((columns + tile.n - 1) / tile.n);
}
constexpr double waves(const Fp8MmaTile&, int64_t tiles, int64_t, int sm_count) {
  return double((tiles + sm_count - 1) / sm_count);
}

constexpr int choose_fp8_mma_tile(Fp8Operand operand, int64_t tokens, int64_t channels, int64_t width,
                                  int sm_count) {
  const Fp8Shape d = fp8_shape(operand, tokens, channels);
  return choose_tile(fp8_mma_tiles(operand), d.m, d.n, width, sm_count);
}

// On 142 SMs (L40S): many waves; a wave and a bit of large tiles; text tokens.
static_assert(choose_fp8_mma_tile(Fp8Operand::kSparseWeight, 4608, 12288, 3072, 142) == 0);
static_assert(choose_fp8_mma_tile(Fp8Operand::kSparseActivation, 512, 9216, 3072, 142) == 1);
static_assert(choose_fp8_mma_tile(Fp8Operand::kSparseWeight, 512, 3072, 3072, 142) == 1);
static_assert(choose_fp8_mma_tile(Fp8Operand::kDense, 64, 9216, 3072, 142) == 2);

}  // namespace lynx
