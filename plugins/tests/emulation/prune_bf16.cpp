// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include "kernels/prune_tokens.cuh"

namespace lynx {
LYNX_INSTANTIATE_PRUNE(InstructionSet::kMmaSp, Bf16);
LYNX_INSTANTIATE_PRUNE(InstructionSet::kWgmmaSp, Bf16);
}  // namespace lynx
