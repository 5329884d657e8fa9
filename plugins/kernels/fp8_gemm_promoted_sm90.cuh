// SPDX-License-Identifier: Apache-2.0
// The GEMMs of fp8_gemm_sm90.cuh with promoted sums. Included by fp8_gemm_sm90_*_promoted.cu alone, so that
// no kernel is compiled twice.
#pragma once

#include "fp8_gemm_sm90.cuh"

namespace lynx {

template <class Element, Fp8Operand kOperand, int kIndex>
cudaError_t launch_promoted_fp8_gemm(const Fp8GemmCall& call, int device, cudaStream_t stream) {
  return Fp8GemmSm90<CutlassElement<Element>, kOperand, kIndex, false, Fp8Sums::kPromoted>::launch(
      call, device, stream);
}

// Instantiates a tile of one operand and element type.
#define LYNX_INSTANTIATE_PROMOTED_FP8(Element, kOperand, kIndex)                                    \
  template cudaError_t launch_promoted_fp8_gemm<Element, kOperand, kIndex>(const Fp8GemmCall&, int, \
                                                                           cudaStream_t)

}  // namespace lynx
