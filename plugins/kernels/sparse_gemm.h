// SPDX-License-Identifier: Apache-2.0
// The sparse GEMMs as one function per element type, tile configuration and operand. Each is instantiated in
// a file of its own, since they take a minute to compile.
#pragma once

#include "sparse24.h"
#include "sparse_linear.h"
#include "tile_config.h"

namespace lynx {

// Which side of y = x W^T is 2:4 and compressed.
enum class Operand { kActivation, kWeight };

// One GEMM, D [m, n] = S [m, width] B^T [width, n] with S sparse. kActivation: m are tokens, n output
// channels, and y is D. kWeight: m are output channels, n tokens, and y [n, m] is D transposed.
struct SparseGemmCall {
  int m, n, width;
  const void* values;        // T [padded_rows(m), width / 2]
  const uint32_t* metadata;  // padded_rows(m) rows by width channels
  const void* dense;         // T [n, width]
  const float* scale;        // [padded_rows(m)]: y = scale * D + bias; kActivation only
  const void* bias;          // T [output channels]
  int gelu_from;             // first output channel that goes through GELU, a multiple of kGeluMultiple
  void* y;                   // T [tokens, output channels]
  void* workspace;           // gemm_workspace_bytes, 256-byte aligned
  size_t workspace_bytes;
};

// Bytes of workspace that every configuration can do with, for up to m x n.
int64_t gemm_workspace_bytes(Kernels kernels, int64_t m, int64_t n);

// Whether this library was built with the GEMMs of an element type for these kernels.
bool holds(Kernels kernels, DType dtype);

using SparseGemmLaunch = cudaError_t(const SparseGemmCall&, int device, cudaStream_t);

template <class Element, TileIndex kIndex, Operand kOperand>
cudaError_t launch_gemm_sm80(const SparseGemmCall& call, int device, cudaStream_t stream);

template <class Element, TileIndexSm90 kIndex, Operand kOperand>
cudaError_t launch_gemm_sm90(const SparseGemmCall& call, int device, cudaStream_t stream);

// Number of tile configurations, the function of one (null where this library was built without it), and the
// one that the dispatcher takes on the current device.
int tile_count(Kernels kernels);
SparseGemmLaunch* tile_launch(Kernels kernels, DType dtype, Operand operand, int tile);
cudaError_t best_tile(Kernels kernels, const SparseGemmCall& call, int* tile);

// Runs one; tile kAnyTile: the dispatcher's choice.
constexpr int kAnyTile = -1;
cudaError_t launch_sparse_gemm(Kernels kernels, DType dtype, Operand operand, const SparseGemmCall& call,
                               int tile, cudaStream_t stream);

}  // namespace lynx
