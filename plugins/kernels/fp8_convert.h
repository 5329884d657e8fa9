// SPDX-License-Identifier: Apache-2.0
// The device's conversion to e4m3, and the hand-over to the next kernel: what g++ has no word for and
// plugins/tests/emulation stands in for.
#pragma once

#include <cstdint>

namespace lynx {

#if !defined(LYNX_EMULATED)

// Two values, the first in the lower byte; needs sm_89.
__device__ __forceinline__ uint16_t e4m3_pair(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// Lets a kernel that was launched to follow this one begin; it waits for our results itself. Before sm_90 it
// begins when this one ends.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The larger of each half of two words, as unsigned integers.
__device__ __forceinline__ uint32_t max_of_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

#endif

}  // namespace lynx
