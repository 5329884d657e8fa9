// SPDX-License-Identifier: Apache-2.0
// The tile configurations of the FP8 GEMMs (wgmma and wgmma.sp of e4m3 on sm_90a), and which one a problem
// gets.
#pragma once

#include <cstdint>

#include "tile_config.h"

namespace lynx {

// Which operand of y = x W^T is 2:4 and compressed, if any.
enum class Fp8Operand { kSparseWeight, kDense, kSparseActivation };

// Tile M x N x K, thread blocks of a cluster along M, whether two warp groups take turns at tiles of their
// own (ping-pong: the stores of one hide behind the products of the other) instead of sharing one, whether
// the last tiles' K is divided among idle SMs (stream-K), and the time of one tile relative to the first of
// its table. M is the side of the sparse operand, else of the weight.
struct Fp8Tile {
  int m, n, k;
  int cluster_m;
  bool ping_pong, stream_k;
  double time;
};

// plugins/TUNING.md, section 8, has the configurations that were measured. What decides is shared memory: of
// e4m3 a wgmma.sp reads its 64 x N x 64 products' dense operand at just the 128 bytes a clock that there are,
// and filling the stages comes on top. That is in proportion to N + 64 for tiles of 256 rows, so wide ones
// are cheaper; 192 accumulators a thread are the most that leave registers to work with. Clusters gain
// nothing.
constexpr Fp8Tile kFp8SparseTiles[] = {
    {256, 192, 128, 1, false, false, 1.0},
    // Where its tiles fill the last wave and those above do not: 4608 tokens by 3072 channels.
    {256, 144, 128, 1, false, false, 0.86},
    // For few tokens and few output channels: as many thread blocks as there can be.
    {128, 128, 128, 1, false, false, 0.5},
    // For tiles that would fill a small part of a last wave, and long K. The last, because activations as the
    // sparse operand do without: there it spills.
    {256, 192, 128, 1, false, true, 1.13},
};

// Dense e4m3 reads half as much a clock, so that ping-pong's halved tile costs less than it hides. A cluster
// halves what the weight's rows take from L2.
constexpr Fp8Tile kFp8DenseTiles[] = {
    {128, 192, 128, 2, true, false, 1.0},
    {128, 160, 128, 2, true, false, 0.86},
    {128, 144, 128, 2, true, false, 0.78},
    // For few tokens and few output channels.
    {128, 128, 128, 1, false, false, 0.7},
};

// Where a thread's sums stay while K is added up. Hopper's tensor cores cut what they add of FP8 after 13
// bits, the sum included, so that fast sums lose some in every instruction, 1.3 to 2.6 % of what a trained
// model's linear returns at K = 15360. Promoted ones are added to float32 every kPromotedChannels and lose
// 0.1 %; the second set of accumulators takes tiles of half the rows, which are 1.1 to 1.2 times as slow.
enum class Fp8Sums { kFast, kPromoted };

constexpr int kPromotedWidth = kLongWidth;  // K' from which they are promoted
constexpr int kPromotedChannels = 512;

// Configurations of promoted sums, as many as of fast ones: a tactic is one of each. A cluster halves what
// the dense operand takes from L2, which 128 rows would take twice as often.
constexpr Fp8Tile kFp8PromotedSparseTiles[] = {
    {128, 192, 128, 2, false, false, 1.0},
    {128, 176, 128, 2, false, false, 0.9},
    {128, 128, 128, 1, false, false, 0.85},
    {128, 160, 128, 2, false, false, 0.96},
};
constexpr Fp8Tile kFp8PromotedDenseTiles[] = {
    {128, 192, 128, 2, false, false, 1.0},
    {128, 160, 128, 2, false, false, 0.86},
    {128, 144, 128, 2, false, false, 0.78},
    {128, 128, 128, 1, false, false, 0.7},
};
static_assert(sizeof kFp8PromotedSparseTiles == sizeof kFp8SparseTiles &&
              sizeof kFp8PromotedDenseTiles == sizeof kFp8DenseTiles);

constexpr const Fp8Tile* fp8_tiles(Fp8Operand operand, Fp8Sums sums = Fp8Sums::kFast) {
  if (sums == Fp8Sums::kPromoted) {
    return operand == Fp8Operand::kDense ? kFp8PromotedDenseTiles : kFp8PromotedSparseTiles;
  }
  return operand == Fp8Operand::kDense ? kFp8DenseTiles : kFp8SparseTiles;
}
constexpr int fp8_tile_count(Fp8Operand operand) {
  constexpr int kDense = int(sizeof kFp8DenseTiles / sizeof(Fp8Tile));
  constexpr int kSparse = int(sizeof kFp8SparseTiles / sizeof(Fp8Tile));
  if (operand == Fp8Operand::kDense) return kDense;
  return operand == Fp8Operand::kSparseWeight ? kSparse : kSparse - 1;
}

// Rows and columns of D, which is [output channels, tokens] unless the tokens are the sparse operand.
struct Fp8Shape {
  int64_t m, n;
};
constexpr Fp8Shape fp8_shape(Fp8Operand operand, int64_t tokens, int64_t channels) {
  return operand == Fp8Operand::kSparseActivation ? Fp8Shape{tokens, channels} : Fp8Shape{channels, tokens};
}

// Tiles of D; those that fill up a cluster count, empty or not.
constexpr int64_t tiles_of(const Fp8Tile& tile, Fp8Shape shape) {
  const int64_t clusters = (shape.m + tile.m * tile.cluster_m - 1) / (tile.m * tile.cluster_m);
  return clusters * tile.cluster_m * ((shape.n + tile.n - 1) / tile.n);
}

// Whether a stream-K configuration should divide its last tiles: with less than two waves only if K is long.
constexpr bool divides_tiles(const Fp8Tile& tile, Fp8Shape shape, int64_t width, int sm_count) {
  return tile.stream_k && (tiles_of(tile, shape) >= 2 * sm_count || width >= kLongWidth);
}

// Bytes that a stream-K configuration needs at most: CUTLASS divides the tiles of less than two waves, each
// with partial sums in float32 and a barrier per warp group.
constexpr int64_t stream_k_bytes(const Fp8Tile& tile, Fp8Shape shape) {
  if (!tile.stream_k) return 0;
  const int64_t tiles = tiles_of(tile, shape);
  const int64_t divided = tiles < 2 * kMaxSmsSm90 ? tiles : 2 * kMaxSmsSm90;
  return divided * (int64_t(tile.m) * tile.n * 4 + 16) + 256;
}

// Waves of thread blocks over the SMs; less than one takes as long as one. CUTLASS's heuristic divides the
// tiles behind the last full wave when they are less than half a wave.
constexpr double waves(const Fp8Tile& tile, Fp8Shape shape, int64_t width, int sm_count) {
  const int64_t tiles = tiles_of(tile, shape);
  const bool divided = divides_tiles(tile, shape, width, sm_count) && tiles > sm_count;
  if (divided && tiles % sm_count * 2 < sm_count) return double(tiles) / sm_count;
  return double((tiles + sm_count - 1) / sm_count);
}

// The configuration with the least estimated time; the first of equals.
constexpr int choose_fp8_tile(Fp8Operand operand, int64_t tokens, int64_t channels, int64_t width,
                              int sm_count, Fp8Sums sums = Fp8Sums::kFast) {
  const Fp8Tile* const tiles = fp8_tiles(operand, sums);
  const Fp8Shape shape = fp8_shape(operand, tokens, channels);
  int best = 0;
  for (int i = 1; i < fp8_tile_count(operand); ++i) {
    const double time = waves(tiles[i], shape, width, sm_count) * tiles[i].time;
    if (time < waves(tiles[best], shape, width, sm_count) * tiles[best].time) best = i;
  }
  return best;
}

// Measured on an H100: whole waves; 2.2 waves; text tokens.
static_assert(choose_fp8_tile(Fp8Operand::kSparseWeight, 4096, 9216, 3072, 132) == 0);
static_assert(choose_fp8_tile(Fp8Operand::kSparseActivation, 4608, 3072, 3072, 132) == 1);
static_assert(choose_fp8_tile(Fp8Operand::kSparseWeight, 512, 3072, 3072, 132) == 2);
static_assert(choose_fp8_tile(Fp8Operand::kDense, 4608, 3072, 3072, 132) == 2);

// On an H200: 4.9 waves rather than 4.4, 5.5 rather than 6.1; text tokens.
constexpr int choose_promoted_fp8_tile(Fp8Operand operand, int64_t tokens, int64_t channels, int64_t width) {
  return choose_fp8_tile(operand, tokens, channels, width, kMaxSmsSm90, Fp8Sums::kPromoted);
}
static_assert(choose_promoted_fp8_tile(Fp8Operand::kSparseWeight, 4608, 3072, 15360) == 1);
static_assert(choose_promoted_fp8_tile(Fp8Operand::kSparseWeight, 4608, 3840, 10240) == 0);
static_assert(choose_promoted_fp8_tile(Fp8Operand::kSparseWeight, 268, 3072, 15360) == 2);
static_assert(choose_promoted_fp8_tile(Fp8Operand::kDense, 4608, 3072, 15360) == 2);

}  // namespace lynx
