// SPDX-License-Identifier: Apache-2.0
#include "sparse_gemm_sm80.cuh"

namespace lynx {

cudaError_t launch_gemm_fp16_small(const SparseLinearParams& params, const CompressedOperand& a, int device,
                                   cudaStream_t stream) {
  return SparseGemmSm80<cutlass::half_t, kSmall>::launch(params, a, device, stream);
}

cudaError_t launch_gemm_fp16_medium(const SparseLinearParams& params, const CompressedOperand& a, int device,
                                    cudaStream_t stream) {
  return SparseGemmSm80<cutlass::half_t, kMedium>::launch(params, a, device, stream);
}

}  // namespace lynx
