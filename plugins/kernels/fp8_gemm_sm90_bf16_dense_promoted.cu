// SPDX-License-Identifier: Apache-2.0
#include "fp8_gemm_promoted_sm90.cuh"

namespace lynx {
LYNX_INSTANTIATE_PROMOTED_FP8(Bf16, Fp8Operand::kDense, 0);
LYNX_INSTANTIATE_PROMOTED_FP8(Bf16, Fp8Operand::kDense, 1);
LYNX_INSTANTIATE_PROMOTED_FP8(Bf16, Fp8Operand::kDense, 2);
LYNX_INSTANTIATE_PROMOTED_FP8(Bf16, Fp8Operand::kDense, 3);
}  // namespace lynx
