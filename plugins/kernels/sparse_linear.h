// SPDX-License-Identifier: Apache-2.0
// y = act(s * ([prune(z) | T / s] W^T) + bias), and y = act(x W_s^T + bias) with a sparse weight, on sparse
// tensor cores: parameters, workspace, launch. No TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "traits.h"

namespace lynx {

// What the pruning pass makes of x before it prunes, so that the dense result is never written.
enum class Producer {
  kNone,   // x
  kNorm,   // norm(x) * gain + shift: LayerNorm or RMSNorm over the channels, without weights of its own
  kGelu,   // gelu(x)
  kGated,  // activation(x) * gate
};

// kGated: where x and the gate lie.
enum class Halves {
  kApart,      // in a tensor each, of K channels
  kXFirst,     // x in the first half of its tensor's 2 K channels, the gate in the second half of its own
  kGateFirst,  // the other way round
};

// Of both operands: CUTLASS multiplies the rows by the 64 channels of a metadata atom in an int
// (fill_layoutE).
constexpr int64_t kMaxRows = (int64_t(1) << 25) - 64;
constexpr int kMaxChannels = 1 << 23;  // K; 32 bits hold an offset within a tile of 128 rows

// One call of the op. All tensors are dense, row-major, 16-byte aligned device memory; `T` is the element
// type.
struct SparseLinearParams {
  DType dtype;
  int64_t rows;      // M, tokens; up to kMaxRows
  int channels;      // K, a multiple of 16, up to kMaxChannels
  int out_channels;  // N, a multiple of 8
  int rank;          // r, a multiple of 16 up to 128, or 0
  bool norm_scale;   // s = norm scale instead of 1

  Activation activation;  // of the output; kNone or a GELU
  int activation_from;    // first output channel that it applies to, a multiple of 64

  Producer producer;
  Activation producer_activation;  // kGelu: a GELU; kGated: any
  Halves halves;                   // kGated
  bool rms;                        // kNorm: RMSNorm instead of LayerNorm
  float epsilon;                   // kNorm
  int64_t gain_rows;  // kNorm: a divisor of M; each row of gain and shift serves as many consecutive tokens
  const void* gain;   // kNorm: T [gain_rows, K]
  const void* shift;  // kNorm: T [gain_rows, K]
  const void* gate;   // kGated: T [M, K], or [M, 2 K] where it is a half

  const void* x;          // T [M, K], or [M, 2 K] where x is a half
  const void* weight;     // T [N, K'], K' = padded_width(K, r): W' | B in pairs (B_2j, B_2j+1, 0, 0) | 0
  const void* lora_down;  // T [r, K]; not read when r = 0
  const void* bias;       // T [N]
  void* y;                // T [M, N]
  void* workspace;        // workspace_bytes, 256-byte aligned
};

// The compressed operand, as it lies in the workspace. Mp = padded_rows(M): rows M .. Mp are zero.
struct CompressedOperand {
  void* values;        // T [Mp, K' / 2]: kept values, then U = T / s, then zeros
  uint32_t* metadata;  // in the layout of `set`, Mp rows by K' channels
  float* scale;        // s [Mp]
  float* parts;        // sums of the pruning pass between its two kernels, prune_parts_bytes
  void* gemm;          // workspace of the GEMM
  size_t gemm_bytes;
  InstructionSet set;  // that will multiply
};

// Bytes of workspace of a call on any GPU that this library runs on, from its sizes and whether it has an
// order; grows with rows, so that a profile's largest M is enough.
size_t workspace_bytes(const SparseLinearParams& params);

// Where the compressed operand lies in the call's workspace.
CompressedOperand compressed_operand(const SparseLinearParams& params, InstructionSet set);

// The fastest instruction set that the current device runs and this library was built with for the type.
// Returns cudaErrorNotSupported where there are none, or what querying the device returns.
cudaError_t choose_instructions(DType dtype, InstructionSet* set);

// Whether the library was built with the instruction set for the type and the current device runs it; else
// cudaErrorNotSupported, or what querying the device returns.
cudaError_t check_runs(InstructionSet set, DType dtype);

// Whether a call's sizes are within the limits above (else cudaErrorInvalidValue) and its pointers there and
// aligned (cudaErrorMisalignedAddress).
cudaError_t check_arguments(const SparseLinearParams& params);

// Queues the whole op on `stream`: pruning pass, then GEMM. Allocates nothing, never synchronizes, may be
// captured. `tile`: a configuration of sparse_gemm.h, or -1 for the dispatcher's choice. Returns
// what check_arguments, choose_instructions and the launches return.
cudaError_t launch_sparse_linear(const SparseLinearParams& params, int tile, cudaStream_t stream);

// The parts of launch_sparse_linear; they do not check their arguments.
cudaError_t launch_prune(const SparseLinearParams& params, const CompressedOperand& out, cudaStream_t stream);
cudaError_t launch_pruned_gemm(const SparseLinearParams& params, const CompressedOperand& a, int tile,
                               cudaStream_t stream);

// One call of the op with a sparse weight, which was compressed at compile time for the instruction set that
// reads it. Np = padded_rows(N).
struct SparseWeightParams {
  DType dtype;
  int64_t rows;        // M, tokens; up to kMaxRows
  int channels;        // K, a multiple of 64, up to kMaxChannels
  int out_channels;    // N, a multiple of 8
  InstructionSet set;  // whose metadata layout the weight has

  // Of the output; with `gated`, which wants any but kNone, rows of W come in pairs from activation_from on:
  // in each 16 of them, activation(row i) * (row i + 8) becomes one output channel, i < 8.
  Activation activation;
  int activation_from;  // a row of W, a multiple of 64
  bool gated;

  const void* x;             // T [M, K]
  const void* values;        // T [Np, K / 2]; rows N .. Np are zero
  const uint32_t* metadata;  // in the layout of `set`, Np rows by K channels
  const void* bias;          // T [N]
  void* y;                   // T [M, N], or where gated [M, activation_from + (N - activation_from) / 2]
  void* workspace;           // weight_workspace_bytes, 256-byte aligned
};

size_t weight_workspace_bytes(const SparseWeightParams& params);

// Queues it on `stream`, as above. Returns cudaErrorNotSupported also where the device cannot
// run `set`.
cudaError_t launch_sparse_weight_linear(const SparseWeightParams& params, int tile, cudaStream_t stream);

}  // namespace lynx
