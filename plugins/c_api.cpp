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
  params.x = call.x, params.weight = call.weight, params.lora_down = call.lora_down, params.bias = call.bias;
  params.order = static_cast<const int32_t*>(call.order);
  params.centre = call.centre, params.saliency = call.saliency;
  params.y = call.y, params.workspace = call.workspace;
  return params;
}

cudaError_t operand_of(const LynxSparseLinear& call, lynx::CompressedOperand* operand) {
  lynx::Kernels kernels;
  if (const cudaError_t error = lynx::choose_kernels(&kernels); error != cudaSuccess) return error;
  *operand = lynx::compressed_operand(call.workspace, call.rows, call.channels, call.rank, kernels);
  return cudaSuccess;
}

}  // namespace

// Bytes of workspace that a call needs.
LYNX_EXPORT int64_t lynx_workspace_bytes(const LynxSparseLinear* call) {
  return int64_t(lynx::workspace_bytes(call->rows, call->channels, call->rank, call->order != nullptr));
}

// Number of tile configurations on the current device; 0 where there is none that the kernels run on.
LYNX_EXPORT int lynx_tile_count() {
  lynx::Kernels kernels;
  return lynx::choose_kernels(&kernels) == cudaSuccess ? lynx::tile_count(kernels) : 0;
}

// The whole op: checks, pruning pass, GEMM.
LYNX_EXPORT int lynx_sparse_linear(const LynxSparseLinear* call, cudaStream_t stream) {
  return lynx::launch_sparse_linear(params_of(*call), stream);
}

// The pruning pass alone.
LYNX_EXPORT int lynx_prune(const LynxSparseLinear* call, cudaStream_t stream) {
  lynx::CompressedOperand operand;
  if (const cudaError_t error = operand_of(*call, &operand); error != cudaSuccess) return error;
  return lynx::launch_prune(params_of(*call), operand, stream);
}

// The GEMM alone, on what a pruning pass left in the workspace.
LYNX_EXPORT int lynx_sparse_gemm(const LynxSparseLinear* call, cudaStream_t stream) {
  lynx::CompressedOperand operand;
  if (const cudaError_t error = operand_of(*call, &operand); error != cudaSuccess) return error;
  const lynx::SparseLinearParams params = params_of(*call);
  if (call->tile < 0) return lynx::launch_sparse_gemm(params, operand, stream);
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (call->tile >= lynx::tile_count(operand.kernels)) return cudaErrorInvalidValue;
  return lynx::tile_launch(operand.kernels, params.dtype, call->tile)(params, operand, device, stream);
}
