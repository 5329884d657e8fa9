// SPDX-License-Identifier: Apache-2.0
// The pruning pass: one read of x gives the compressed operand of the sparse GEMM.
//
// A thread block owns 16 rows, its 8 warps share the channels in steps of 64. In a step a lane owns
// one block of 16 channels in rows g and g + 8 (g = lane / 4): two 16-byte loads and one 16-byte store a row,
// one metadata word, and, because a sum over channels has no order, just the fragment that mma.m16n8k16 wants
// for T = z A^T when the lane reads the same 16 channels of A. Norms and T are summed over the warps at the
// end, when the row scale is known and U = T / s can be written behind the kept values.
#include "sparse24.h"
#include "sparse_linear.h"
#include "tile_config.h"

namespace lynx {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 64;  // channels a warp takes at once: 4 lanes of 16
constexpr int kRows = 16;  // of a thread block

struct PruneArgs {
  const uint16_t* x;          // [rows, channels], in order
  const uint16_t* lora_down;  // [rank, channels]
  const uint16_t* centre;     // [channels] or null
  const uint16_t* saliency;   // [channels] or null
  uint16_t* values;           // [rows_padded, width / 2]
  uint32_t* metadata;         // layout `Metadata`
  float* scale;               // [rows_padded]
  int64_t rows, rows_padded;
  int channels, width, rank;
  bool norm_scale;
};

// Thread blocks that share an SM. Two leave a thread 128 registers, what the sums of T for 64 ranks and more
// need; up to 32 ranks three fit, which spares 288 thread blocks (4608 rows) a second wave on 132 SMs.
template <int kRankCap>
constexpr int kBlocksPerSm = kRankCap == 32 ? 3 : 2;

// Where a thread stands in its warp's step.
struct Lane {
  int warp = threadIdx.x / 32;
  int row = threadIdx.x % 32 / 4;  // g: rows g and g + 8 of a tile
  int quad = threadIdx.x % 4;      // which 16 of the 64 channels
};

using Block = uint32_t[kBlock / 2];  // 16 channels, two per word

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

// z of one block: rows beyond M and channels beyond K are zero.
template <class Element, bool kGeneral>
__device__ __forceinline__ void load_z(Block& z, const PruneArgs& args, int64_t row, int channel) {
  if (row >= args.rows || channel >= args.channels) return clear_block(z);
  load_block(z, args.x + row * args.channels + channel);
  if (kGeneral && args.centre != nullptr) {
    Block centre;
    load_block(centre, args.centre + channel);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) z[i] = subtract_pair<Element>(z[i], centre[i]);
  }
}

// Compresses one block and stores its values; returns its 16 bits of metadata.
template <class Element, bool kGeneral>
__device__ __forceinline__ uint32_t prune_block(const Block& z, const Block& saliency, const PruneArgs& args,
                                                int64_t row, int channel, RowNorm& norm) {
  const bool scored = kGeneral && args.saliency != nullptr;
  const CompressedBlock block =
      scored ? compress_block<Element>(z, saliency, &norm) : compress_block<Element>(z, nullptr, &norm);
  const uint4 values = {block.values[0], block.values[1], block.values[2], block.values[3]};
  *reinterpret_cast<uint4*>(args.values + row * (args.width / 2) + channel / 2) = values;
  return block.metadata;
}

template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Fp16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A warp's part of T for 16 rows: [n tile of 8 ranks][mma accumulator].
template <int kRankCap>
struct PartialT {
  float sum[kRankCap / 8][4] = {};
};

template <>
struct PartialT<0> {};

// T += z A^T over one step. Every lane of the warp takes part; channels beyond K are zero on both sides. No
// branch leaves the loop early, so that the loads of A, which come from L2, may run ahead of the products.
template <class Element, int kRankCap>
__device__ __forceinline__ void accumulate_t(PartialT<kRankCap>& t, const Block (&z)[2],
                                             const PruneArgs& args, const Lane& lane, int channel) {
#pragma unroll
  for (int n = 0; n < kRankCap / 8; ++n) {
    Block down;
    if (8 * n < args.rank && channel < args.channels) {
      load_block(down, args.lora_down + int64_t(8 * n + lane.row) * args.channels + channel);
    } else {
      clear_block(down);
    }
#pragma unroll
    for (int q = 0; q < kBlock / 2; q += 2) {
      mma_m16n8k16<Element>(t.sum[n], z[0][q], z[1][q], z[0][q + 1], z[1][q + 1], down[q], down[q + 1]);
    }
  }
}

