// SPDX-License-Identifier: Apache-2.0
#include "sparse_linear.h"

#include <algorithm>

#include "fits.h"
#include "prune_grid.h"
#include "sparse24.h"
#include "sparse_gemm.h"

namespace lynx {
namespace {

static_assert(kWidthMultiple % kAtomWidthSm90 == 0,
              "whole atoms: the metadata take the same bytes in both layouts");

constexpr int64_t kSegment = 256;  // bytes; every part of the workspace starts at a multiple of it

struct Segments {
  int64_t values, metadata, scale, parts, gemm, total;  // offsets in bytes, and the end
};

Segments segments(const SparseLinearParams& p, InstructionSet set) {
  const int64_t padded = padded_rows(p.rows), width = padded_width(p.channels, p.rank);
  Segments at;
  at.values = 0;
  at.metadata = round_up(padded * (width / 2) * 2, kSegment);
  at.scale = at.metadata + round_up(Sm80Metadata::bytes(padded, width), kSegment);
  at.parts = at.scale + round_up(padded * int64_t(sizeof(float)), kSegment);
  at.gemm = at.parts + round_up(prune_parts_bytes(padded, p.rank), kSegment);
  at.total = at.gemm + round_up(gemm_workspace_bytes(set, p.rows, p.out_channels), kSegment);
  return at;
}

bool misaligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15u) != 0; }

// What both ops ask of their sizes; `step`: of K.
template <class Params>
bool sizes_fit(const Params& p, int step) {
  return p.rows > 0 && p.rows <= kMaxRows && p.channels > 0 && p.channels <= kMaxChannels &&
         p.channels % step == 0 && p.out_channels > 0 && p.out_channels <= kMaxRows &&
         p.out_channels % 8 == 0;
}

cudaError_t check(const SparseWeightParams& p) {
  const bool present =
      p.x && p.values && p.metadata && p.bias && p.y && (p.workspace || weight_workspace_bytes(p) == 0);
  if (!sizes_fit(p, kWidthMultiple) || !epilogue_fits(p) || !present) return cudaErrorInvalidValue;
  const void* const pointers[] = {p.x, p.values, p.metadata, p.bias, p.y, p.workspace};
  for (const void* pointer : pointers) {
    if (misaligned(pointer)) return cudaErrorMisalignedAddress;
  }
  return cudaSuccess;
}

}  // namespace

size_t workspace_bytes(const SparseLinearParams& params) {
  int64_t most = 0;
  for (const InstructionSetTraits& each : kInstructionSets) {
    if (holds(each.set, params.dtype)) most = std::max(most, segments(params, each.set).total);
  }
  return size_t(most);
}

CompressedOperand compressed_operand(const SparseLinearParams& params, InstructionSet set) {
  const Segments at = segments(params, set);
  char* base = static_cast<char*>(params.workspace);
  CompressedOperand operand;
  operand.values = base + at.values;
  operand.metadata = reinterpret_cast<uint32_t*>(base + at.metadata);
  operand.scale = reinterpret_cast<float*>(base + at.scale);
  operand.parts = reinterpret_cast<float*>(base + at.parts);
  operand.gemm = base + at.gemm;
  operand.gemm_bytes = size_t(at.total - at.gemm);
  operand.set = set;
  return operand;
}

size_t weight_workspace_bytes(const SparseWeightParams& params) {
  return size_t(gemm_workspace_bytes(params.set, params.out_channels, params.rows));
}

cudaError_t check_arguments(const SparseLinearParams& p) {
  const bool sizes_ok = sizes_fit(p, kBlock) && p.rank >= 0 && p.rank <= kMaxRank &&
                        p.rank % kRankMultiple == 0 && producer_fits(p) && plain_epilogue_fits(p);
  const bool present = p.x && p.weight && p.bias && p.y && p.workspace && (p.rank == 0 || p.lora_down);
  if (!sizes_ok || !present) return cudaErrorInvalidValue;
  const void* const pointers[] = {p.x,     p.weight, p.lora_down, p.bias,     p.gain,
                                  p.shift, p.gate,   p.y,         p.workspace};
  for (const void* pointer : pointers) {
    if (misaligned(pointer)) return cudaErrorMisalignedAddress;
  }
  return cudaSuccess;
}

cudaError_t launch_sparse_linear(const SparseLinearParams& params, int tile, cudaStream_t stream) {
  if (const cudaError_t error = check_arguments(params); error != cudaSuccess) return error;
  InstructionSet set;
  if (const cudaError_t error = choose_instructions(params.dtype, &set); error != cudaSuccess) return error;
  const CompressedOperand operand = compressed_operand(params, set);
  if (const cudaError_t error = launch_prune(params, operand, stream); error != cudaSuccess) return error;
  return launch_pruned_gemm(params, operand, tile, stream);
}

cudaError_t launch_pruned_gemm(const SparseLinearParams& params, const CompressedOperand& a, int tile,
                               cudaStream_t stream) {
  SparseGemmCall call;
  call.m = int(params.rows), call.n = params.out_channels;
  call.width = int(padded_width(params.channels, params.rank));
  call.values = a.values, call.metadata = a.metadata, call.dense = params.weight;
  call.scale = a.scale, call.bias = params.bias, call.y = params.y;
  call.activation = params.activation, call.activation_from = params.activation_from, call.gated = false;
  call.workspace = a.gemm, call.workspace_bytes = a.gemm_bytes;
  return launch_sparse_gemm(a.set, params.dtype, Operand::kActivation, call, tile, stream);
}

cudaError_t launch_sparse_weight_linear(const SparseWeightParams& params, int tile, cudaStream_t stream) {
  if (const cudaError_t error = check(params); error != cudaSuccess) return error;
  if (const cudaError_t error = check_runs(params.set, params.dtype); error != cudaSuccess) return error;
  SparseGemmCall call;
  call.m = params.out_channels, call.n = int(params.rows), call.width = params.channels;
  call.values = params.values, call.metadata = params.metadata, call.dense = params.x;
  call.scale = nullptr, call.bias = params.bias, call.y = params.y;
  call.activation = params.activation, call.activation_from = params.activation_from;
  call.gated = params.gated;
  call.workspace = params.workspace, call.workspace_bytes = weight_workspace_bytes(params);
  return launch_sparse_gemm(params.set, params.dtype, Operand::kWeight, call, tile, stream);
}

}  // namespace lynx
