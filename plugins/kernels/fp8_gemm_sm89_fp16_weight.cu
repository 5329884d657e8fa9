// SPDX-License-Identifier: Apache-2.0
#include "fp8_gemm_sm89.cuh"

namespace lynx {
LYNX_INSTANTIATE_FP8(Fp16, Fp8Operand::kSparseWeight, 0);
#if !defined(LYNX_FP8_ONE_TILE)
LYNX_INSTANTIATE_FP8(Fp16, Fp8Operand::kSparseWeight, 1);
LYNX_INSTANTIATE_FP8(Fp16, Fp8Operand::kSparseWeight, 2);
#endif
}  // namespace lynx
