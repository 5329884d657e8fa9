// SPDX-License-Identifier: Apache-2.0
// The arguments of the C functions in c_api.cpp, mirrored in lynx_compile/torch_ops/bindings.py.
#pragma once

#include <stdint.h>

// Counts the changes of this interface. Callers compare it with lynx_abi(), and tell the size of what they
// pass in struct_bytes: a caller of another version gets LYNX_OTHER_VERSION and nothing is launched.
#define LYNX_ABI 3
#define LYNX_OTHER_VERSION (-1)

// One call of the op with sparse activations.
struct LynxSparseLinear {
  int32_t struct_bytes;  // sizeof(struct LynxSparseLinear)
  int32_t fp16;          // 0: bf16
  int32_t rank;
  int64_t rows;
  int32_t channels, out_channels;
  int32_t norm_scale;
  int32_t gelu_from;  // out_channels: no GELU
  int32_t tile;       // -1: chosen by the dispatcher
  int32_t producer;   // 0: none, 1: norm, 2: GELU, 3: SiLU times gate
  int32_t rms;
  float epsilon;
  int64_t gain_rows;
  const void *x, *gain, *shift, *gate;
  const void *weight, *lora_down, *bias;
  void *y, *workspace;
};

// One call of the op with a sparse weight.
struct LynxSparseWeightLinear {
  int32_t struct_bytes;  // sizeof(struct LynxSparseWeightLinear)
  int32_t fp16;
  int32_t metadata_layout;  // 80 or 90
  int64_t rows;
  int32_t channels, out_channels;
  int32_t gelu_from;
  int32_t tile;
  const void *x, *values, *metadata, *bias;
  void *y, *workspace;
};
