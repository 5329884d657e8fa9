// SPDX-License-Identifier: Apache-2.0
// The pruning pass: one read of x gives the compressed operand of the sparse GEMM. Included by the small
// instantiation files prune_*.cu, which compile in parallel.
//
// Tiles that would leave most of the GPU idle, of few tokens or behind the last full wave, are shared by
// several thread blocks (prune_grid.h), each of which takes a part of the channels; a second kernel adds
// their sums up.
#pragma once

#include "producer.h"
#include "prune_low_rank.cuh"
#include "prune_produce.cuh"
#include "prune_select.cuh"
#include "sparse_gemm.h"

namespace lynx {
namespace {

template <class Element, class Metadata, int kRankCap, Variant kVariant>
__device__ __forceinline__ void prune_rows(const PruneArgs& args) {
  using W = Warps<kRankCap, kVariant>;
  auto& shared = block_shared<Exchange<W>>();
  const Lane lane;
  const Tile tile = tile_of(args, int(blockIdx.x));
  const BlockStatistics* statistics = nullptr;  // kNorm only
  if constexpr (kVariant == Variant::kNorm) {
    row_statistics<Element, W::kCount>(block_shared<BlockStatistics>(), args, tile, lane);
    statistics = &block_shared<BlockStatistics>();
  }
  RowNorm norm[2];
  PartialT<W> t;

#pragma unroll 1
  for (int step = tile.begin + lane.warp / W::kTeam * kStep; step < tile.end; step += W::kTeams * kStep) {
    const int channel = step + lane.quad * kBlock;
    Block z[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_z<Element, kVariant>(z[i], args, tile, lane.row + i * 8, channel, statistics);
    }
    if (channel < args.channels) {
      prune_step<Element, Metadata, W::kTeam>(z, args, tile, lane, channel, norm);
    }
    if constexpr (kRankCap > 0) accumulate_t<Element, W>(t, z, args, lane, channel);
  }
  if (W::kTeam == 2 && lane.warp % 2 != 0) norm[1] = norm[0], norm[0] = RowNorm();

  const RowNorm row_norm = reduce_norm(shared, norm, lane);
  if constexpr (kRankCap > 0) reduce_t(shared, t, lane);
  if (tile.part < 0) {
    if (threadIdx.x < kRows) store_scale(shared.scale, args, tile.first_row, row_norm);
    __syncthreads();
    const TileSums sums = {shared.t, kRankCap, shared.scale};
    write_extension<Element, Metadata, W::kThreads>(sums, args, tile.first_row);
  } else {
    const Part part = part_of(args, tile.part);
    if (threadIdx.x < kRows) part.norm[threadIdx.x] = row_norm;
    for (int i = threadIdx.x; i < kRows * args.rank; i += W::kThreads) {
      part.t[i] = shared.t[i / args.rank * kRankCap + i % args.rank];
    }
  }
}

template <class Element, class Metadata, int kRankCap, Variant kVariant>
__global__ void __launch_bounds__(Warps<kRankCap, kVariant>::kThreads,
                                  (Warps<kRankCap, kVariant>::kBlocksPerSm))
    prune_kernel(const PruneArgs args) {
  prune_rows<Element, Metadata, kRankCap, kVariant>(args);
}

// Adds up what the parts of a shared tile have left, and ends the tile. It is all latency: a thread has a sum
// or two, and all its loads in flight at a time.
constexpr int kFinishRows = 4;  // of a thread block
constexpr int kFinishThreads = 256;

// The sum of `parts` numbers `stride` apart, in order.
__device__ __forceinline__ float sum_of_parts(const float* from, int stride, int parts) {
  float part[kMostSharing], sum = 0.0f;
#pragma unroll
  // fault: sums of the parts
  for (int i = 0; i < kMostSharing; ++i) part[i] = i < parts ? from[i * stride] : 0.0f;
#pragma unroll
  for (int i = 0; i < kMostSharing; ++i) sum += part[i];
  return sum;
}

template <class Element, class Metadata>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const PruneArgs args) {
  struct Shared {
    float scale[kFinishRows], t[kFinishRows * kMaxRank];
  };
  auto& shared = block_shared<Shared>();
  constexpr int kBlocksPerTile = kRows / kFinishRows;
  const int tile = int(blockIdx.x) / kBlocksPerTile, row = int(blockIdx.x) % kBlocksPerTile * kFinishRows;
  const int64_t first_row = int64_t(args.grid.whole + tile) * kRows + row;
  const Part part = part_of(args, tile * args.grid.parts);
  const int stride = part_stride(args);
  if (threadIdx.x < kFinishRows) {
    const RowNorm& norm = part.norm[row + threadIdx.x];  // fault: row of a norm
    RowNorm sum;
    sum.all = sum_of_parts(&norm.all, stride, args.grid.parts);
    sum.kept = sum_of_parts(&norm.kept, stride, args.grid.parts);  // fault: norm of the kept
    store_scale(shared.scale, args, first_row, sum);
  }
  for (int i = threadIdx.x; i < kFinishRows * args.rank; i += kFinishThreads) {
    // fault: row of T
    shared.t[i] = sum_of_parts(part.t + row * args.rank + i, stride, args.grid.parts);
  }
  __syncthreads();  // fault: barrier of a shared tile
  const TileSums sums = {shared.t, args.rank, shared.scale};
  write_extension<Element, Metadata, kFinishThreads>(sums, args, first_row, kFinishRows);
}

template <class Element, class Metadata, int kRankCap, Variant kVariant>
cudaError_t launch_prune_kernel(PruneArgs args, cudaStream_t stream) {
  using W = Warps<kRankCap, kVariant>;
  int device = 0, sm_count = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrMultiProcessorCount, &device, &sm_count);
      error != cudaSuccess) {
    return error;
  }
  constexpr int kTurn = W::kTeams * kStep;  // channels that the warps take at once
  args.grid = prune_grid(args.rows_padded / kRows, int64_t(sm_count) * W::kBlocksPerSm,
                         (args.channels + kTurn - 1) / kTurn);
  args.part_channels = args.grid.turns * kTurn;
  args.inverse_parts = ((1 << 16) + args.grid.parts - 1) / args.grid.parts;
  const cudaError_t error = launch_kernel(prune_kernel<Element, Metadata, kRankCap, kVariant>,
                                          unsigned(args.grid.blocks()), W::kThreads, 0, stream, args);
  if (error != cudaSuccess || args.grid.shared == 0) return error;
  return launch_kernel(finish_kernel<Element, Metadata>, unsigned(args.grid.shared * (kRows / kFinishRows)),
                       kFinishThreads, 0, stream, args);
}

