// SPDX-License-Identifier: Apache-2.0
#include "sparse_linear.h"

#include "sparse24.h"
#include "tile_config.h"

namespace lynx {
namespace {

static_assert(kWidthMultiple % kAtomWidthSm90 == 0,
              "whole atoms: the metadata take the same bytes in both layouts");

constexpr int64_t kSegment = 256;  // bytes; every part of the workspace starts at a multiple of it

struct Segments {
  int64_t values, metadata, scale, reordered, total;  // offsets in bytes, and the end
};

Segments segments(int64_t rows, int channels, int rank, bool ordered) {
  const int64_t padded = padded_rows(rows), width = padded_width(channels, rank);
  Segments at;
  at.values = 0;
  at.metadata = round_up(padded * (width / 2) * 2, kSegment);
  at.scale = at.metadata + round_up(Sm80Metadata::bytes(padded, width), kSegment);
  at.reordered = at.scale + round_up(padded * int64_t(sizeof(float)), kSegment);
  at.total = at.reordered + (ordered ? round_up(rows * channels * 2, kSegment) : 0);
  return at;
}

bool misaligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15u) != 0; }

cudaError_t check(const SparseLinearParams& p) {
  const bool sizes_ok = p.rows > 0 && padded_rows(p.rows) <= INT32_MAX && p.channels > 0 &&
                        p.channels % kBlock == 0 && p.out_channels > 0 && p.out_channels % 8 == 0 &&
                        p.rank >= 0 && p.rank <= kMaxRank && p.rank % kRankMultiple == 0 &&
                        (p.order == nullptr || p.channels <= kMaxOrderedChannels);
  const bool present = p.x && p.weight && p.bias && p.y && p.workspace && (p.rank == 0 || p.lora_down);
  if (!sizes_ok || !present) return cudaErrorInvalidValue;
  const void* const pointers[] = {p.x,      p.weight,   p.lora_down, p.bias,     p.order,
                                  p.centre, p.saliency, p.y,         p.workspace};
  for (const void* pointer : pointers) {
    if (misaligned(pointer)) return cudaErrorMisalignedAddress;
  }
  return cudaSuccess;
}

}  // namespace

size_t workspace_bytes(int64_t rows, int channels, int rank, bool ordered) {
  return size_t(segments(rows, channels, rank, ordered).total);
}

CompressedOperand compressed_operand(void* workspace, int64_t rows, int channels, int rank, Kernels kernels) {
  const Segments at = segments(rows, channels, rank, false);
  char* base = static_cast<char*>(workspace);
  return {base + at.values, reinterpret_cast<uint32_t*>(base + at.metadata),
          reinterpret_cast<float*>(base + at.scale), base + at.reordered, kernels};
}

cudaError_t launch_sparse_linear(const SparseLinearParams& params, cudaStream_t stream) {
  if (const cudaError_t error = check(params); error != cudaSuccess) return error;
  Kernels kernels;
  if (const cudaError_t error = choose_kernels(&kernels); error != cudaSuccess) return error;
  const CompressedOperand operand =
      compressed_operand(params.workspace, params.rows, params.channels, params.rank, kernels);
  if (const cudaError_t error = launch_prune(params, operand, stream); error != cudaSuccess) return error;
  return launch_sparse_gemm(params, operand, stream);
}

}  // namespace lynx
