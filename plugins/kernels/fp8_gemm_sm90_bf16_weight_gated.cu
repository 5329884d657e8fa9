// SPDX-License-Identifier: Apache-2.0
#include "fp8_gemm_gated_sm90.cuh"

namespace lynx {
LYNX_INSTANTIATE_GATED_FP8(Bf16, Fp8Operand::kSparseWeight, 0);
#if !defined(LYNX_FP8_ONE_TILE)
LYNX_INSTANTIATE_GATED_FP8(Bf16, Fp8Operand::kSparseWeight, 1);
LYNX_INSTANTIATE_GATED_FP8(Bf16, Fp8Operand::kSparseWeight, 2);
LYNX_INSTANTIATE_GATED_FP8(Bf16, Fp8Operand::kSparseWeight, 3);
#endif
}  // namespace lynx
