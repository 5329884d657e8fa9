// SPDX-License-Identifier: Apache-2.0
#include "sparse_gemm_sm90.cuh"

namespace lynx {
template <>
cudaError_t launch_gated_gemm<Fp16>(const SparseGemmCall& call, int tile, int device, cudaStream_t stream) {
  return launch_form<CutlassElement<Fp16>, Form::kGated>(call, tile, device, stream);
}
}  // namespace lynx
