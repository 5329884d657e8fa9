// SPDX-License-Identifier: Apache-2.0
// Which kernels the library holds, which of them the current device gets, and which tile a problem.
#include "sparse_gemm.h"

#include <algorithm>

#include "launch.h"

namespace lynx {
namespace {

// The kernels of an instruction set for an element type.
struct Built {
  using Gemm = cudaError_t(const SparseGemmCall&, int tile, int device, cudaStream_t);
  using Prune = cudaError_t(const SparseLinearParams&, const CompressedOperand&, cudaStream_t);

  InstructionSet set;
  DType dtype;
  Gemm *activation, *weight;
  Prune* prune;
};

// A row for each that this library was built with: lynx_built.inc is written by CMake.
constexpr Built kBuilt[] = {
#define LYNX_BUILT(Set, Element)                                       \
  {InstructionSet::k##Set, DType::k##Element,                          \
   launch_gemm<InstructionSet::k##Set, Element, Operand::kActivation>, \
   launch_gemm<InstructionSet::k##Set, Element, Operand::kWeight>,     \
   launch_prune_pass<InstructionSet::k##Set, Element>},
#include "lynx_built.inc"
#undef LYNX_BUILT
};

// Null where the library was built without.
const Built* find(InstructionSet set, DType dtype) {
  for (const Built& each : kBuilt) {
    if (each.set == set && each.dtype == dtype) return &each;
  }
  return nullptr;
}

// What an instruction set's tile configurations have to say.
struct Tiles {
  int count;
  int (*choose)(int64_t m, int64_t n, int64_t width, int sm_count);
  int64_t (*workspace_bytes)(int64_t m, int64_t n);
};

// Of a table whose first kCount are built.
template <const auto& kTable, int kCount>
constexpr Tiles tiles_in() {
  Tiles tiles{};
  tiles.count = kCount;
  tiles.choose = [](int64_t m, int64_t n, int64_t width, int sm_count) {
    const int tile = choose_tile(kTable, m, n, width, sm_count);
    return tile < kCount ? tile : 0;
  };
  tiles.workspace_bytes = [](int64_t m, int64_t n) {
    int64_t most = 0;
    for (const auto& tile : kTable) most = std::max(most, stream_k_bytes(tile, m, n));
    return most;
  };
  return tiles;
}

#if defined(LYNX_SM90_ONE_TILE)
constexpr int kTilesBuiltSm90 = 1;
#else
constexpr int kTilesBuiltSm90 = kTileConfigsSm90;
#endif
// By instruction set.
constexpr Tiles kTilesOf[] = {tiles_in<kTiles, kTileConfigs>(), tiles_in<kTilesSm90, kTilesBuiltSm90>()};

}  // namespace

bool holds(InstructionSet set, DType dtype) { return find(set, dtype) != nullptr; }

cudaError_t choose_instructions(DType dtype, InstructionSet* set) {
  int capability = 0;
  if (const cudaError_t error = compute_capability(&capability); error != cudaSuccess) return error;
  cudaError_t found = cudaErrorNotSupported;
  for (const InstructionSetTraits& each : kInstructionSets) {  // the last is the fastest
    if (holds(each.set, dtype) && runs_on(each, capability)) *set = each.set, found = cudaSuccess;
  }
  return found;
}

cudaError_t check_runs(InstructionSet set, DType dtype) {
  int capability = 0;
  if (const cudaError_t error = compute_capability(&capability); error != cudaSuccess) return error;
  return holds(set, dtype) && runs_on(traits_of(set), capability) ? cudaSuccess : cudaErrorNotSupported;
}

int64_t gemm_workspace_bytes(InstructionSet set, int64_t m, int64_t n) {
  return kTilesOf[int(set)].workspace_bytes(m, n);
}

int tile_count(InstructionSet set) { return kTilesOf[int(set)].count; }

cudaError_t best_tile(InstructionSet set, const SparseGemmCall& call, int* tile) {
  int device = 0, sm_count = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrMultiProcessorCount, &device, &sm_count);
      error != cudaSuccess) {
    return error;
  }
  *tile = kTilesOf[int(set)].choose(call.m, call.n, call.width, sm_count);
  return cudaSuccess;
}

cudaError_t launch_sparse_gemm(InstructionSet set, DType dtype, Operand operand, const SparseGemmCall& call,
                               int tile, cudaStream_t stream) {
  const Built* const built = find(set, dtype);
  if (built == nullptr) return cudaErrorNotSupported;
  if (tile == kAnyTile) {
    if (const cudaError_t error = best_tile(set, call, &tile); error != cudaSuccess) return error;
  }
  if (tile < 0 || tile >= tile_count(set)) return cudaErrorInvalidValue;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return (operand == Operand::kWeight ? built->weight : built->activation)(call, tile, device, stream);
}

cudaError_t launch_prune(const SparseLinearParams& params, const CompressedOperand& out,
                         cudaStream_t stream) {
  const Built* const built = find(out.set, params.dtype);
  return built == nullptr ? cudaErrorNotSupported : built->prune(params, out, stream);
}

}  // namespace lynx
