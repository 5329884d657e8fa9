// SPDX-License-Identifier: Apache-2.0
#include "fp8_gemm_promoted_sm90.cuh"

namespace lynx {
LYNX_INSTANTIATE_PROMOTED_FP8(Fp16, Fp8Operand::kSparseWeight, 0);
LYNX_INSTANTIATE_PROMOTED_FP8(Fp16, Fp8Operand::kSparseWeight, 1);
LYNX_INSTANTIATE_PROMOTED_FP8(Fp16, Fp8Operand::kSparseWeight, 2);
LYNX_INSTANTIATE_PROMOTED_FP8(Fp16, Fp8Operand::kSparseWeight, 3);
}  // namespace lynx
