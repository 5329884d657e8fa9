// SPDX-License-Identifier: Apache-2.0
// What the jobs of the pruning pass share: its arguments, and what a thread block, a warp and a lane have to
// do.
//
// A thread block owns a tile of 16 rows, its warps share the channels in steps of 64. In a step a lane owns
// one block of 16 channels in rows g and g + 8 (g = lane / 4): two 16-byte loads and one 16-byte store a row,
// one metadata word, and, because a sum over channels has no order, just the fragment that mma.m16n8k16 wants
// for T = z A^T when the lane reads the same 16 channels of A.
#pragma once

#include "launch.h"
#include "prune_grid.h"
#include "sparse24.h"
#include "sparse_linear.h"
#include "tile_config.h"
#include "warp.h"

namespace lynx {
namespace {

constexpr int kStep = 64;          // channels a warp takes at once: 4 lanes of 16
constexpr int kRows = kPruneRows;  // of a thread block

// What a kernel is compiled for.
enum class Variant {
  kPlain,  // x as it is
  kNorm,   // norm(x) * gain + shift
  kAct,    // activation(x), perhaps times a gate
};

// The warps of a thread block that prunes with up to `kRankCap` ranks.
template <int kRankCap, Variant kVariant>
struct Warps {
  static constexpr bool kPlain = kVariant == Variant::kPlain;
  static constexpr int kCap = kRankCap;
  static constexpr int kRanks = kRankCap < 64 ? kRankCap : 64;             // that a warp sums
  static constexpr int kTeam = kRankCap > kRanks ? kRankCap / kRanks : 1;  // warps at the same channels
  static constexpr int kTeams = 8;
  static constexpr int kCount = kTeam * kTeams;
  static constexpr int kThreads = 32 * kCount;
  // Thread blocks that share an SM, from the registers they need: 16 warps of 128 with 64 ranks each or a
  // producer, else 24 of 80.
  static constexpr int kBlocksPerSm = kTeam > 1 ? 1 : kRanks == 64 || !kPlain ? 2 : 3;
};

struct PruneArgs {
  const uint16_t* x;     // [rows, channels], x_stride apart
  const uint16_t* gate;  // the same, or null: no gate
  int x_stride;
  Activation activation;
  const uint16_t* gain;   // [rows / rows_per_gain, channels]
  const uint16_t* shift;  // the same
  int64_t rows_per_gain;
  float epsilon;
  bool rms;
  const uint16_t* lora_down;  // [rank, channels]
  uint16_t* values;           // [rows_padded, width / 2]
  uint32_t* metadata;         // layout `Metadata`
  float* scale;               // [rows_padded]
  float* parts;               // of each part of a shared tile: |z|^2 and |z~|^2 of its rows, T [kRows, rank]
  PruneGrid grid;
  int part_channels;  // of a part of a shared tile
  int inverse_parts;  // 2^16 / grid.parts, rounded up: a thread block's part divides by it exactly
  int64_t rows, rows_padded;
  int channels, width, rank;
  bool norm_scale;
};

// Where a thread stands in its warp's step.
struct Lane {
  int warp = threadIdx.x / 32;
  int row = threadIdx.x % 32 / 4;  // g: rows g and g + 8 of a tile
  int quad = threadIdx.x % 4;      // which 16 of the 64 channels
};

using Block = uint32_t[kBlock / 2];  // 16 channels, two per word

// What a thread block prunes: a tile, or a part of a shared one. Pointers and numbers that all its threads
// share, offsets of 32 bits and no division: everything else takes registers that the sums of T need.
struct Tile {
  int first_row;
  int rows;                  // that are not padding; none or less: all are
  const uint16_t *x, *gate;  // [kRows, channels], x_stride apart
  uint16_t* values;          // [kRows, width / 2]
  int begin, end;            // channels, in steps
  int part;                  // of all parts of the shared tiles; negative: a whole tile
};

__device__ __forceinline__ Tile tile_of(const PruneArgs& args, int block) {
  const PruneGrid& grid = args.grid;
  Tile tile;
  tile.part = block - grid.whole;
  const bool whole = tile.part < 0;
  const int shared = whole ? tile.part : tile.part * args.inverse_parts >> 16;
  tile.begin = whole ? 0 : (tile.part - shared * grid.parts) * args.part_channels;
  // fault: channels of a part
  tile.end = min(whole ? args.channels : tile.begin + args.part_channels, args.channels);
  tile.first_row = (grid.whole + shared) * kRows;  // fault: shared tile
  tile.rows = int(min(int64_t(kRows), args.rows - tile.first_row));
  tile.x = args.x + int64_t(tile.first_row) * args.x_stride;  // fault: address of a tile
  tile.gate = args.gate == nullptr ? nullptr : args.gate + int64_t(tile.first_row) * args.x_stride;
  tile.values = args.values + int64_t(tile.first_row) * (args.width / 2);
  return tile;
}

// Eight channels of a block, the lower or the upper.
__device__ __forceinline__ uint4 load_half(const uint16_t* from, int half) {
  return __ldg(reinterpret_cast<const uint4*>(from) + half);
}

__device__ __forceinline__ void load_block(Block& out, const uint16_t* from) {
  const uint4 low = __ldg(reinterpret_cast<const uint4*>(from));
  const uint4 high = __ldg(reinterpret_cast<const uint4*>(from) + 1);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

__device__ __forceinline__ void clear_block(Block& out) {
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) out[i] = 0;
}

template <class Element>
__device__ __forceinline__ float low_of(uint32_t pair) {
  return Element::to_float(uint16_t(pair));
}
template <class Element>
__device__ __forceinline__ float high_of(uint32_t pair) {
  return Element::to_float(uint16_t(pair >> 16));
}
template <class Element>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return uint32_t(Element::from_float(low)) | uint32_t(Element::from_float(high)) << 16;  // fault: pair
}

}  // namespace
}  // namespace lynx
