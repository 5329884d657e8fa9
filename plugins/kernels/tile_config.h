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

// wgmma.sp. Tile M x N x K, blocks of a cluster along M (they share the dense operand by multicast), stages
// that fit into an SM's shared memory beside the epilogue, whether the last tiles' K is divided among the SMs
// that would have nothing to do (stream-K; needs a workspace), and the time of one tile relative to the
// first.
struct TileConfigSm90 {
  int m, n, k;
  int cluster_m;
  int stages;
  bool stream_k;
  double time;
};

enum TileIndexSm90 : int { kWide, kTall, kNarrow, kTileConfigsSm90 };

// plugins/TUNING.md has the configurations that were measured.
constexpr TileConfigSm90 kTilesSm90[kTileConfigsSm90] = {
    // Fastest where only its tiles fill the GPU evenly. wgmma.sp reads the dense operand from shared memory
    // for each of its two warp groups, so the wide side must be the dense operand's; K = 64 leaves room for
    // 5 stages.
    {128, 256, 64, 2, 5, false, 1.0},
    // The most work per byte of shared memory that 192 accumulators a thread allow: 1.5 tiles of the first in
    // 1.55 times its time among other kernels, but in 1.4 at the GPU's power limit, where denoising runs.
    // Stream-K for tiles that would fill a small part of a last wave.
    {256, 192, 64, 2, 4, true, 1.45},
    // For few tokens and few output channels: as many thread blocks as there can be.
    {128, 128, 64, 2, 8, true, 0.75},
};

// Tiles of a problem; those that fill up a cluster count, empty or not.
constexpr int64_t tiles_of(const TileConfig& tile, int64_t rows, int64_t columns) {
  return ((rows + tile.m - 1) / tile.m) * ((columns + tile.n - 1) / tile.n);
}
constexpr int64_t tiles_of(const TileConfigSm90& tile, int64_t rows, int64_t columns) {
  const int64_t clusters = (rows + tile.m * tile.cluster_m - 1) / (tile.m * tile.cluster_m);
  return clusters * tile.cluster_m * ((columns + tile.n - 1) / tile.n);
}

// Whether a stream-K configuration should divide its last tiles: with less than two waves of them that only
// helps when K is long (measured: 12288, not 3072).
constexpr int kLongWidth = 8192;
constexpr bool divides_tiles(const TileConfigSm90& tile, int64_t tiles, int64_t width, int sm_count) {
  return tile.stream_k && (tiles >= 2 * sm_count || width >= kLongWidth);
}

constexpr int kMaxSmsSm90 = 132;  // of H100, H200 and GH200; others have fewer

// Bytes that a stream-K configuration needs at most: CUTLASS divides the tiles of less than two waves, each
// with partial sums in float32 and a barrier per warp group.
constexpr int64_t stream_k_bytes(const TileConfig&, int64_t, int64_t) { return 0; }
constexpr int64_t stream_k_bytes(const TileConfigSm90& tile, int64_t rows, int64_t columns) {
  if (!tile.stream_k) return 0;
  const int64_t tiles = tiles_of(tile, rows, columns);
  const int64_t divided = tiles < 2 * kMaxSmsSm90 ? tiles : 2 * kMaxSmsSm90;
  return divided * (int64_t(tile.m) * tile.n * 4 + 16) + 256;
}

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

// Output channels from which an epilogue applies an activation come in multiples of this: a warp's part of a
// tile is not split.
constexpr int kGeluMultiple = 64;

// Rows of a gated weight come in runs of this many, half of them activated and half of them gates: a thread
// has the accumulators of rows 8 apart.
constexpr int kGatedMultiple = 16;

// Estimated time: waves of thread blocks over the SMs times a tile's time. Less than a wave takes as long as
// one.
constexpr double waves(const TileConfig&, int64_t tiles, int64_t, int sm_count) {
  return double((tiles + sm_count - 1) / sm_count);
}
constexpr double waves(const TileConfigSm90& tile, int64_t tiles, int64_t width, int sm_count) {
  const bool divided = divides_tiles(tile, tiles, width, sm_count) && tiles > sm_count;
  // CUTLASS's heuristic divides the tiles behind the last full wave when they are less than half a wave.
  if (divided && tiles % sm_count * 2 < sm_count) return double(tiles) / sm_count;
  return double((tiles + sm_count - 1) / sm_count);
}

template <class Tile>
constexpr double relative_time(const Tile& tile, int64_t rows, int64_t columns, int64_t width, int sm_count) {
  return waves(tile, tiles_of(tile, rows, columns), width, sm_count) * tile.time;
}

// The configuration of `tiles` with the least estimated time; the first of equals.
template <class Tile, int kCount>
constexpr int choose_tile(const Tile (&tiles)[kCount], int64_t rows, int64_t columns, int64_t width,
                          int sm_count) {
  int best = 0;
  for (int i = 1; i < kCount; ++i) {
    const double time = relative_time(tiles[i], rows, columns, width, sm_count);
    if (time < relative_time(tiles[best], rows, columns, width, sm_count)) best = i;
  }
  return best;
}

// Measured on an H100 (plugins/TUNING.md); rows are those of the sparse operand.
static_assert(choose_tile(kTiles, 4608, 9216, 3072, 132) == kMedium &&
              choose_tile(kTiles, 4608, 3072, 3072, 132) == kMedium);
static_assert(choose_tile(kTiles, 512, 9216, 3072, 132) == kMedium &&
              choose_tile(kTiles, 1, 9216, 3072, 132) == kSmall);
static_assert(choose_tile(kTilesSm90, 21504, 4608, 3072, 132) == kTall &&
              choose_tile(kTilesSm90, 20480, 4608, 3840, 132) == kTall &&
              choose_tile(kTilesSm90, 3072, 4608, 15360, 132) == kTall &&
              choose_tile(kTilesSm90, 3840, 4608, 3840, 132) == kTall &&
              choose_tile(kTilesSm90, 9216, 512, 3072, 132) == kTall);
static_assert(choose_tile(kTilesSm90, 4096, 4096, 12288, 132) == kWide &&
              choose_tile(kTilesSm90, 12288, 512, 3072, 132) == kWide &&
              choose_tile(kTilesSm90, 64, 9216, 3072, 132) == kWide);
static_assert(choose_tile(kTilesSm90, 3072, 512, 3072, 132) == kNarrow);

}  // namespace lynx
