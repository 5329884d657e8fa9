// SPDX-License-Identifier: Apache-2.0
// Which FP8 GEMMs the library holds, which of them the current device gets, and which tile a problem.
#include "fp8_gemm.h"

#include <algorithm>
#include <utility>

#include "fp8_linear.h"
#include "fp8_tiles_sm89.h"
#include "launch.h"

namespace lynx {
namespace {

// What this library was built with: LYNX_FP8_WGMMA_BF16 and the like come from CMake.
constexpr bool fp8_holds(Fp8Set set, DType dtype) {
  bool holds = false;
#if defined(LYNX_FP8_MMA_BF16)
  holds |= set == Fp8Set::kMma && dtype == DType::kBf16;
#endif
#if defined(LYNX_FP8_MMA_FP16)
  holds |= set == Fp8Set::kMma && dtype == DType::kFp16;
#endif
#if defined(LYNX_FP8_WGMMA_BF16)
  holds |= set == Fp8Set::kWgmma && dtype == DType::kBf16;
#endif
#if defined(LYNX_FP8_WGMMA_FP16)
  holds |= set == Fp8Set::kWgmma && dtype == DType::kFp16;
#endif
  return holds;
}

// Configurations that it was built with: the first of each operand, or all.
constexpr int fp8_tiles_built([[maybe_unused]] Fp8Set set, [[maybe_unused]] Fp8Operand operand) {
#if defined(LYNX_FP8_ONE_TILE)
  return 1;
#else
  return set == Fp8Set::kMma ? kFp8MmaTiles : fp8_tile_count(operand);
#endif
}

template <Fp8Set kSet, class Element, Fp8Operand kOperand, int... kIndices>
Fp8GemmLaunch* launch_of(int tile, std::integer_sequence<int, kIndices...>) {
  static constexpr Fp8GemmLaunch* kLaunches[] = {launch_fp8_gemm<kSet, Element, kOperand, kIndices>...};
  return tile < int(sizeof...(kIndices)) ? kLaunches[tile] : nullptr;
}

template <Fp8Set kSet, class Element, Fp8Operand kOperand>
Fp8GemmLaunch* launch_of(int tile) {
  return launch_of<kSet, Element, kOperand>(
      tile, std::make_integer_sequence<int, fp8_tiles_built(kSet, kOperand)>());
}

template <Fp8Set kSet, DType kDType, class Element>
Fp8GemmLaunch* launch_of([[maybe_unused]] Fp8Operand operand, [[maybe_unused]] int tile) {
  if constexpr (fp8_holds(kSet, kDType)) {
    switch (operand) {
      case Fp8Operand::kSparseWeight:
        return launch_of<kSet, Element, Fp8Operand::kSparseWeight>(tile);
      case Fp8Operand::kDense:
        return launch_of<kSet, Element, Fp8Operand::kDense>(tile);
      case Fp8Operand::kSparseActivation:
        return launch_of<kSet, Element, Fp8Operand::kSparseActivation>(tile);
    }
  }
  return nullptr;
}

template <Fp8Set kSet>
Fp8GemmLaunch* launch_of(DType dtype, Fp8Operand operand, int tile) {
  return dtype == DType::kBf16 ? launch_of<kSet, DType::kBf16, Bf16>(operand, tile)
                               : launch_of<kSet, DType::kFp16, Fp16>(operand, tile);
}

int choose_tile_of(Fp8Set set, Fp8Operand operand, const Fp8GemmCall& call, int sm_count) {
  const Fp8Sums sums = promotes_sums(call) ? Fp8Sums::kPromoted : Fp8Sums::kFast;
  const int tile = set == Fp8Set::kMma
                       ? choose_fp8_mma_tile(operand, call.tokens, call.channels, call.width, sm_count)
                       : choose_fp8_tile(operand, call.tokens, call.channels, call.width, sm_count, sums);
  return tile < fp8_tiles_built(set, operand) ? tile : 0;
}

}  // namespace

bool holds_fp8(DType dtype) { return fp8_holds(Fp8Set::kMma, dtype) || fp8_holds(Fp8Set::kWgmma, dtype); }

cudaError_t check_fp8_set(Fp8Set set, DType dtype) {
  int capability = 0;
  if (const cudaError_t error = compute_capability(&capability); error != cudaSuccess) return error;
  return fp8_holds(set, dtype) && runs_on(traits_of(set), capability) ? cudaSuccess : cudaErrorNotSupported;
}

cudaError_t choose_fp8_set(DType dtype, Fp8Set* set) {
  int capability = 0;
  if (const cudaError_t error = compute_capability(&capability); error != cudaSuccess) return error;
  cudaError_t found = cudaErrorNotSupported;
  for (const Fp8SetTraits& each : kFp8Sets) {  // the last is the fastest
    if (fp8_holds(each.set, dtype) && suits(each, capability)) *set = each.set, found = cudaSuccess;
  }
  return found;
}

cudaError_t fp8_runs(DType dtype) {
  Fp8Set set;
  return choose_fp8_set(dtype, &set);
}

int64_t fp8_gemm_workspace_bytes(Fp8Set set, Fp8Operand operand, int64_t tokens, int64_t channels) {
  int64_t most = 0;
  for (int tile = 0; set == Fp8Set::kWgmma && tile < fp8_tile_count(operand); ++tile) {
    most = std::max(most, stream_k_bytes(fp8_tiles(operand)[tile], fp8_shape(operand, tokens, channels)));
  }
  return most;
}

int fp8_tactics(Fp8Set set, Fp8Operand operand) { return fp8_tiles_built(set, operand); }

int fp8_tactics(DType dtype, Fp8Operand operand) {
  Fp8Set set;
  return choose_fp8_set(dtype, &set) == cudaSuccess ? fp8_tactics(set, operand) : 0;
}

Fp8GemmLaunch* fp8_tile_launch(Fp8Set set, DType dtype, Fp8Operand operand, int tile) {
  return set == Fp8Set::kMma ? launch_of<Fp8Set::kMma>(dtype, operand, tile)
                             : launch_of<Fp8Set::kWgmma>(dtype, operand, tile);
}

cudaError_t launch_fp8_gemm(Fp8Set set, DType dtype, Fp8Operand operand, const Fp8GemmCall& call, int tile,
                            cudaStream_t stream) {
  int device = 0, sm_count = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrMultiProcessorCount, &device, &sm_count);
      error != cudaSuccess) {
    return error;
  }
  if (tile >= fp8_tiles_built(set, operand)) return cudaErrorInvalidValue;
  if (tile < 0) tile = choose_tile_of(set, operand, call, sm_count);
  Fp8GemmLaunch* const launch = fp8_tile_launch(set, dtype, operand, tile);
  return launch == nullptr ? cudaErrorNotSupported : launch(call, device, stream);
}

}  // namespace lynx
