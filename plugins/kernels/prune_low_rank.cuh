// SPDX-License-Identifier: Apache-2.0
// The pruning pass's sums over the channels, norms and T = z A^T, and its end: the row scale and U = T / s
// behind the kept values. A warp has registers for 64 ranks: of 128, two warps sum one half each over the
// same channels, and prune one half each.
#pragma once

#include "prune_tile.cuh"

namespace lynx {
namespace {

// A warp's part of T for 16 rows and its ranks: [n tile of 8 ranks][mma accumulator].
template <class W>
struct PartialT {
  float sum[W::kRanks / 8 + (W::kRanks == 0)][4] = {};
};

// T += z A^T over one step. Every lane of the warp takes part; channels beyond K are zero on both sides. The
// loads of A come from L2 and must run ahead of the products, hence no branch; but of all of them at a time
// only where there is nothing else to do with the registers.
template <class Element, class W>
__device__ __forceinline__ void accumulate_t(PartialT<W>& t, const Block (&z)[2], const PruneArgs& args,
                                             const Lane& lane, int channel) {
  const int first_rank = lane.warp % W::kTeam * W::kRanks;  // fault: ranks of a team
#pragma unroll
  for (int n = 0; n < W::kRanks / 8; ++n) {
    Block down;
    const int rank = first_rank + 8 * n;
    if (!W::kPlain && n == W::kRanks / 16 && rank >= args.rank) break;
    // fault: last rank
    if (rank < args.rank && channel < args.channels) {
      // fault: rank of T
      load_block(down, args.lora_down + unsigned((rank + lane.row) * args.channels + channel));
    } else {
      clear_block(down);
    }
#pragma unroll
    for (int q = 0; q < kBlock / 2; q += 2) {
      // fault: fragments
      mma_m16n8k16<Element>(t.sum[n], z[0][q], z[1][q], z[0][q + 1], z[1][q + 1], down[q], down[q + 1]);
    }
  }
}

// What the warps of a thread block exchange.
template <class W>
struct Exchange {
  static constexpr int kSums = W::kCount / 2 * kRows * W::kRanks;
  RowNorm norm[W::kCount][kRows];
  float scale[kRows];
  float t[kSums > 0 ? kSums : 1];  // by accumulator, of half the warps; at the end T [kRows][kCap]
};

// Sums the norms over lanes and warps in a fixed order; the first kRows threads get those of a row each.
template <class W>
__device__ __forceinline__ RowNorm reduce_norm(Exchange<W>& shared, RowNorm (&norm)[2], const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    RowNorm& sum = norm[i];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum.all += __shfl_xor_sync(~0u, sum.all, step);
      sum.kept += __shfl_xor_sync(~0u, sum.kept, step);
    }
    if (lane.quad == 0) shared.norm[lane.warp][i * 8 + lane.row] = sum;
  }
  __syncthreads();  // fault: barrier of the norms
  RowNorm sum;
  for (int warp = 0; threadIdx.x < kRows && warp < W::kCount; ++warp) {
    sum.all += shared.norm[warp][threadIdx.x].all;
    sum.kept += shared.norm[warp][threadIdx.x].kept;
  }
  return sum;
}

// Sums T over the teams as a tree, in a fixed order; leaves it in shared.t.
template <class W>
__device__ __forceinline__ void reduce_t(Exchange<W>& shared, PartialT<W>& t, const Lane& lane) {
  constexpr int kSums = W::kRanks / 8 * 4;
  float* sums = &t.sum[0][0];
#pragma unroll
  for (int half = W::kCount / 2; half >= W::kTeam; half /= 2) {
    float* slot = shared.t + lane.warp % half * kSums * 32 + threadIdx.x % 32;
    if (lane.warp >= half && lane.warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) slot[i * 32] = sums[i];
    }
    __syncthreads();
    if (lane.warp < half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += slot[i * 32];
    }
    __syncthreads();  // fault: barrier of T
  }
  if (lane.warp < W::kTeam) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int n = i / 4, sub = i % 4;
      const int row = lane.row + 8 * (sub / 2),
                rank = lane.warp * W::kRanks + n * 8 + lane.quad * 2 + sub % 2;
      shared.t[row * W::kCap + rank] = sums[i];
    }
  }
  __syncthreads();
}

// The end of a tile: T [kRows, stride] and the row scales, both in shared memory.
struct TileSums {
  const float* t;
  int stride;
  const float* scale;
};

// Stores the row's scale, from its norms.
__device__ __forceinline__ void store_scale(float* shared_scale, const PruneArgs& args, int64_t first_row,
                                            const RowNorm& norm) {
  const float scale = args.norm_scale ? norm_scale(norm) : 1.0f;
  shared_scale[threadIdx.x] = scale;
  args.scale[first_row + threadIdx.x] = scale;
}

// Eight values of U [rows, rank]; zeros behind the last rank.
template <class Element>
__device__ __forceinline__ uint4 low_rank_block(const TileSums& sums, const PruneArgs& args, int row,
                                                int block) {
  uint32_t pairs[kKeptPerBlock / 2] = {};
  if (block * kKeptPerBlock < args.rank) {
    const float* t = sums.t + row * sums.stride + block * kKeptPerBlock;
    const float scale = sums.scale[row];  // fault: row of the scale
#pragma unroll
    for (int i = 0; i < kKeptPerBlock / 2; ++i) {
      pairs[i] = uint32_t(low_rank_value<Element>(t[2 * i], scale)) |
                 uint32_t(low_rank_value<Element>(t[2 * i + 1], scale)) << 16;
    }
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Writes the columns K .. K' of `rows` rows of the compressed operand, from `first_row` of a tile: U, then
// zeros, all under the nibble of an empty group.
template <class Element, class Metadata, int kThreads>
__device__ __forceinline__ void write_extension(const TileSums& sums, const PruneArgs& args,
                                                int64_t first_row, int rows = kRows) {
  const int first_block = args.channels / kBlock, blocks = args.width / kBlock - first_block;
  for (int i = threadIdx.x; i < rows * blocks; i += kThreads) {
    const int row = i / blocks, block = i % blocks;
    uint16_t* to = args.values + (first_row + row) * (args.width / 2) + (first_block + block) * kKeptPerBlock;
    *reinterpret_cast<uint4*>(to) = low_rank_block<Element>(sums, args, row, block);
    if (((first_row + row) & 8) == 0) {  // fault: rows of the extension
      args.metadata[Metadata::word(first_row + row, first_block + block, args.rows_padded)] =
          kEmptyMetadataPair;
    }
  }
}

// Where the sums of a part are: part_stride floats from one to the next.
struct Part {
  RowNorm* norm;  // [kRows]
  float* t;       // [kRows, rank]
};

// fault: size of a part
__device__ __forceinline__ int part_stride(const PruneArgs& args) { return kRows * (2 + args.rank); }

__device__ __forceinline__ Part part_of(const PruneArgs& args, int part) {
  float* const at = args.parts + int64_t(part) * part_stride(args);
  return {reinterpret_cast<RowNorm*>(at), at + 2 * kRows};
}

}  // namespace
}  // namespace lynx
