// SPDX-License-Identifier: Apache-2.0
// CUDA's conversions to and from fp16, by definition.
#pragma once

#include "tests/reference.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) { return float(reference::fp16()[value.bits]); }
inline __half __float2half_rn(float value) { return {reference::fp16().nearest(value)}; }
