// SPDX-License-Identifier: Apache-2.0
// The arguments of the C functions in fp8_c_api.cpp, mirrored in lynx_compile/torch_ops/fp8_bindings.py.
#pragma once

#include <stdint.h>

// One call of an op in FP8.
struct LynxFp8Linear {
  int32_t fp16;     // 0: bf16
  int32_t operand;  // 0: 2:4 weight, 1: dense, 2: 2:4 activations
  int64_t rows;
  int32_t channels, out_channels;
  int32_t activation, activation_from, gated;     // as LynxSparseWeightLinear has them
  int32_t tile;                                   // -1: chosen by the dispatcher
  int32_t producer, producer_activation, halves;  // as LynxSparseLinear has them
  int32_t rms;
  float epsilon;
  int64_t gain_rows;
  const void *x, *gain, *shift, *gate;
  const void *weight, *metadata, *weight_scale, *bias;
  void *y, *workspace;
  int32_t set;  // instructions: 0 the fastest that the device gets, 1 mma, 2 wgmma
};
