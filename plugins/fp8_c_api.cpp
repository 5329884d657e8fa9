// SPDX-License-Identifier: Apache-2.0
// The FP8 kernels as C functions, as c_api.cpp has the others. Those that queue work return a cudaError_t.
#include "fp8_c_api.h"

#include "kernels/fp8_gemm.h"
#include "kernels/fp8_linear.h"

#define LYNX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

lynx::DType dtype_of(int fp16) { return fp16 ? lynx::DType::kFp16 : lynx::DType::kBf16; }

lynx::Fp8LinearParams params_of(const LynxFp8Linear& call) {
  lynx::Fp8LinearParams params;
  params.dtype = dtype_of(call.fp16);
  params.operand = lynx::Fp8Operand(call.operand);
  params.rows = call.rows, params.channels = call.channels, params.out_channels = call.out_channels;
  params.activation = lynx::Activation(call.activation);
  params.activation_from = call.activation_from, params.gated = call.gated != 0;
  params.producer = lynx::Producer(call.producer);
  params.producer_activation = lynx::Activation(call.producer_activation);
  params.halves = lynx::Halves(call.halves);
  params.rms = call.rms != 0, params.epsilon = call.epsilon, params.gain_rows = call.gain_rows;
  params.gain = call.gain, params.shift = call.shift, params.gate = call.gate;
  params.x = call.x, params.weight = call.weight;
  params.metadata = static_cast<const uint32_t*>(call.metadata);
  params.weight_scale = static_cast<const float*>(call.weight_scale);
  params.bias = call.bias, params.y = call.y, params.workspace = call.workspace;
  if (call.set != 0) params.set = lynx::Fp8Set(call.set - 1);
  return params;
}

}  // namespace

// Whether the library was built with FP8 kernels for the element type, of any GPU.
LYNX_EXPORT int lynx_fp8_holds(int fp16) { return lynx::holds_fp8(dtype_of(fp16)); }

// Whether the FP8 kernels run on the current device.
LYNX_EXPORT int lynx_fp8_runs(int fp16) { return lynx::fp8_runs(dtype_of(fp16)) == cudaSuccess; }

LYNX_EXPORT int64_t lynx_fp8_workspace_bytes(const LynxFp8Linear* call) {
  return int64_t(lynx::fp8_workspace_bytes(params_of(*call)));
}

// Number of tile configurations of an operand's GEMM by the instructions `set`; 0 where the current device
// does not run them, or the library lacks them.
LYNX_EXPORT int lynx_fp8_tile_count(int fp16, int operand, int set) {
  if (set == 0) return lynx::fp8_tactics(dtype_of(fp16), lynx::Fp8Operand(operand));
  const auto chosen = lynx::Fp8Set(set - 1);
  if (lynx::check_fp8_set(chosen, dtype_of(fp16)) != cudaSuccess) return 0;
  return lynx::fp8_tactics(chosen, lynx::Fp8Operand(operand));
}

// The whole op: checks, rounding pass, GEMM.
LYNX_EXPORT int lynx_fp8_linear(const LynxFp8Linear* call, cudaStream_t stream) {
  return lynx::launch_fp8_linear(params_of(*call), call->tile, stream);
}

// The rounding pass alone.
LYNX_EXPORT int lynx_fp8_round(const LynxFp8Linear* call, cudaStream_t stream) {
  const lynx::Fp8LinearParams params = params_of(*call);
  return lynx::launch_fp8_round(params, lynx::rounded_operand(params), stream);
}

// The GEMM alone, on what a rounding pass left in the workspace.
LYNX_EXPORT int lynx_fp8_gemm(const LynxFp8Linear* call, cudaStream_t stream) {
  const lynx::Fp8LinearParams params = params_of(*call);
  return lynx::launch_rounded_gemm(params, lynx::rounded_operand(params), call->tile, false, stream);
}

// Bytes of workspace of the GEMM alone, for lynx_fp8_product.
LYNX_EXPORT int64_t lynx_fp8_product_bytes(const LynxFp8Linear* call) {
  return int64_t(lynx::rounded_gemm_bytes(params_of(*call)));
}

// The GEMM alone, on what somebody else rounded: values e4m3 [M, K'] and scale float [M]; x is not read. Not
// for 2:4 activations, whose metadata only our pass writes.
LYNX_EXPORT int lynx_fp8_product(const LynxFp8Linear* call, void* values, float* scale, cudaStream_t stream) {
  const lynx::Fp8LinearParams params = params_of(*call);
  if (params.operand == lynx::Fp8Operand::kSparseActivation) return cudaErrorInvalidValue;
  lynx::RoundedOperand operand{};
  operand.values = static_cast<uint8_t*>(values), operand.scale = scale;
  operand.gemm = params.workspace, operand.gemm_bytes = lynx::rounded_gemm_bytes(params);
  return lynx::launch_rounded_gemm(params, operand, call->tile, false, stream);
}
