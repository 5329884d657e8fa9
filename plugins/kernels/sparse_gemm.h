// SPDX-License-Identifier: Apache-2.0
// The sparse GEMMs and the pruning pass by instruction set and element type, and which of them a call gets.
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
  Activation activation;     // of the output channels
  int activation_from;       // from here on, a multiple of kGeluMultiple
  bool gated;                // kWeight only: as SparseWeightParams says
  void* y;                   // T [tokens, output channels]
  void* workspace;           // gemm_workspace_bytes, 256-byte aligned
  size_t workspace_bytes;
};

// Of a call with a sparse weight.
constexpr int y_channels(const SparseGemmCall& call) {
  return call.gated ? call.activation_from + (call.m - call.activation_from) / 2 : call.m;
}

// Bytes of workspace that every configuration can do with, for up to m x n.
int64_t gemm_workspace_bytes(InstructionSet set, int64_t m, int64_t n);

// Whether this library was built with the kernels of an instruction set for an element type.
bool holds(InstructionSet set, DType dtype);

// Number of tile configurations, and the one that the dispatcher takes on the current device.
int tile_count(InstructionSet set);
cudaError_t best_tile(InstructionSet set, const SparseGemmCall& call, int* tile);

// Runs one; tile kAnyTile: the dispatcher's choice.
constexpr int kAnyTile = -1;
cudaError_t launch_sparse_gemm(InstructionSet set, DType dtype, Operand operand, const SparseGemmCall& call,
                               int tile, cudaStream_t stream);

// ---- Instantiated in files of their own, of which a library may lack some: go through the functions above.

template <InstructionSet kSet, class Element, Operand kOperand>
cudaError_t launch_gemm(const SparseGemmCall& call, int tile, int device, cudaStream_t stream);

template <InstructionSet kSet, class Element>
cudaError_t launch_prune_pass(const SparseLinearParams& params, const CompressedOperand& out,
                              cudaStream_t stream);

#define LYNX_INSTANTIATE_GEMM(kSet, Element, kOperand) \
  template cudaError_t launch_gemm<kSet, Element, kOperand>(const SparseGemmCall&, int, int, cudaStream_t)

}  // namespace lynx
