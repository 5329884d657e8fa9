// SPDX-License-Identifier: Apache-2.0
#include "fp8_linear.h"

#include <algorithm>

#include "fits.h"
#include "fp8.h"
#include "fp8_gemm.h"

namespace lynx {
namespace {

constexpr int64_t kSegment = 256;  // bytes; every part of the workspace starts at a multiple of it

struct Segments {
  int64_t values, metadata, scale, gemm, total;  // offsets in bytes, and the end
};

// The instructions of a call.
cudaError_t choose_set(const Fp8LinearParams& p, Fp8Set* set) {
  if (!p.set) return choose_fp8_set(p.dtype, set);
  *set = *p.set;
  return check_fp8_set(*set, p.dtype);
}

Segments segments(const Fp8LinearParams& p) {
  const bool pruned = p.operand == Fp8Operand::kSparseActivation;
  const int64_t padded = padded_rows(p.rows), width = fp8_width(p.channels);
  Segments at;
  at.values = 0;
  at.metadata = round_up(pruned ? padded * width / 2 : p.rows * width, kSegment);
  at.scale = at.metadata + (pruned ? round_up(Fp8Metadata::bytes(padded, width), kSegment) : 0);
  at.gemm = at.scale + round_up(padded * int64_t(sizeof(float)), kSegment);
  at.total = at.gemm + round_up(int64_t(rounded_gemm_bytes(p)), kSegment);
  return at;
}

bool sizes_fit(const Fp8LinearParams& p) {
  return p.rows > 0 && padded_rows(p.rows) <= INT32_MAX && p.channels > 0 && p.channels % kBlock == 0 &&
         p.channels <= kMaxFp8Channels && p.out_channels > 0 && p.out_channels % 8 == 0;
}

cudaError_t check(const Fp8LinearParams& p) {
  const bool present = p.x && p.weight && p.weight_scale && p.bias && p.y && p.workspace &&
                       (p.operand != Fp8Operand::kSparseWeight || p.metadata);
  if (!sizes_fit(p) || !producer_fits(p) || !epilogue_fits(p) || !present) return cudaErrorInvalidValue;
  const void* const pointers[] = {p.x,     p.weight, p.metadata, p.weight_scale, p.bias, p.gain,
                                  p.shift, p.gate,   p.y,        p.workspace};
  for (const void* pointer : pointers) {
    if ((reinterpret_cast<uintptr_t>(pointer) & 15u) != 0) return cudaErrorMisalignedAddress;
  }
  return cudaSuccess;
}

}  // namespace

size_t rounded_gemm_bytes(const Fp8LinearParams& params) {
  Fp8Set chosen;
  const bool known = choose_set(params, &chosen) == cudaSuccess;
  int64_t most = 0;
  for (const Fp8SetTraits& each : kFp8Sets) {
    if (known && each.set != chosen) continue;
    most =
        std::max(most, fp8_gemm_workspace_bytes(each.set, params.operand, params.rows, params.out_channels));
  }
  return size_t(most);
}

size_t fp8_workspace_bytes(const Fp8LinearParams& params) { return size_t(segments(params).total); }

RoundedOperand rounded_operand(const Fp8LinearParams& params) {
  const Segments at = segments(params);
  char* const base = static_cast<char*>(params.workspace);
  RoundedOperand operand;
  operand.values = reinterpret_cast<uint8_t*>(base + at.values);
  operand.metadata = reinterpret_cast<uint16_t*>(base + at.metadata);
  operand.scale = reinterpret_cast<float*>(base + at.scale);
  operand.gemm = base + at.gemm;
  operand.gemm_bytes = size_t(at.total - at.gemm);
  return operand;
}

#if !defined(LYNX_FP8)  // a library without FP8 GEMMs has no rounding pass
cudaError_t launch_fp8_round(const Fp8LinearParams&, const RoundedOperand&, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif

cudaError_t launch_fp8_linear(const Fp8LinearParams& params, int tile, cudaStream_t stream) {
  if (const cudaError_t error = check(params); error != cudaSuccess) return error;
  Fp8Set set;
  if (const cudaError_t error = choose_set(params, &set); error != cudaSuccess) return error;
  const RoundedOperand x = rounded_operand(params);
  if (const cudaError_t error = launch_fp8_round(params, x, stream); error != cudaSuccess) return error;
  return launch_rounded_gemm(params, x, tile, true, stream);
}

cudaError_t launch_rounded_gemm(const Fp8LinearParams& params, const RoundedOperand& x, int tile,
                                bool follows_pass, cudaStream_t stream) {
  Fp8Set set;
  if (const cudaError_t error = choose_set(params, &set); error != cudaSuccess) return error;
  Fp8GemmCall call;
  call.tokens = int(params.rows), call.channels = params.out_channels;
  call.width = int(fp8_width(params.channels));
  call.x = x.values, call.weight = params.weight;
  call.metadata = params.operand == Fp8Operand::kSparseActivation
                      ? reinterpret_cast<const uint32_t*>(x.metadata)
                      : params.metadata;
  call.x_scale = x.scale, call.weight_scale = params.weight_scale, call.bias = params.bias;
  call.activation = params.activation, call.gated = params.gated;
  call.activation_from =
      params.activation == Activation::kNone ? params.out_channels : params.activation_from;
  call.y = params.y;
  call.workspace = x.gemm, call.workspace_bytes = x.gemm_bytes;
  call.follows_pass = follows_pass;
  return launch_fp8_gemm(set, params.dtype, params.operand, call, tile, stream);
}

}  // namespace lynx
