// SPDX-License-Identifier: Apache-2.0
// The tile configurations of both GEMMs, mma.sp (sm_80 on) and wgmma.sp (sm_90a), and which one a problem
// gets.
#pragma once

#include <cstdint>

namespace lynx {

// Tile M x N x K in elements (K counts channels before compression), a warp's part of it, pipeline stages,
// and the time one tile takes relative to the first configuration.
struct TileConfig {
  int m, n, k;
  int warp_m, warp_n;
  int stages;
  double time;

  // Bytes of shared memory: values, weight and metadata of every stage.
  constexpr int shared_bytes() const { return stages * (m * k / 2 * 2 + n * k * 2 + m * k / 16 * 2); }
};

enum TileIndex : int { kMedium, kSmall, kTileConfigs };

// 256x128x64 was measured too: 5 to 19 % slower than the first on an H100 in every shape of FLUX.1.
constexpr TileConfig kTiles[kTileConfigs] = {
    // 75 KiB: fits every part from sm_80 on (99 KiB on sm_86, 89 and 120; a 4th stage misses that by 1 KiB).
    {128, 128, 64, 64, 64, 3, 1.0},
    // 82 KiB: half the rows, for few tokens (text, time embeddings), where 128 would leave most SMs idle or
    // its rows
    // empty. Loading the weight dominates, hence a time of 0.82 instead of a half (H100, 4608 tokens).
    {64, 128, 64, 32, 64, 4, 0.82},
};

constexpr int kSmallestSharedMemory = 99 * 1024;  // per thread block, of all GPUs from sm_80 on
static_assert(kTiles[kMedium].shared_bytes() <= kSmallestSharedMemory);
static_assert(kTiles[kSmall].shared_bytes() <= kSmallestSharedMemory);

// wgmma.sp. Tile M x N x K, blocks of a cluster along M (they share the weight by multicast), stages that fit
// into an SM's shared memory beside the epilogue, and the time of one tile relative to the first.
struct TileConfigSm90 {
  int m, n, k;
  int cluster_m;
  int stages;
  double time;
};

enum TileIndexSm90 : int { kWide, kNarrow, kTileConfigsSm90 };

// plugins/TUNING.md has the 11 configurations that were measured.
constexpr TileConfigSm90 kTilesSm90[kTileConfigsSm90] = {
    // Fastest or within 4 % of it in every shape measured. wgmma.sp reads the weight from shared memory for
    // each of its two warp groups, so the wide side must be the weight's; K = 64 leaves room for 5 stages.
    {128, 256, 64, 2, 5, 1.0},
    // For few tokens: twice as many tiles, and no partner whose rows would be empty.
    {128, 128, 64, 1, 8, 0.6},
};

// Channels of a metadata atom, which wgmma.sp derives from the tile: one pruning pass feeds every tile.
constexpr int kAtomWidthSm90 = 64;
constexpr bool atoms_agree() {
  for (const TileConfigSm90& tile : kTilesSm90) {
    if ((tile.k < 128 ? tile.k : 128) != kAtomWidthSm90) return false;
  }
  return true;
}
static_assert(atoms_agree(),
              "all tiles of sm_90a must read the metadata layout that the pruning pass writes");

// Estimated time: waves of thread blocks over the SMs times a tile's time.
template <class Tile>
constexpr double relative_time(const Tile& tile, int64_t rows, int64_t columns, int sm_count) {
  const int64_t tiles = ((rows + tile.m - 1) / tile.m) * ((columns + tile.n - 1) / tile.n);
  const int64_t waves = (tiles + sm_count - 1) / sm_count;
  return double(waves) * tile.time;
}

// The configuration of `tiles` with the least estimated time; the first of equals.
template <class Tile, int kCount>
constexpr int choose_tile(const Tile (&tiles)[kCount], int64_t rows, int64_t columns, int sm_count) {
  int best = 0;
  for (int i = 1; i < kCount; ++i) {
    const double time = relative_time(tiles[i], rows, columns, sm_count);
    if (time < relative_time(tiles[best], rows, columns, sm_count)) best = i;
  }
  return best;
}

// Measured on an H100: the first is faster wherever it fills the GPU. The estimate gives the second to few
// tokens.
static_assert(choose_tile(kTiles, 4608, 9216, 132) == kMedium &&
              choose_tile(kTiles, 4608, 3072, 132) == kMedium);
static_assert(choose_tile(kTiles, 512, 9216, 132) == kMedium && choose_tile(kTiles, 1, 9216, 132) == kSmall);
static_assert(choose_tile(kTilesSm90, 4608, 9216, 132) == kWide &&
              choose_tile(kTilesSm90, 64, 3072, 132) == kNarrow);

}  // namespace lynx
