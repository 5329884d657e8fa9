// SPDX-License-Identifier: Apache-2.0
// The kernels as C functions, for programs without TensorRT: `lynx-compile bench` calls them through ctypes.
// Those that launch return a cudaError_t, or LYNX_OTHER_VERSION.
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
  params.activation = lynx::Activation(call.activation);
  params.activation_from = call.activation_from;
  params.producer = lynx::Producer(call.producer);
  params.producer_activation = lynx::Activation(call.producer_activation);
  params.halves = lynx::Halves(call.halves);
  params.rms = call.rms != 0, params.epsilon = call.epsilon, params.gain_rows = call.gain_rows;
  params.gain = call.gain, params.shift = call.shift, params.gate = call.gate;
  params.x = call.x, params.weight = call.weight, params.lora_down = call.lora_down, params.bias = call.bias;
  params.y = call.y, params.workspace = call.workspace;
  return params;
}

lynx::SparseWeightParams params_of(const LynxSparseWeightLinear& call) {
  lynx::SparseWeightParams params{};
  params.dtype = call.fp16 ? lynx::DType::kFp16 : lynx::DType::kBf16;
  params.rows = call.rows;
  params.channels = call.channels;
  params.out_channels = call.out_channels;
  params.activation = lynx::Activation(call.activation);
  params.activation_from = call.activation_from;
  params.gated = call.gated != 0;
  if (const auto* const reader = lynx::reader_of(call.metadata_layout)) params.set = reader->set;
  params.x = call.x, params.values = call.values;
  params.metadata = static_cast<const uint32_t*>(call.metadata);
  params.bias = call.bias, params.y = call.y, params.workspace = call.workspace;
  return params;
}

// Whether the caller means the struct that this library was built with.
template <class Call>
bool same_version(const Call* call) {
  return call != nullptr && call->struct_bytes == int32_t(sizeof(Call));
}

lynx::DType dtype_of(int fp16) { return fp16 ? lynx::DType::kFp16 : lynx::DType::kBf16; }

// A part of the op, on the compressed operand in the call's workspace.
template <class Launch>
int run_part(const LynxSparseLinear* call, const Launch& launch) {
  if (!same_version(call)) return LYNX_OTHER_VERSION;
  const lynx::SparseLinearParams params = params_of(*call);
  if (const cudaError_t error = lynx::check_arguments(params); error != cudaSuccess) return error;
  lynx::InstructionSet set;
  if (const cudaError_t error = lynx::choose_instructions(params.dtype, &set); error != cudaSuccess)
    return error;
  return launch(params, lynx::compressed_operand(params, set));
}

}  // namespace

LYNX_EXPORT int lynx_abi() { return LYNX_ABI; }

// Bytes of workspace that a call needs on any GPU that the library runs on.
LYNX_EXPORT int64_t lynx_workspace_bytes(const LynxSparseLinear* call) {
  if (!same_version(call)) return LYNX_OTHER_VERSION;
  return int64_t(lynx::workspace_bytes(params_of(*call)));
}

LYNX_EXPORT int64_t lynx_weight_workspace_bytes(const LynxSparseWeightLinear* call) {
  if (!same_version(call)) return LYNX_OTHER_VERSION;
  return int64_t(lynx::weight_workspace_bytes(params_of(*call)));
}

// Whether the library was built with GEMMs of the element type that read a metadata layout, 80 or 90.
LYNX_EXPORT int lynx_holds(int fp16, int metadata_layout) {
  const auto* const reader = lynx::reader_of(metadata_layout);
  return reader != nullptr && lynx::holds(reader->set, dtype_of(fp16));
}

// Which metadata layout a sparse weight of the element type should have for the current device: 80, 90, or 0
// where the kernels do not run.
LYNX_EXPORT int lynx_metadata_layout(int fp16) {
  lynx::InstructionSet set;
  if (lynx::choose_instructions(dtype_of(fp16), &set) != cudaSuccess) return 0;
  return lynx::traits_of(set).metadata_layout;
}

// Number of tile configurations for the element type on the current device; 0 where the kernels do not run.
LYNX_EXPORT int lynx_tile_count(int fp16) {
  lynx::InstructionSet set;
  return lynx::choose_instructions(dtype_of(fp16), &set) == cudaSuccess ? lynx::tile_count(set) : 0;
}

// The whole op: checks, pruning pass, GEMM.
LYNX_EXPORT int lynx_sparse_linear(const LynxSparseLinear* call, cudaStream_t stream) {
  if (!same_version(call)) return LYNX_OTHER_VERSION;
  return lynx::launch_sparse_linear(params_of(*call), call->tile, stream);
}

// The pruning pass alone, after the same checks.
LYNX_EXPORT int lynx_prune(const LynxSparseLinear* call, cudaStream_t stream) {
  return run_part(call, [stream](const auto& params, const auto& operand) {
    return lynx::launch_prune(params, operand, stream);
  });
}

// The GEMM alone, on what a pruning pass left in the workspace.
LYNX_EXPORT int lynx_pruned_gemm(const LynxSparseLinear* call, cudaStream_t stream) {
  return run_part(call, [call, stream](const auto& params, const auto& operand) {
    return lynx::launch_pruned_gemm(params, operand, call->tile, stream);
  });
}

// The op with a sparse weight.
LYNX_EXPORT int lynx_sparse_weight_linear(const LynxSparseWeightLinear* call, cudaStream_t stream) {
  if (!same_version(call)) return LYNX_OTHER_VERSION;
  if (lynx::reader_of(call->metadata_layout) == nullptr) return cudaErrorInvalidValue;
  return lynx::launch_sparse_weight_linear(params_of(*call), call->tile, stream);
}
