// SPDX-License-Identifier: Apache-2.0
// The kernels as C functions, for programs without TensorRT: `lynx-compile bench` calls them through ctypes.
// All return a cudaError_t.
#include "c_api.h"
#include "kernels/sparse_gemm.h"
#include "kernels/sparse_linear.h"

#define LYNX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

lynx::SparseLinearParams params_of(const LynxSparseLinear& call) {
  lynx::SparseLinearParams params;
  params.dtype = call.fp16 ? lynx::DType::kFp16 : lynx::DType::kBf16;
  params.rows = call.rows;
  params.channels = call.channels;
  params.out_channels = call.out_channels;
  params.rank = call.rank;
  params.norm_scale = call.norm_scale != 0;
  params.gelu_from = call.gelu_from;
  params.producer = lynx::Producer(call.producer);
  params.rms = call.rms != 0, params.epsilon = call.epsilon, params.gain_rows = call.gain_rows;
  params.gain = call.gain, params.shift = call.shift, params.gate = call.gate;
  params.x = call.x, params.weight = call.weight, params.lora_down = call.lora_down, params.bias = call.bias;
  params.order = static_cast<const int32_t*>(call.order);
  params.centre = call.centre, params.saliency = call.saliency;
  params.y = call.y, params.workspace = call.workspace;
  return params;
}

lynx::SparseWeightParams params_of(const LynxSparseWeightLinear& call) {
  lynx::SparseWeightParams params;
  params.dtype = call.fp16 ? lynx::DType::kFp16 : lynx::DType::kBf16;
  params.rows = call.rows;
  params.channels = call.channels;
  params.out_channels = call.out_channels;
  params.gelu_from = call.gelu_from;
  params.kernels = call.metadata_layout == 90 ? lynx::Kernels::kSm90 : lynx::Kernels::kSm80;
  params.x = call.x, params.values = call.values;
  params.metadata = static_cast<const uint32_t*>(call.metadata);
  params.bias = call.bias, params.y = call.y, params.workspace = call.workspace;
  return params;
}

cudaError_t operand_of(const LynxSparseLinear& call, lynx::CompressedOperand* operand) {
  lynx::Kernels kernels;
  if (const cudaError_t error = lynx::choose_kernels(&kernels); error != cudaSuccess) return error;
  *operand = lynx::compressed_operand(params_of(call), kernels);
  return cudaSuccess;
}

}  // namespace

// Bytes of workspace that a call needs on the current device; 0 where the kernels do not run.
LYNX_EXPORT int64_t lynx_workspace_bytes(const LynxSparseLinear* call) {
  lynx::Kernels kernels;
  if (lynx::choose_kernels(&kernels) != cudaSuccess) return 0;
  return int64_t(lynx::workspace_bytes(params_of(*call), kernels));
}

LYNX_EXPORT int64_t lynx_weight_workspace_bytes(const LynxSparseWeightLinear* call) {
  return int64_t(lynx::weight_workspace_bytes(params_of(*call)));
}

// Which metadata layout a sparse weight should have for the current device: 80, 90, or 0 where the kernels do
// not run.
LYNX_EXPORT int lynx_metadata_layout() {
  lynx::Kernels kernels;
  if (lynx::choose_kernels(&kernels) != cudaSuccess) return 0;
  return kernels == lynx::Kernels::kSm90 ? 90 : 80;
}

// Number of tile configurations on the current device; 0 where there is none that the kernels run on.
LYNX_EXPORT int lynx_tile_count() {
  lynx::Kernels kernels;
  return lynx::choose_kernels(&kernels) == cudaSuccess ? lynx::tile_count(kernels) : 0;
}

// The whole op: checks, pruning pass, GEMM.
LYNX_EXPORT int lynx_sparse_linear(const LynxSparseLinear* call, cudaStream_t stream) {
  return lynx::launch_sparse_linear(params_of(*call), call->tile, stream);
}

// The pruning pass alone.
LYNX_EXPORT int lynx_prune(const LynxSparseLinear* call, cudaStream_t stream) {
  lynx::CompressedOperand operand;
  if (const cudaError_t error = operand_of(*call, &operand); error != cudaSuccess) return error;
  return lynx::launch_prune(params_of(*call), operand, stream);
}

// The GEMM alone, on what a pruning pass left in the workspace.
LYNX_EXPORT int lynx_pruned_gemm(const LynxSparseLinear* call, cudaStream_t stream) {
  lynx::CompressedOperand operand;
  if (const cudaError_t error = operand_of(*call, &operand); error != cudaSuccess) return error;
  return lynx::launch_pruned_gemm(params_of(*call), operand, call->tile, stream);
}

// The op with a sparse weight.
LYNX_EXPORT int lynx_sparse_weight_linear(const LynxSparseWeightLinear* call, cudaStream_t stream) {
  return lynx::launch_sparse_weight_linear(params_of(*call), call->tile, stream);
}
