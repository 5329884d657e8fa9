// SPDX-License-Identifier: Apache-2.0
// CUDA's conversions to bf16, by definition.
#pragma once

#include "tests/reference.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {reference::bf16().nearest(value)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
