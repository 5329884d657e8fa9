// SPDX-License-Identifier: Apache-2.0
#include "prune_tokens.cuh"

namespace lynx {
LYNX_INSTANTIATE_PRUNE(InstructionSet::kWgmmaSp, Bf16);
}
