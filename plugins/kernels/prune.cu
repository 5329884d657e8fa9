// SPDX-License-Identifier: Apache-2.0
// The pruning pass: one read of x gives the compressed operand of the sparse GEMM.
//
// A thread block owns 16 rows, its 8 warps share the channels in steps of 64. In a step a lane owns
// one block of 16 channels in rows g and g + 8 (g = lane / 4): two 16-byte loads and one 16-byte store a row,
// one metadata word, and, because a sum over channels has no order, just the fragment that mma.m16n8k16 wants
// for T = z A^T when the lane reads the same 16 channels of A. Norms and T are summed over the warps at the
// end, when the row scale is known and U = T / s can be written behind the kept values.
//
// What x is made into before it is pruned (Producer) happens on the way in. For a norm the thread block reads
// its rows twice before: for the mean and for the variance; they stay in the L1 cache.
#include <type_traits>

#include "activation.h"
#include "launch.h"
#include "sparse24.h"
#include "sparse_linear.h"
#include "tile_config.h"
#include "warp.h"

namespace lynx {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 64;  // channels a warp takes at once: 4 lanes of 16
constexpr int kRows = 16;  // of a thread block

struct PruneArgs {
  const uint16_t* x;      // [rows, channels], in order
  const uint16_t* gate;   // [rows, channels] or null: gelu(x) instead of silu(x) * gate
  const uint16_t* gain;   // [rows / rows_per_gain, channels]
  const uint16_t* shift;  // the same
  int64_t rows_per_gain;
  float epsilon;
  bool rms;
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

// What a kernel is compiled for.
enum class Variant {
  kPlain,    // x as it is, selected by magnitude
  kGeneral,  // with a centre, a saliency or both
  kNorm,     // kPlain of norm(x) * gain + shift
  kAct,      // kPlain of gelu(x) or silu(x) * gate
};

// Thread blocks that share an SM. Two leave a thread 128 registers, what the sums of T for 64 ranks need; up
// to 32 ranks three fit, which spares 288 thread blocks (4608 rows) a second wave on 132 SMs. With 128 ranks
// and anything to do on the way in, one: more would spill.
template <int kRankCap, Variant kVariant>
constexpr int blocks_per_sm() {
  constexpr bool kBusy = kVariant == Variant::kNorm || kVariant == Variant::kAct;
  if (kRankCap == 128 && kVariant != Variant::kPlain) return 1;
  return (kRankCap == 16 || kRankCap == 32) && !kBusy ? 3 : 2;
}

// Where a thread stands in its warp's step.
struct Lane {
  int warp = threadIdx.x / 32;
  int row = threadIdx.x % 32 / 4;  // g: rows g and g + 8 of a tile
  int quad = threadIdx.x % 4;      // which 16 of the 64 channels
};

using Block = uint32_t[kBlock / 2];  // 16 channels, two per word

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

// Mean and reciprocal deviation of a row, and its row of gain and shift.
struct RowStatistics {
  float mean, scale;
  int gain_row;
};
struct BlockStatistics {
  RowStatistics row[kRows];
};

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
  return uint32_t(Element::from_float(low)) | uint32_t(Element::from_float(high)) << 16;
}

// Sum over the channels of (x - centre)^power of a row, by one warp; every lane gets it.
template <class Element, int kPower>
__device__ __forceinline__ float warp_sum(const PruneArgs& args, int64_t row, float centre) {
  float sum = 0.0f;
  for (int channel = int(threadIdx.x % 32) * kBlock; channel < args.channels; channel += 32 * kBlock) {
    Block x;
    load_block(x, args.x + row * args.channels + channel);
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

// Statistics of the thread block's rows, two a warp.
template <class Element>
__device__ __forceinline__ void row_statistics(BlockStatistics& statistics, const PruneArgs& args,
                                               const Lane& lane, int64_t first_row) {
  for (int row = lane.warp; row < kRows; row += kWarps) {
    RowStatistics of_row = {0.0f, 0.0f, 0};
    if (first_row + row < args.rows) {
      const float count = float(args.channels);
      if (!args.rms) of_row.mean = warp_sum<Element, 1>(args, first_row + row, 0.0f) / count;
      const float variance = warp_sum<Element, 2>(args, first_row + row, of_row.mean) / count;
      of_row.scale = __fdiv_rn(1.0f, __fsqrt_rn(variance + args.epsilon));
      of_row.gain_row = int((first_row + row) / args.rows_per_gain);
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

template <class Element>
__device__ __forceinline__ void apply_activation(Block& z, const PruneArgs& args, int64_t row, int channel) {
  if (args.gate == nullptr) {
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      z[i] = pair_of<Element>(gelu_tanh(low_of<Element>(z[i])), gelu_tanh(high_of<Element>(z[i])));
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 gate = load_half(args.gate + row * args.channels + channel, half);
    const uint32_t gates[] = {gate.x, gate.y, gate.z, gate.w};
#pragma unroll
    for (int i = 0; i < kBlock / 4; ++i) {
      uint32_t& pair = z[half * (kBlock / 4) + i];
      pair = pair_of<Element>(silu(low_of<Element>(pair)) * low_of<Element>(gates[i]),
                              silu(high_of<Element>(pair)) * high_of<Element>(gates[i]));
    }
  }
}

// z of one block: rows beyond M and channels beyond K are zero.
template <class Element, Variant kVariant>
__device__ __forceinline__ void load_z(Block& z, const PruneArgs& args, int64_t row, int channel,
                                       const BlockStatistics* statistics) {
  if (row >= args.rows || channel >= args.channels) return clear_block(z);
  load_block(z, args.x + row * args.channels + channel);
  if constexpr (kVariant == Variant::kNorm)
    apply_norm<Element>(z, args, channel, statistics->row[row % kRows]);
  if constexpr (kVariant == Variant::kAct) apply_activation<Element>(z, args, row, channel);
  if (kVariant == Variant::kGeneral && args.centre != nullptr) {
    Block centre;
    load_block(centre, args.centre + channel);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) z[i] = subtract_pair<Element>(z[i], centre[i]);
  }
}

// Compresses one block and stores its values; returns its 16 bits of metadata.
template <class Element, Variant kVariant>
__device__ __forceinline__ uint32_t prune_block(const Block& z, const Block& saliency, const PruneArgs& args,
                                                int64_t row, int channel, RowNorm& norm) {
  const bool scored = kVariant == Variant::kGeneral && args.saliency != nullptr;
  const CompressedBlock block =
      scored ? compress_block<Element>(z, saliency, &norm) : compress_block<Element>(z, nullptr, &norm);
  const uint4 values = {block.values[0], block.values[1], block.values[2], block.values[3]};
  *reinterpret_cast<uint4*>(args.values + row * (args.width / 2) + channel / 2) = values;
  return block.metadata;
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

template <class Element, class Metadata, int kRankCap, Variant kVariant>
__device__ __forceinline__ void prune_rows(const PruneArgs& args) {
  auto& shared = block_shared<Exchange<kRankCap>>();
  const Lane lane;
  const int64_t first_row = int64_t(blockIdx.x) * kRows;
  const BlockStatistics* statistics = nullptr;  // kNorm only
  if constexpr (kVariant == Variant::kNorm) {
    row_statistics<Element>(block_shared<BlockStatistics>(), args, lane, first_row);
    statistics = &block_shared<BlockStatistics>();
  }
  RowNorm norm[2];
  PartialT<kRankCap> t;

  for (int step = lane.warp * kStep; step < args.channels; step += kWarps * kStep) {
    const int channel = step + lane.quad * kBlock;
    Block z[2], saliency;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_z<Element, kVariant>(z[i], args, first_row + i * 8 + lane.row, channel, statistics);
    }
    if (channel < args.channels) {
      if (kVariant == Variant::kGeneral && args.saliency != nullptr)
        load_block(saliency, args.saliency + channel);
      const int64_t row = first_row + lane.row;
      const uint32_t low = prune_block<Element, kVariant>(z[0], saliency, args, row, channel, norm[0]);
      const uint32_t high = prune_block<Element, kVariant>(z[1], saliency, args, row + 8, channel, norm[1]);
      args.metadata[Metadata::word(row, channel / kBlock, args.rows_padded)] = low | high << 16;
    }
    if constexpr (kRankCap > 0) accumulate_t<Element, kRankCap>(t, z, args, lane, channel);
  }

  reduce_scale(shared, norm, args, lane, first_row);
  if constexpr (kRankCap > 0) reduce_t(shared, t, lane);
  write_extension<Element, Metadata>(shared, args, first_row);
}

// wgmma.sp's layout is written on sm_90 alone; other GPUs get empty kernels for it, which nothing launches.
template <class Metadata>
constexpr bool written_here() {
#if defined(__CUDA_ARCH__)
  return std::is_same_v<Metadata, Sm80Metadata> || __CUDA_ARCH__ == 900;
#else
  return true;
#endif
}

template <class Element, class Metadata, int kRankCap, Variant kVariant>
__global__ void __launch_bounds__(kThreads, (blocks_per_sm<kRankCap, kVariant>()))
    prune_kernel(const PruneArgs args) {
  if constexpr (written_here<Metadata>()) {
    prune_rows<Element, Metadata, kRankCap, kVariant>(args);
  }
}

template <class Element, class Metadata, Variant kVariant>
cudaError_t launch_for_rank(const PruneArgs& args, cudaStream_t stream) {
  void (*kernel)(PruneArgs) = prune_kernel<Element, Metadata, kMaxRank, kVariant>;
  if (args.rank == 0) {
    kernel = prune_kernel<Element, Metadata, 0, kVariant>;
  } else if (args.rank <= 16) {
    kernel = prune_kernel<Element, Metadata, 16, kVariant>;
  } else if (args.rank <= 32) {
    kernel = prune_kernel<Element, Metadata, 32, kVariant>;
  } else if (args.rank <= 64) {
    kernel = prune_kernel<Element, Metadata, 64, kVariant>;
  }
  return launch_kernel(kernel, unsigned(args.rows_padded / kRows), kThreads, 0, stream, args);
}

template <class Element, class Metadata>
cudaError_t launch_variant(Producer producer, const PruneArgs& args, cudaStream_t stream) {
  if (producer == Producer::kNorm) return launch_for_rank<Element, Metadata, Variant::kNorm>(args, stream);
  if (producer != Producer::kNone) return launch_for_rank<Element, Metadata, Variant::kAct>(args, stream);
  const bool general = args.centre != nullptr || args.saliency != nullptr;
  return general ? launch_for_rank<Element, Metadata, Variant::kGeneral>(args, stream)
                 : launch_for_rank<Element, Metadata, Variant::kPlain>(args, stream);
}

template <class Metadata>
cudaError_t launch_for_dtype(const SparseLinearParams& params, const PruneArgs& args, cudaStream_t stream) {
  return params.dtype == DType::kBf16 ? launch_variant<Bf16, Metadata>(params.producer, args, stream)
                                      : launch_variant<Fp16, Metadata>(params.producer, args, stream);
}

}  // namespace

cudaError_t launch_prune(const SparseLinearParams& params, const CompressedOperand& out,
                         cudaStream_t stream) {
  if (params.order != nullptr) {
    const cudaError_t error = launch_reorder(params, out.reordered, stream);
    if (error != cudaSuccess) return error;
  }
  PruneArgs args{};
  if (params.producer == Producer::kNorm) {
    args.gain = static_cast<const uint16_t*>(params.gain);
    args.shift = static_cast<const uint16_t*>(params.shift);
    args.rows_per_gain = params.rows / params.gain_rows;
    args.epsilon = params.epsilon;
    args.rms = params.rms;
  }
  if (params.producer == Producer::kGated) args.gate = static_cast<const uint16_t*>(params.gate);
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
  return out.kernels == Kernels::kSm90 ? launch_for_dtype<Sm90Metadata<kAtomWidthSm90>>(params, args, stream)
                                       : launch_for_dtype<Sm80Metadata>(params, args, stream);
}

}  // namespace lynx
