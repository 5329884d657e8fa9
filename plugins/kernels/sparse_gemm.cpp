// SPDX-License-Identifier: Apache-2.0
// Picks the kernels for the current device and the tile configuration for a problem.
#include "sparse_gemm.h"

#include <algorithm>

#include "launch.h"

namespace lynx {
namespace {

template <class Element, Operand kOperand>
SparseGemmLaunch* sm80_launch(int tile) {
  static constexpr SparseGemmLaunch* kLaunches[kTileConfigs] = {launch_gemm_sm80<Element, kMedium, kOperand>,
                                                                launch_gemm_sm80<Element, kSmall, kOperand>};
  return kLaunches[tile];
}

#if defined(LYNX_SM90)
template <class Element, Operand kOperand>
SparseGemmLaunch* sm90_launch(int tile) {
  static constexpr SparseGemmLaunch* kLaunches[kTileConfigsSm90] = {
      launch_gemm_sm90<Element, kWide, kOperand>, launch_gemm_sm90<Element, kTall, kOperand>,
      launch_gemm_sm90<Element, kNarrow, kOperand>};
  return kLaunches[tile];
}
#endif

template <class Element, Operand kOperand>
SparseGemmLaunch* launch_of(Kernels kernels, int tile) {
#if defined(LYNX_SM90)
  if (kernels == Kernels::kSm90) return sm90_launch<Element, kOperand>(tile);
#endif
  return kernels == Kernels::kSm80 ? sm80_launch<Element, kOperand>(tile) : nullptr;
}

}  // namespace

cudaError_t choose_kernels(Kernels* kernels) {
  int device = 0, major = 0, minor = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrComputeCapabilityMajor, &device, &major);
      error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = current_attribute(cudaDevAttrComputeCapabilityMinor, &device, &minor);
      error != cudaSuccess) {
    return error;
  }
  if (major < 8) return cudaErrorNotSupported;  // mma.sp begins with sm_80
  *kernels = Kernels::kSm80;
#if defined(LYNX_SM90)
  if (major == 9 && minor == 0) *kernels = Kernels::kSm90;  // wgmma runs nowhere else
#endif
  return cudaSuccess;
}

int64_t gemm_workspace_bytes(Kernels kernels, int64_t m, int64_t n) {
  int64_t most = 0;
  if (kernels == Kernels::kSm90) {
    for (const TileConfigSm90& tile : kTilesSm90) most = std::max(most, stream_k_bytes(tile, m, n));
  }
  return most;
}

int tile_count(Kernels kernels) {
  return kernels == Kernels::kSm90 ? int(kTileConfigsSm90) : int(kTileConfigs);
}

SparseGemmLaunch* tile_launch(Kernels kernels, DType dtype, Operand operand, int tile) {
  [[maybe_unused]] const bool weight = operand == Operand::kWeight;
#if defined(LYNX_BF16)
  if (dtype == DType::kBf16) {
    return weight ? launch_of<Bf16, Operand::kWeight>(kernels, tile)
                  : launch_of<Bf16, Operand::kActivation>(kernels, tile);
  }
#endif
#if defined(LYNX_FP16)
  if (dtype == DType::kFp16) {
    return weight ? launch_of<Fp16, Operand::kWeight>(kernels, tile)
                  : launch_of<Fp16, Operand::kActivation>(kernels, tile);
  }
#endif
  return nullptr;
}

cudaError_t best_tile(Kernels kernels, const SparseGemmCall& call, int* tile) {
  int device = 0, sm_count = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrMultiProcessorCount, &device, &sm_count);
      error != cudaSuccess) {
    return error;
  }
  *tile = kernels == Kernels::kSm90 ? choose_tile(kTilesSm90, call.m, call.n, call.width, sm_count)
                                    : choose_tile(kTiles, call.m, call.n, call.width, sm_count);
  return cudaSuccess;
}

cudaError_t launch_sparse_gemm(Kernels kernels, DType dtype, Operand operand, const SparseGemmCall& call,
                               int tile, cudaStream_t stream) {
  if (tile == kAnyTile) {
    if (const cudaError_t error = best_tile(kernels, call, &tile); error != cudaSuccess) return error;
  }
  if (tile < 0 || tile >= tile_count(kernels)) return cudaErrorInvalidValue;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  SparseGemmLaunch* const launch = tile_launch(kernels, dtype, operand, tile);
  return launch == nullptr ? cudaErrorNotSupported : launch(call, device, stream);
}

}  // namespace lynx
