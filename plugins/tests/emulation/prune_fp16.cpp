// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include "kernels/prune_tokens.cuh"

namespace lynx {
LYNX_INSTANTIATE_PRUNE(InstructionSet::kMmaSp, Fp16);
LYNX_INSTANTIATE_PRUNE(InstructionSet::kWgmmaSp, Fp16);
}  // namespace lynx
