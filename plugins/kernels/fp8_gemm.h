// SPDX-License-Identifier: Apache-2.0
// The FP8 GEMMs as one function per element type of y, operand and tile configuration. Each is instantiated
// in a file of its own, since they take half a minute to compile.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "fp8.h"
#include "fp8_tiles.h"
#include "sparse_linear.h"
#include "tile_config.h"

namespace lynx {

// One GEMM: y = act(s_x * s_w * (x_q W_q^T) + bias), accumulated in float32. Channels are those of W.
struct Fp8GemmCall {
  int tokens, channels, width;  // rows of x, rows of W, K' (K in whole steps of 128)
  const void* x;                // e4m3 [tokens, K'], or kSparseActivation: [tokens, K' / 2]
  const void* weight;           // e4m3 [channels, K'], or kSparseWeight: [channels, K' / 2]
  const uint32_t* metadata;     // of the sparse operand, Fp8Metadata
  const float* x_scale;         // [tokens]
  const float* weight_scale;    // [channels]
  const void* bias;             // T [channels]
  Activation activation;        // of the channels; ungated, kNone or a GELU
  int activation_from;          // from here on, a multiple of kGeluMultiple; `channels` with kNone
  bool gated;                   // as SparseWeightParams says
  void* y;                      // T [tokens, y_channels]
  void* workspace;              // fp8_gemm_workspace_bytes, 256-byte aligned
  size_t workspace_bytes;
  bool follows_pass;  // the kernel ahead on the stream is our rounding pass: begin before it ends
};

// Whether the epilogue with the tanh GELU alone serves the call.
constexpr bool is_plain(const Fp8GemmCall& call) {
  return !call.gated && (call.activation == Activation::kNone || call.activation == Activation::kGeluTanh);
}

// Gates and other activations have kernels of fast sums alone.
constexpr bool promotes_sums(const Fp8GemmCall& call) {
  return is_plain(call) && call.width >= kPromotedWidth;
}

constexpr int y_channels(const Fp8GemmCall& call) {
  return call.gated ? call.activation_from + (call.channels - call.activation_from) / 2 : call.channels;
}

// The instructions that the current device gets for an element type: the fastest that it runs and this
// library was built with. cudaErrorNotSupported where there are none.
cudaError_t choose_fp8_set(DType dtype, Fp8Set* set);

// cudaSuccess where the device runs `set`, and the library has it.
cudaError_t check_fp8_set(Fp8Set set, DType dtype);

// Bytes of workspace that every configuration can do with, for up to `tokens` and `channels`.
int64_t fp8_gemm_workspace_bytes(Fp8Set set, Fp8Operand operand, int64_t tokens, int64_t channels);

using Fp8GemmLaunch = cudaError_t(const Fp8GemmCall&, int device, cudaStream_t);

template <Fp8Set kSet, class Element, Fp8Operand kOperand, int kIndex>
cudaError_t launch_fp8_gemm(const Fp8GemmCall& call, int device, cudaStream_t stream);

// Number of tile configurations that this library was built with: of a set, or of that which the current
// device gets; 0 where it gets none.
int fp8_tactics(Fp8Set set, Fp8Operand operand);
int fp8_tactics(DType dtype, Fp8Operand operand);

// The function of a configuration; null where this library was built without it.
Fp8GemmLaunch* fp8_tile_launch(Fp8Set set, DType dtype, Fp8Operand operand, int tile);

// Runs one; tile kAnyTile: the dispatcher's choice.
cudaError_t launch_fp8_gemm(Fp8Set set, DType dtype, Fp8Operand operand, const Fp8GemmCall& call, int tile,
                            cudaStream_t stream);

}  // namespace lynx
