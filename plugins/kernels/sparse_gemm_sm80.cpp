// SPDX-License-Identifier: Apache-2.0
// Picks the tile configuration for a problem on the current device.
#include "sparse_gemm_sm80.h"

namespace lynx {
namespace {

SparseGemmLaunch* launch_function(DType dtype, TileIndex tile) {
  static constexpr SparseGemmLaunch* kBf16[kTileConfigs] = {launch_gemm_bf16_medium, launch_gemm_bf16_small};
  static constexpr SparseGemmLaunch* kFp16[kTileConfigs] = {launch_gemm_fp16_medium, launch_gemm_fp16_small};
  return (dtype == DType::kBf16 ? kBf16 : kFp16)[tile];
}

}  // namespace

cudaError_t launch_sparse_gemm_sm80(const SparseLinearParams& params, const CompressedOperand& a,
                                    cudaStream_t stream) {
  int device = 0, major = 0, sm_count = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      error != cudaSuccess) {
    return error;
  }
  if (major < 8) return cudaErrorNotSupported;  // mma.sp begins with sm_80
  if (const cudaError_t error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess) {
    return error;
  }
  const TileIndex tile = choose_tile(params.rows, params.out_channels, sm_count);
  return launch_function(params.dtype, tile)(params, a, device, stream);
}

}  // namespace lynx
