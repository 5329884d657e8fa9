// SPDX-License-Identifier: Apache-2.0
// Picks the FP8 GEMM's tile configuration for a problem.
#include "fp8_gemm.h"

#include <algorithm>
#include <utility>

#include "fp8_linear.h"
#include "launch.h"

namespace lynx {
namespace {

// Configurations that this library was built with: the first of each operand, or all.
constexpr int fp8_tiles_built([[maybe_unused]] Fp8Operand operand) {
#if defined(LYNX_FP8_ONE_TILE)
  return 1;
#else
  return fp8_tile_count(operand);
#endif
}

#if defined(LYNX_FP8_BF16) || defined(LYNX_FP8_FP16)
template <class Element, Fp8Operand kOperand, int... kIndices>
Fp8GemmLaunch* launch_of(int tile, std::integer_sequence<int, kIndices...>) {
  static constexpr Fp8GemmLaunch* kLaunches[] = {launch_fp8_gemm<Element, kOperand, kIndices>...};
  return tile < int(sizeof...(kIndices)) ? kLaunches[tile] : nullptr;
}

template <class Element, Fp8Operand kOperand>
Fp8GemmLaunch* launch_of(int tile) {
  return launch_of<Element, kOperand>(tile, std::make_integer_sequence<int, fp8_tiles_built(kOperand)>());
}

template <class Element>
Fp8GemmLaunch* launch_of(Fp8Operand operand, int tile) {
  switch (operand) {
    case Fp8Operand::kSparseWeight:
      return launch_of<Element, Fp8Operand::kSparseWeight>(tile);
    case Fp8Operand::kDense:
      return launch_of<Element, Fp8Operand::kDense>(tile);
    case Fp8Operand::kSparseActivation:
      return launch_of<Element, Fp8Operand::kSparseActivation>(tile);
  }
  return nullptr;
}
#endif

}  // namespace

bool holds_fp8(DType dtype) { return fp8_tile_launch(dtype, Fp8Operand::kDense, 0) != nullptr; }

cudaError_t fp8_runs(DType dtype) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = current_attribute(cudaDevAttrComputeCapabilityMajor, &device, &major);
  if (error == cudaSuccess) error = current_attribute(cudaDevAttrComputeCapabilityMinor, &device, &minor);
  if (error != cudaSuccess) return error;
  return holds_fp8(dtype) && major == 9 && minor == 0 ? cudaSuccess
                                                      : cudaErrorNotSupported;  // wgmma runs nowhere else
}

int64_t fp8_gemm_workspace_bytes(Fp8Operand operand, int64_t tokens, int64_t channels) {
  int64_t most = 0;
  for (int tile = 0; tile < fp8_tile_count(operand); ++tile) {
    most = std::max(most, stream_k_bytes(fp8_tiles(operand)[tile], fp8_shape(operand, tokens, channels)));
  }
  return most;
}

Fp8GemmLaunch* fp8_tile_launch([[maybe_unused]] DType dtype, [[maybe_unused]] Fp8Operand operand,
                               [[maybe_unused]] int tile) {
#if defined(LYNX_FP8_BF16)
  if (dtype == DType::kBf16) return launch_of<Bf16>(operand, tile);
#endif
#if defined(LYNX_FP8_FP16)
  if (dtype == DType::kFp16) return launch_of<Fp16>(operand, tile);
#endif
  return nullptr;
}

int fp8_tactics(Fp8Operand operand) { return fp8_tiles_built(operand); }

cudaError_t launch_fp8_gemm(DType dtype, Fp8Operand operand, const Fp8GemmCall& call, int tile,
                            cudaStream_t stream) {
  int device = 0, sm_count = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrMultiProcessorCount, &device, &sm_count);
      error != cudaSuccess) {
    return error;
  }
  if (tile >= fp8_tiles_built(operand)) return cudaErrorInvalidValue;
  if (tile < 0) {
    tile = choose_fp8_tile(operand, call.tokens, call.channels, call.width, sm_count);
    if (tile >= fp8_tiles_built(operand)) tile = 0;
  }
  Fp8GemmLaunch* const launch = fp8_tile_launch(dtype, operand, tile);
  return launch == nullptr ? cudaErrorNotSupported : launch(call, device, stream);
}

}  // namespace lynx
