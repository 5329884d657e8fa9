// SPDX-License-Identifier: Apache-2.0
// The arguments of the C functions in fp8_c_api.cpp, mirrored in lynx_compile/fp8_kernels.py.
#pragma once

#include <stdint.h>

// One call of an op in FP8.
struct LynxFp8Linear {
  int32_t fp16;     // 0: bf16
  int32_t operand;  // 0: 2:4 weight, 1: dense, 2: 2:4 activations
  int64_t rows;
  int32_t channels, out_channels;
  int32_t gelu_from;  // out_channels: no GELU
  int32_t tile;       // -1: chosen by the dispatcher
  int32_t producer;   // 0: none, 1: norm, 2: GELU, 3: SiLU of x's first half times its second
  int32_t rms;
  float epsilon;
  int64_t gain_rows;
  const void *x, *gain, *shift;
  const void *weight, *metadata, *weight_scale, *bias;
  void *y, *workspace;
  int32_t set;  // instructions: 0 the fastest that the device gets, 1 mma, 2 wgmma
};
