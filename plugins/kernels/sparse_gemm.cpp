// SPDX-License-Identifier: Apache-2.0
// Picks the kernels for the current device and the tile configuration for a problem.
#include "sparse_gemm.h"

namespace lynx {
namespace {

cudaError_t get_attribute(cudaDeviceAttr attribute, int device, int* value) {
  return cudaDeviceGetAttribute(value, attribute, device);
}

}  // namespace

cudaError_t choose_kernels(Kernels* kernels) {
  int device = 0, major = 0, minor = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = get_attribute(cudaDevAttrComputeCapabilityMajor, device, &major);
      error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = get_attribute(cudaDevAttrComputeCapabilityMinor, device, &minor);
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

int tile_count(Kernels kernels) { return kernels == Kernels::kSm90 ? kTileConfigsSm90 : kTileConfigs; }

SparseGemmLaunch* tile_launch(Kernels kernels, DType dtype, int tile) {
  const bool bf16 = dtype == DType::kBf16;
#if defined(LYNX_SM90)
  static constexpr SparseGemmLaunch* kSm90Bf16[] = {launch_gemm_sm90_bf16_wide, launch_gemm_sm90_bf16_narrow};
  static constexpr SparseGemmLaunch* kSm90Fp16[] = {launch_gemm_sm90_fp16_wide, launch_gemm_sm90_fp16_narrow};
  if (kernels == Kernels::kSm90) return (bf16 ? kSm90Bf16 : kSm90Fp16)[tile];
#endif
  static constexpr SparseGemmLaunch* kBf16[] = {launch_gemm_bf16_medium, launch_gemm_bf16_small};
  static constexpr SparseGemmLaunch* kFp16[] = {launch_gemm_fp16_medium, launch_gemm_fp16_small};
  return kernels == Kernels::kSm80 ? (bf16 ? kBf16 : kFp16)[tile] : nullptr;
}

cudaError_t launch_sparse_gemm(const SparseLinearParams& params, const CompressedOperand& a,
                               cudaStream_t stream) {
  int device = 0, sm_count = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = get_attribute(cudaDevAttrMultiProcessorCount, device, &sm_count);
      error != cudaSuccess) {
    return error;
  }
  const int tile = a.kernels == Kernels::kSm90
                       ? choose_tile(kTilesSm90, params.rows, params.out_channels, sm_count)
                       : choose_tile(kTiles, params.rows, params.out_channels, sm_count);
  SparseGemmLaunch* const launch = tile_launch(a.kernels, params.dtype, tile);
  return launch == nullptr ? cudaErrorNotSupported : launch(params, a, device, stream);
}

}  // namespace lynx