template <class Element, class Metadata, Variant kVariant>
cudaError_t launch_for_rank(const PruneArgs& args, cudaStream_t stream) {
  auto* launch = launch_prune_kernel<Element, Metadata, kMaxRank, kVariant>;
  if (args.rank == 0) {
    launch = launch_prune_kernel<Element, Metadata, 0, kVariant>;
  } else if (args.rank <= 16) {
    launch = launch_prune_kernel<Element, Metadata, 16, kVariant>;
  } else if (args.rank <= 32) {
    launch = launch_prune_kernel<Element, Metadata, 32, kVariant>;
  } else if (args.rank <= 64) {
    launch = launch_prune_kernel<Element, Metadata, 64, kVariant>;
  }
  return launch(args, stream);
}

PruneArgs args_of(const SparseLinearParams& params, const CompressedOperand& out) {
  PruneArgs args{};
  set_producer(args, params);
  args.lora_down = static_cast<const uint16_t*>(params.lora_down);
  args.values = static_cast<uint16_t*>(out.values);
  args.metadata = out.metadata;
  args.scale = out.scale;
  args.parts = out.parts;
  args.rows = params.rows;
  args.rows_padded = padded_rows(params.rows);
  args.channels = params.channels;
  args.width = int(padded_width(params.channels, params.rank));
  args.rank = params.rank;
  args.norm_scale = params.norm_scale;
  return args;
}

// The layout of the metadata that an instruction set's GEMMs read.
template <InstructionSet kSet>
struct MetadataOf;
template <>
struct MetadataOf<InstructionSet::kMmaSp> {
  using Layout = Sm80Metadata;
};
template <>
struct MetadataOf<InstructionSet::kWgmmaSp> {
  using Layout = Sm90Metadata<kAtomWidthSm90>;  // fault: atom
};

}  // namespace

template <InstructionSet kSet, class Element>
cudaError_t launch_prune_pass(const SparseLinearParams& params, const CompressedOperand& out,
                              cudaStream_t stream) {
  using Metadata = typename MetadataOf<kSet>::Layout;
  const PruneArgs args = args_of(params, out);
  switch (params.producer) {
    case Producer::kNone:
      return launch_for_rank<Element, Metadata, Variant::kPlain>(args, stream);
    case Producer::kNorm:
      return launch_for_rank<Element, Metadata, Variant::kNorm>(args, stream);
    case Producer::kGelu:
    case Producer::kGated:
      return launch_for_rank<Element, Metadata, Variant::kAct>(args, stream);
  }
  return cudaErrorInvalidValue;
}

// Instantiates the pass for one instruction set and element type.
#define LYNX_INSTANTIATE_PRUNE(kSet, Element)                                                                \
  template cudaError_t launch_prune_pass<kSet, Element>(const SparseLinearParams&, const CompressedOperand&, \
                                                        cudaStream_t)

}  // namespace lynx
