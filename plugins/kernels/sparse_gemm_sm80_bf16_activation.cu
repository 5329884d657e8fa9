// SPDX-License-Identifier: Apache-2.0
#include "sparse_gemm_sm80.cuh"

namespace lynx {
LYNX_INSTANTIATE_GEMM(InstructionSet::kMmaSp, Bf16, Operand::kActivation);
}
