// SPDX-License-Identifier: Apache-2.0
// The pruning pass's way in: what x is made into (Producer) before it is pruned. For a norm the thread block
// reads its rows twice before: for the mean and for the variance; they stay in the L1 cache.
#pragma once

#include "activation.h"
#include "prune_tile.cuh"

namespace lynx {
namespace {

// Mean and reciprocal deviation of a row, and its row of gain and shift.
struct RowStatistics {
  float mean, scale;
  int gain_row;
};
struct BlockStatistics {
  RowStatistics row[kRows];
};

// Sum over the channels of (x - centre)^power of a row, by one warp; every lane gets it.
template <class Element, int kPower>
__device__ __forceinline__ float warp_sum(const PruneArgs& args, const Tile& tile, int row, float centre) {
  float sum = 0.0f;
  for (int channel = int(threadIdx.x % 32) * kBlock; channel < args.channels; channel += 32 * kBlock) {
    Block x;
    load_block(x, tile.x + unsigned(row * args.channels + channel));
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      const float low = low_of<Element>(x[i]) - centre, high = high_of<Element>(x[i]) - centre;
      sum += kPower == 2 ? low * low + high * high : low + high;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Statistics of the thread block's rows, which its warps share.
template <class Element, int kWarps>
__device__ __forceinline__ void row_statistics(BlockStatistics& statistics, const PruneArgs& args,
                                               const Tile& tile, const Lane& lane) {
  for (int row = lane.warp; row < kRows; row += kWarps) {
    RowStatistics of_row = {0.0f, 0.0f, 0};
    if (row < tile.rows) {
      const float count = float(args.channels);
      if (!args.rms) of_row.mean = warp_sum<Element, 1>(args, tile, row, 0.0f) / count;
      const float variance = warp_sum<Element, 2>(args, tile, row, of_row.mean) / count;
      of_row.scale = __fdiv_rn(1.0f, __fsqrt_rn(variance + args.epsilon));
      // fault: row of the gain
      of_row.gain_row = int((tile.first_row + row) / args.rows_per_gain);
    }
    if (threadIdx.x % 32 == 0) statistics.row[row] = of_row;
  }
  __syncthreads();
}

template <class Element>
__device__ __forceinline__ void apply_norm(Block& z, const PruneArgs& args, int channel,
                                           const RowStatistics& of_row) {
  const int64_t at = int64_t(of_row.gain_row) * args.channels + channel;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the block: a thread has no registers to spare
    const uint4 gain = load_half(args.gain + at, half), shift = load_half(args.shift + at, half);
    const uint32_t gains[] = {gain.x, gain.y, gain.z, gain.w},
                   shifts[] = {shift.x, shift.y, shift.z, shift.w};
#pragma unroll
    for (int i = 0; i < kBlock / 4; ++i) {
      uint32_t& pair = z[half * (kBlock / 4) + i];
      const float low = (low_of<Element>(pair) - of_row.mean) * of_row.scale;
      const float high = (high_of<Element>(pair) - of_row.mean) * of_row.scale;
      pair = pair_of<Element>(low * low_of<Element>(gains[i]) + low_of<Element>(shifts[i]),
                              high * high_of<Element>(gains[i]) + high_of<Element>(shifts[i]));
    }
  }
}

template <class Element, class Activate>
__device__ __forceinline__ void apply_gate(Block& z, const uint16_t* from, const Activate& activate) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 gate = load_half(from, half);
    const uint32_t gates[] = {gate.x, gate.y, gate.z, gate.w};
#pragma unroll
    for (int i = 0; i < kBlock / 4; ++i) {
      uint32_t& pair = z[half * (kBlock / 4) + i];
      pair = pair_of<Element>(activate(low_of<Element>(pair)) * low_of<Element>(gates[i]),
                              activate(high_of<Element>(pair)) * high_of<Element>(gates[i]));
    }
  }
}

template <class Element>
__device__ __forceinline__ void apply_activation(Block& z, const PruneArgs& args, const Tile& tile,
                                                 unsigned at) {
  with_activation(args.activation, [&](auto activate) {
    if (tile.gate != nullptr) return apply_gate<Element>(z, tile.gate + at, activate);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      z[i] = pair_of<Element>(activate(low_of<Element>(z[i])), activate(high_of<Element>(z[i])));
    }
  });
}

// z of one block: rows beyond M and channels beyond K are zero.
template <class Element, Variant kVariant>
__device__ __forceinline__ void load_z(Block& z, const PruneArgs& args, const Tile& tile, int row,
                                       int channel, const BlockStatistics* statistics) {
  // fault: last row
  if (row >= tile.rows || channel >= args.channels) return clear_block(z);
  const unsigned at = unsigned(row * args.x_stride + channel);
  load_block(z, tile.x + at);
  if constexpr (kVariant == Variant::kNorm) apply_norm<Element>(z, args, channel, statistics->row[row]);
  if constexpr (kVariant == Variant::kAct) apply_activation<Element>(z, args, tile, at);
}

}  // namespace
}  // namespace lynx