// What the warps of a thread block exchange.
template <int kRankCap>
struct Exchange {
  RowNorm norm[kWarps][kRows];
  float scale[kRows];
  float t[kWarps / 2]
         [kRows * kRankCap];  // partial sums by accumulator; at the end t[1] is T [kRows][kRankCap]
};

template <>
struct Exchange<0> {
  RowNorm norm[kWarps][kRows];
  float scale[kRows];
};

// Sums the norms over lanes and warps in a fixed order; leaves the row scales in shared and global memory.
template <int kRankCap>
__device__ __forceinline__ void reduce_scale(Exchange<kRankCap>& shared, RowNorm (&norm)[2],
                                             const PruneArgs& args, const Lane& lane, int64_t first_row) {
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
  __syncthreads();
  if (threadIdx.x < kRows) {
    RowNorm sum;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum.all += shared.norm[warp][threadIdx.x].all;
      sum.kept += shared.norm[warp][threadIdx.x].kept;
    }
    const float scale = args.norm_scale ? norm_scale(sum) : 1.0f;
    shared.scale[threadIdx.x] = scale;
    args.scale[first_row + threadIdx.x] = scale;
  }
  __syncthreads();
}

// Sums T over the warps as a tree, in a fixed order; leaves it in shared.t[1] as [kRows][kRankCap].
template <int kRankCap>
__device__ __forceinline__ void reduce_t(Exchange<kRankCap>& shared, PartialT<kRankCap>& t,
                                         const Lane& lane) {
  constexpr int kSums = kRankCap / 8 * 4;
  const int thread = threadIdx.x % 32;
  float* sums = &t.sum[0][0];
#pragma unroll
  for (int half = kWarps / 2; half > 0; half /= 2) {
    if (lane.warp >= half && lane.warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) shared.t[lane.warp - half][i * 32 + thread] = sums[i];
    }
    __syncthreads();
    if (lane.warp < half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += shared.t[lane.warp][i * 32 + thread];
    }
    __syncthreads();
  }
  if (lane.warp == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int n = i / 4, sub = i % 4;
      const int row = lane.row + 8 * (sub / 2);
      shared.t[1][row * kRankCap + n * 8 + lane.quad * 2 + sub % 2] = sums[i];
    }
  }
  __syncthreads();
}

