// SPDX-License-Identifier: Apache-2.0
// The GEMM's tile configurations, and which one a problem gets.
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

// Estimated time: waves of thread blocks over the SMs times a tile's time.
constexpr double relative_time(const TileConfig& tile, int64_t rows, int64_t columns, int sm_count) {
  const int64_t tiles = ((rows + tile.m - 1) / tile.m) * ((columns + tile.n - 1) / tile.n);
  const int64_t waves = (tiles + sm_count - 1) / sm_count;
  return double(waves) * tile.time;
}

// The configuration with the least estimated time.
constexpr TileIndex choose_tile(int64_t rows, int64_t columns, int sm_count) {
  const double medium = relative_time(kTiles[kMedium], rows, columns, sm_count);
  const double small = relative_time(kTiles[kSmall], rows, columns, sm_count);
  return small < medium ? kSmall : kMedium;
}

// Measured on an H100: the first is faster wherever it fills the GPU. The estimate gives the second to few
// tokens.
static_assert(choose_tile(4608, 9216, 132) == kMedium && choose_tile(4608, 3072, 132) == kMedium);
static_assert(choose_tile(512, 9216, 132) == kMedium && choose_tile(1, 9216, 132) == kSmall);

}  // namespace lynx
