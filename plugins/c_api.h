// SPDX-License-Identifier: Apache-2.0
// The arguments of the C functions in c_api.cpp, mirrored in lynx_compile/torch_ops/bindings.py.
#pragma once

#include <stdint.h>

// Counts the changes of this interface. Callers compare it with lynx_abi(), and tell the size of what they
// pass in struct_bytes: a caller of another version gets LYNX_OTHER_VERSION and nothing is launched.
#define LYNX_ABI 5
#define LYNX_OTHER_VERSION (-1)

// One call of the op with sparse activations.
struct LynxSparseLinear {
  int32_t struct_bytes;  // sizeof(struct LynxSparseLinear)
  int32_t fp16;          // 0: bf16
  int32_t rank;
  int64_t rows;
  int32_t channels, out_channels;
  int32_t norm_scale;
  int32_t activation;  // of y, and below of x: 0: none, 1: GELU (tanh), 2: GELU (erf), 3: SiLU
  int32_t activation_from;
  int32_t tile;      // -1: chosen by the dispatcher
  int32_t producer;  // 0: none, 1: norm, 2: activation, 3: activation times gate
  int32_t producer_activation;
  int32_t
      halves;  // 0: x and the gate apart, 1: x first and gate second half of their tensors, 2: the other way
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
  int32_t activation, activation_from;
  int32_t gated;  // the activation of 8 rows times the 8 below them, from activation_from on
  int32_t tile;
  const void *x, *values, *metadata, *bias;
  void *y, *workspace;
};
