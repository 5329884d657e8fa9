// SPDX-License-Identifier: Apache-2.0
// y = act(s_x s_w (x_q W_q^T) + bias) in FP8: parameters, workspace, launch. No TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "fp8_tiles.h"
#include "sparse_linear.h"

namespace lynx {

constexpr int kMaxFp8Channels = 32768;  // K: a thread block holds a token in registers

// One call of the op. All tensors are dense, row-major, 16-byte aligned device memory; `T` is the element
// type. K' = fp8_width(K), Np = padded_rows(N); what lies behind K and N is zero.
struct Fp8LinearParams {
  DType dtype;
  Fp8Operand operand;
  int64_t rows;      // M, tokens; any
  int channels;      // K, a multiple of 16, up to kMaxFp8Channels
  int out_channels;  // N, a multiple of 8

  // Of the output; ungated, kNone or a GELU. With `gated`, which wants any but kNone, rows of W come in
  // pairs from activation_from on, as SparseWeightParams says.
  Activation activation;
  int activation_from;  // a row of W, a multiple of 64
  bool gated;

  Producer producer;               // what x is made into before it is rounded; rounded to T in between
  Activation producer_activation;  // kGelu: a GELU; kGated: any
  Halves halves;                   // kGated
  bool rms;                        // kNorm: RMSNorm instead of LayerNorm
  float epsilon;                   // kNorm
  int64_t gain_rows;  // kNorm: a divisor of M; each row of gain and shift serves as many consecutive tokens
  const void* gain;   // kNorm: T [gain_rows, K]
  const void* shift;  // kNorm: T [gain_rows, K]
  const void* gate;   // kGated: T [M, K], or [M, 2 K] where it is a half

  const void* x;              // T [M, K], or [M, 2 K] where x is a half
  const void* weight;         // e4m3 [N, K'], or kSparseWeight: its kept values, [Np, K' / 2]
  const uint32_t* metadata;   // kSparseWeight: [K' / 128, Np, 4]
  const float* weight_scale;  // s_w [N]
  const void* bias;           // T [N]
  void* y;                    // T [M, N], or where gated [M, activation_from + (N - activation_from) / 2]
  void* workspace;            // fp8_workspace_bytes, 256-byte aligned

  std::optional<Fp8Set> set;  // whose GEMM to run; none: the fastest that the device gets
};

// x as the GEMM reads it, in the workspace.
struct RoundedOperand {
  uint8_t* values;     // e4m3 [M, K'], or kSparseActivation: the kept ones, [Mp, K' / 2]
  uint16_t* metadata;  // kSparseActivation: Fp8Metadata of Mp = padded_rows(M) rows
  float* scale;        // s_x [Mp]
  void* gemm;          // workspace of the GEMM
  size_t gemm_bytes;
};

// Bytes of workspace of a call on the current device, or without one on any, from its sizes; grows with rows.
size_t fp8_workspace_bytes(const Fp8LinearParams& params);
// That of the GEMM alone: by what the device gets, or where that cannot be said, as much as any needs.
size_t rounded_gemm_bytes(const Fp8LinearParams& params);
RoundedOperand rounded_operand(const Fp8LinearParams& params);

// Whether this library was built with FP8 kernels for the type, of any GPU.
bool holds_fp8(DType dtype);

// cudaSuccess where this library's FP8 kernels for the type run on the current device, else
// cudaErrorNotSupported.
cudaError_t fp8_runs(DType dtype);

// Queues the op on `stream`: rounding pass, then GEMM. As launch_sparse_linear; `tile`: of fp8_tiles.h, or
// -1.
cudaError_t launch_fp8_linear(const Fp8LinearParams& params, int tile, cudaStream_t stream);

// Its parts. `follows_pass`: the GEMM comes right behind the rounding pass on the stream and may begin early.
cudaError_t launch_fp8_round(const Fp8LinearParams& params, const RoundedOperand& out, cudaStream_t stream);
cudaError_t launch_rounded_gemm(const Fp8LinearParams& params, const RoundedOperand& x, int tile,
                                bool follows_pass, cudaStream_t stream);

}  // namespace lynx
