// SPDX-License-Identifier: Apache-2.0
// y = s * ([prune(z) | T / s] W^T) + bias on sparse tensor cores: parameters, workspace, launch. No TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace lynx {

enum class DType { kBf16, kFp16 };

// The sparse tensor-core instructions that multiply; the pruning pass writes the metadata layout they read.
enum class Kernels { kSm80, kSm90 };  // mma.sp: every GPU from sm_80 on; wgmma.sp: sm_90 alone

constexpr int kMaxOrderedChannels = 24576;  // K with an order: a row goes through 48 KiB of shared memory

// One call of the op. All tensors are dense, row-major, 16-byte aligned device memory; `T` is the element
// type.
struct SparseLinearParams {
  DType dtype;
  int64_t rows;      // M, tokens; any
  int channels;      // K, a multiple of 16
  int out_channels;  // N, a multiple of 8
  int rank;          // r, a multiple of 16 up to 128, or 0
  bool norm_scale;   // s = norm scale instead of 1

  const void* x;          // T [M, K]
  const void* weight;     // T [N, K'], K' = padded_width(K, r): W' | B in pairs (B_2j, B_2j+1, 0, 0) | 0
  const void* lora_down;  // T [r, K]; not read when r = 0
  const void* bias;       // T [N]
  const int32_t* order;   // [K], a permutation, or null: z = x[order] - centre
  const void* centre;     // T [K], or null
  const void* saliency;   // T [K], or null: selection by |z| * saliency
  void* y;                // T [M, N]
  void* workspace;        // workspace_bytes(M, K, r, whether there is an order), 256-byte aligned
};

// The compressed operand, as it lies in the workspace. Mp = padded_rows(M): rows M .. Mp are zero.
struct CompressedOperand {
  void* values;        // T [Mp, K' / 2]: kept values, then U = T / s, then zeros
  uint32_t* metadata;  // layout of `kernels`, Mp rows by K' channels
  float* scale;        // s [Mp]
  void* reordered;     // T [M, K]: x[:, order]; there only with an order
  Kernels kernels;
};

// Bytes of workspace for `rows` tokens; grows with rows, so a profile's largest M is enough.
size_t workspace_bytes(int64_t rows, int channels, int rank, bool ordered);

// Where the compressed operand lies in a workspace made for `rows` tokens.
CompressedOperand compressed_operand(void* workspace, int64_t rows, int channels, int rank, Kernels kernels);

// The fastest kernels that the current device runs and this library was built with.
// Returns cudaErrorNotSupported for a device below sm_80, or what querying the device returns.
cudaError_t choose_kernels(Kernels* kernels);

// Queues the whole op on `stream`: pruning pass, then GEMM. Allocates nothing, never synchronizes, may be
// captured. Returns cudaErrorInvalidValue for sizes outside the limits above, cudaErrorMisalignedAddress for
// pointers, else what choose_kernels and the launches return.
cudaError_t launch_sparse_linear(const SparseLinearParams& params, cudaStream_t stream);

// The parts of launch_sparse_linear, which checks the arguments for them. launch_prune begins with
// launch_reorder when there is an order; launch_sparse_gemm picks the tile for the operand's kernels.
cudaError_t launch_reorder(const SparseLinearParams& params, void* out, cudaStream_t stream);
cudaError_t launch_prune(const SparseLinearParams& params, const CompressedOperand& out, cudaStream_t stream);
cudaError_t launch_sparse_gemm(const SparseLinearParams& params, const CompressedOperand& a,
                               cudaStream_t stream);

}  // namespace lynx
