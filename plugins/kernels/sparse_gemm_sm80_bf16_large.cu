// SPDX-License-Identifier: Apache-2.0
// Built only for the architectures whose shared memory holds the large tile.
#include "sparse_gemm_sm80.cuh"

namespace lynx {

cudaError_t launch_gemm_bf16_large(const SparseLinearParams& params, const CompressedOperand& a, int device,
                                   cudaStream_t stream) {
  return SparseGemmSm80<cutlass::bfloat16_t, kLarge>::launch(params, a, device, stream);
}

}  // namespace lynx