// Eight values of U [rows, rank]; zeros behind the last rank.
template <class Element, int kRankCap>
__device__ __forceinline__ uint4 low_rank_block(const Exchange<kRankCap>& shared, const PruneArgs& args,
                                                int row, int block) {
  uint32_t pairs[kKeptPerBlock / 2] = {};
  if constexpr (kRankCap > 0) {
    if (block * kKeptPerBlock < args.rank) {
      const float* t = shared.t[1] + row * kRankCap + block * kKeptPerBlock;
      const float scale = shared.scale[row];
#pragma unroll
      for (int i = 0; i < kKeptPerBlock / 2; ++i) {
        pairs[i] = uint32_t(low_rank_value<Element>(t[2 * i], scale)) |
                   uint32_t(low_rank_value<Element>(t[2 * i + 1], scale)) << 16;
      }
    }
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Writes the columns K .. K' of the compressed operand: U, then zeros, all under the nibble of an empty
// group.
template <class Element, class Metadata, int kRankCap>
__device__ __forceinline__ void write_extension(const Exchange<kRankCap>& shared, const PruneArgs& args,
                                                int64_t first_row) {
  const int first_block = args.channels / kBlock, blocks = args.width / kBlock - first_block;
  for (int i = threadIdx.x; i < kRows * blocks; i += kThreads) {
    const int row = i / blocks, block = i % blocks;
    uint16_t* to = args.values + (first_row + row) * (args.width / 2) + (first_block + block) * kKeptPerBlock;
    *reinterpret_cast<uint4*>(to) = low_rank_block<Element>(shared, args, row, block);
    if ((row & 8) == 0) {
      args.metadata[Metadata::word(first_row + row, first_block + block, args.rows_padded)] =
          kEmptyMetadataPair;
    }
  }
}

template <class Element, class Metadata, int kRankCap, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kRankCap>) prune_kernel(const PruneArgs args) {
  __shared__ Exchange<kRankCap> shared;
  const Lane lane;
  const int64_t first_row = int64_t(blockIdx.x) * kRows;
  RowNorm norm[2];
  PartialT<kRankCap> t;

  for (int step = lane.warp * kStep; step < args.channels; step += kWarps * kStep) {
    const int channel = step + lane.quad * kBlock;
    Block z[2], saliency;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_z<Element, kGeneral>(z[i], args, first_row + i * 8 + lane.row, channel);
    }
    if (channel < args.channels) {
      if (kGeneral && args.saliency != nullptr) load_block(saliency, args.saliency + channel);
      const int64_t row = first_row + lane.row;
      const uint32_t low = prune_block<Element, kGeneral>(z[0], saliency, args, row, channel, norm[0]);
      const uint32_t high = prune_block<Element, kGeneral>(z[1], saliency, args, row + 8, channel, norm[1]);
      args.metadata[Metadata::word(row, channel / kBlock, args.rows_padded)] = low | high << 16;
    }
    if constexpr (kRankCap > 0) accumulate_t<Element, kRankCap>(t, z, args, lane, channel);
  }

  reduce_scale(shared, norm, args, lane, first_row);
  if constexpr (kRankCap > 0) reduce_t(shared, t, lane);
  write_extension<Element, Metadata>(shared, args, first_row);
}

template <class Element, class Metadata, int kRankCap>
cudaError_t launch(const PruneArgs& args, cudaStream_t stream) {
  const bool general = args.centre != nullptr || args.saliency != nullptr;
  const unsigned grid = unsigned(args.rows_padded / kRows);
  if (general) {
    prune_kernel<Element, Metadata, kRankCap, true><<<grid, kThreads, 0, stream>>>(args);
  } else {
    prune_kernel<Element, Metadata, kRankCap, false><<<grid, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

template <class Element, class Metadata>
cudaError_t launch_for_rank(const PruneArgs& args, cudaStream_t stream) {
  if (args.rank == 0) return launch<Element, Metadata, 0>(args, stream);
  if (args.rank <= 32) return launch<Element, Metadata, 32>(args, stream);
  if (args.rank <= 64) return launch<Element, Metadata, 64>(args, stream);
  return launch<Element, Metadata, kMaxRank>(args, stream);
}

template <class Metadata>
cudaError_t launch_for_dtype(DType dtype, const PruneArgs& args, cudaStream_t stream) {
  return dtype == DType::kBf16 ? launch_for_rank<Bf16, Metadata>(args, stream)
                               : launch_for_rank<Fp16, Metadata>(args, stream);
}

}  // namespace

cudaError_t launch_prune(const SparseLinearParams& params, const CompressedOperand& out,
                         cudaStream_t stream) {
  if (params.order != nullptr) {
    const cudaError_t error = launch_reorder(params, out.reordered, stream);
    if (error != cudaSuccess) return error;
  }
  PruneArgs args;
  args.x = static_cast<const uint16_t*>(params.order == nullptr ? params.x : out.reordered);
  args.lora_down = static_cast<const uint16_t*>(params.lora_down);
  args.centre = static_cast<const uint16_t*>(params.centre);
  args.saliency = static_cast<const uint16_t*>(params.saliency);
  args.values = static_cast<uint16_t*>(out.values);
  args.metadata = out.metadata;
  args.scale = out.scale;
  args.rows = params.rows;
  args.rows_padded = padded_rows(params.rows);
  args.channels = params.channels;
  args.width = int(padded_width(params.channels, params.rank));
  args.rank = params.rank;
  args.norm_scale = params.norm_scale;
  return out.kernels == Kernels::kSm90
             ? launch_for_dtype<Sm90Metadata<kAtomWidthSm90>>(params.dtype, args, stream)
             : launch_for_dtype<Sm80Metadata>(params.dtype, args, stream);
}

}  // namespace lynx
