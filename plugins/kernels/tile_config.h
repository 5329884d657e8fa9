// SPDX-License-Identifier: Apache-2.0
// The GEMM's tile configurations, and which one a problem gets.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace lynx {

// Tile M x N x K in elements (K counts channels before compression), a warp's part of it, pipeline stages.
struct TileConfig {
  int m, n, k;
  int warp_m, warp_n;
  int stages;

  // Bytes of shared memory: values, weight and metadata of every stage.
  constexpr int shared_bytes() const { return stages * (m * k / 2 * 2 + n * k * 2 + m * k / 16 * 2); }
};

enum TileIndex : int { kMedium, kSmall, kLarge, kTileConfigs };

constexpr TileConfig kTiles[kTileConfigs] = {
    // 75 KiB: fits every part from sm_80 on (99 KiB on sm_86, 89 and 120; a 4th stage misses that by 1 KiB).
    {128, 128, 64, 64, 64, 3},
    // 82 KiB: half the rows, for few tokens (text, time embeddings), where 128 would leave most SMs idle or
    // empty.
    {64, 128, 64, 32, 64, 4},
    // 102 KiB, sm_80 and sm_90 class only: the compressed operand is cheap, so rows double at little extra
    // traffic.
    {256, 128, 64, 64, 64, 3},
};

// What the choice depends on besides the problem.
struct DeviceLimits {
  int sm_count;
  int shared_bytes;  // per thread block, opt-in
};

constexpr int64_t tile_count(const TileConfig& tile, int64_t rows, int64_t columns) {
  return ((rows + tile.m - 1) / tile.m) * ((columns + tile.n - 1) / tile.n);
}

// Relative time of one problem: waves of thread blocks times the work of a tile. `efficiency` is the share of
// the peak a tile's traffic allows; tile K and K' are common to all and cancel out.
constexpr double relative_time(const TileConfig& tile, int64_t rows, int64_t columns, int sm_count) {
  const int64_t waves = (tile_count(tile, rows, columns) + sm_count - 1) / sm_count;
  const double traffic_per_flop = 0.5 / tile.n + 1.0 / tile.m;  // operand elements loaded per multiply-add
  const double efficiency = 1.0 / (1.0 + 16.0 * traffic_per_flop);
  return double(waves) * tile.m * tile.n / efficiency;
}

// The configuration with the least estimated time among those whose shared memory the device has.
constexpr TileIndex choose_tile(int64_t rows, int64_t columns, const DeviceLimits& device) {
  TileIndex best = kMedium;
  double best_time = relative_time(kTiles[kMedium], rows, columns, device.sm_count);
  for (const TileIndex index : {kSmall, kLarge}) {
    if (kTiles[index].shared_bytes() > device.shared_bytes) continue;
    const double time = relative_time(kTiles[index], rows, columns, device.sm_count);
    if (time < best_time) best = index, best_time = time;
  }
  return best;
}

}  // namespace lynx
