// SPDX-License-Identifier: Apache-2.0
#include "sparse_gemm_sm90.cuh"

namespace lynx {

cudaError_t launch_gemm_sm90_bf16_wide(const SparseLinearParams& params, const CompressedOperand& a,
                                       int device, cudaStream_t stream) {
  return SparseGemmSm90<cutlass::bfloat16_t, kWide>::launch(params, a, device, stream);
}

cudaError_t launch_gemm_sm90_bf16_narrow(const SparseLinearParams& params, const CompressedOperand& a,
                                         int device, cudaStream_t stream) {
  return SparseGemmSm90<cutlass::bfloat16_t, kNarrow>::launch(params, a, device, stream);
}

}  // namespace lynx
