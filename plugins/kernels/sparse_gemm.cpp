// SPDX-License-Identifier: Apache-2.0
// Picks the kernels for the current device and the tile configuration for a problem.
#include "sparse_gemm.h"

#include <algorithm>

#include "launch.h"

namespace lynx {
namespace {

// CMake defines a macro for each file of instantiations that it builds.
#if defined(LYNX_SM80_BF16)
constexpr bool kSm80Bf16 = true;
#else
constexpr bool kSm80Bf16 = false;
#endif
#if defined(LYNX_SM80_FP16)
constexpr bool kSm80Fp16 = true;
#else
constexpr bool kSm80Fp16 = false;
#endif
#if defined(LYNX_SM90_BF16)
constexpr bool kSm90Bf16 = true;
#else
constexpr bool kSm90Bf16 = false;
#endif
#if defined(LYNX_SM90_FP16)
constexpr bool kSm90Fp16 = true;
#else
constexpr bool kSm90Fp16 = false;
#endif

template <Kernels kKernels, DType kType>
constexpr bool kHeld = kKernels == Kernels::kSm80 ? (kType == DType::kBf16 ? kSm80Bf16 : kSm80Fp16)
                                                  : (kType == DType::kBf16 ? kSm90Bf16 : kSm90Fp16);

template <class Element, Operand kOperand>
SparseGemmLaunch* sm80_launch(int tile) {
  static constexpr SparseGemmLaunch* kLaunches[kTileConfigs] = {launch_gemm_sm80<Element, kMedium, kOperand>,
                                                                launch_gemm_sm80<Element, kSmall, kOperand>};
  return kLaunches[tile];
}

template <class Element, Operand kOperand>
SparseGemmLaunch* sm90_launch(int tile) {
  static constexpr SparseGemmLaunch* kLaunches[kTileConfigsSm90] = {
      launch_gemm_sm90<Element, kWide, kOperand>, launch_gemm_sm90<Element, kTall, kOperand>,
      launch_gemm_sm90<Element, kNarrow, kOperand>};
  return kLaunches[tile];
}

// Names the functions that the library holds, and no others: those are not there to link with.
template <class Element, DType kType>
SparseGemmLaunch* launch_of(Kernels kernels, Operand operand, int tile) {
  const bool weight = operand == Operand::kWeight;
  if constexpr (kHeld<Kernels::kSm90, kType>) {
    if (kernels == Kernels::kSm90) {
      return weight ? sm90_launch<Element, Operand::kWeight>(tile)
                    : sm90_launch<Element, Operand::kActivation>(tile);
    }
  }
  if constexpr (kHeld<Kernels::kSm80, kType>) {
    if (kernels == Kernels::kSm80) {
      return weight ? sm80_launch<Element, Operand::kWeight>(tile)
                    : sm80_launch<Element, Operand::kActivation>(tile);
    }
  }
  return nullptr;
}

}  // namespace

bool holds(Kernels kernels, DType dtype) {
  const bool bf16 = dtype == DType::kBf16;
  if (kernels == Kernels::kSm90) return bf16 ? kSm90Bf16 : kSm90Fp16;
  return bf16 ? kSm80Bf16 : kSm80Fp16;
}

cudaError_t choose_kernels(DType dtype, Kernels* kernels) {
  int device = 0, major = 0, minor = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrComputeCapabilityMajor, &device, &major);
      error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = current_attribute(cudaDevAttrComputeCapabilityMinor, &device, &minor);
      error != cudaSuccess) {
    return error;
  }
  if (major == 9 && minor == 0 && holds(Kernels::kSm90, dtype)) {  // wgmma runs nowhere else
    *kernels = Kernels::kSm90;
    return cudaSuccess;
  }
  if (major < 8 || !holds(Kernels::kSm80, dtype)) return cudaErrorNotSupported;  // mma.sp begins with sm_80
  *kernels = Kernels::kSm80;
  return cudaSuccess;
}

// mma.sp runs on every device from sm_80 on, wgmma.sp on sm_90 alone.
cudaError_t check_runs(Kernels kernels, DType dtype) {
  Kernels best;
  if (const cudaError_t error = choose_kernels(dtype, &best); error != cudaSuccess) return error;
  return holds(kernels, dtype) && (kernels == Kernels::kSm80 || kernels == best) ? cudaSuccess
                                                                                 : cudaErrorNotSupported;
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
  return dtype == DType::kBf16 ? launch_of<Bf16, DType::kBf16>(kernels, operand, tile)
                               : launch_of<Fp16, DType::kFp16>(kernels, operand, tile);
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
