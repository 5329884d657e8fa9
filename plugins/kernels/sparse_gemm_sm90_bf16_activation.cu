// SPDX-License-Identifier: Apache-2.0
#include "sparse_gemm_sm90.cuh"

namespace lynx {
LYNX_INSTANTIATE_GEMM(InstructionSet::kWgmmaSp, Bf16, Operand::kActivation);
}
