// SPDX-License-Identifier: Apache-2.0
// The argument of the C functions in c_api.cpp.
#pragma once

#include <stdint.h>

// Layout of one call, mirrored in lynx_compile/engine/kernels.py; append only.
struct LynxSparseLinear {
  int32_t fp16;  // 0: bf16
  int32_t rank;
  int64_t rows;
  int32_t channels, out_channels;
  int32_t norm_scale;
  int32_t tile;  // -1: chosen by the dispatcher
  const void *x, *weight, *lora_down, *bias, *order, *centre, *saliency;
  void *y, *workspace;
};
