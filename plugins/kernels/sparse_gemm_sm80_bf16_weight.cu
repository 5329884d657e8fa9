// SPDX-License-Identifier: Apache-2.0
#include "sparse_gemm_sm80.cuh"

namespace lynx {
LYNX_INSTANTIATE_SM80(Bf16, Operand::kWeight);
}
