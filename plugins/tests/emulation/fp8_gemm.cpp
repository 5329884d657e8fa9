// SPDX-License-Identifier: Apache-2.0
// In place of CUTLASS's FP8 GEMMs for sm_90a: multiplies the operands, read as the tensor cores read them, in
// float64.
#include "kernels/fp8_gemm.h"

#include "tests/reference.h"

namespace lynx {
namespace {

// One row of an operand [rows, width]; of a 2:4 one zeros where nothing was kept. Of each 128 channels the
// metadata has 16 bytes a row, a nibble a group.
std::vector<double> row_of(const void* operand, const uint32_t* metadata, int64_t row, int64_t rows,
                           int64_t width) {
  const auto* values = static_cast<const uint8_t*>(operand) + row * (metadata == nullptr ? width : width / 2);
  std::vector<double> out(static_cast<size_t>(width), 0.0);
  for (int64_t k = 0; metadata == nullptr && k < width; ++k)
    out[size_t(k)] = reference::e4m3_value(values[k]);
  if (metadata == nullptr) return out;
  const auto* bytes = reinterpret_cast<const uint8_t*>(metadata);
  for (int64_t group = 0; group < width / 4; ++group) {
    const int64_t byte = (group / 32 * padded_rows(rows) + row) * 16 + group % 32 / 2;
    const int nibble = bytes[byte] >> (4 * (group % 2)) & 15;
    out[size_t(4 * group + (nibble & 3))] = reference::e4m3_value(values[2 * group]);
    out[size_t(4 * group + (nibble >> 2))] = reference::e4m3_value(values[2 * group + 1]);
  }
  return out;
}

cudaError_t multiply(const Fp8GemmCall& call, Fp8Operand operand, const reference::Rounding& value) {
  const auto* x_metadata = operand == Fp8Operand::kSparseActivation ? call.metadata : nullptr;
  const auto* weight_metadata = operand == Fp8Operand::kSparseWeight ? call.metadata : nullptr;
  const auto* bias = static_cast<const uint16_t*>(call.bias);
  auto* y = static_cast<uint16_t*>(call.y);
  for (int64_t token = 0; token < call.tokens; ++token) {
    std::vector<reference::Near> row;
    const std::vector<double> x = row_of(call.x, x_metadata, token, call.tokens, call.width);
    for (int64_t channel = 0; channel < call.channels; ++channel) {
      const auto weight = row_of(call.weight, weight_metadata, channel, call.channels, call.width);
      double sum = 0.0;
      for (size_t k = 0; k < x.size(); ++k) sum += x[k] * weight[k];
      sum = sum * double(call.x_scale[token]) * double(call.weight_scale[channel]) + value[bias[channel]];
      row.push_back({sum, 0.0});
    }
    for (const reference::Near& each :
         reference::finish(row, {int(call.activation), call.activation_from, call.gated})) {
      *y++ = value.nearest(float(each.value));
    }
  }
  return cudaSuccess;
}

}  // namespace

template <Fp8Set kSet, class Element, Fp8Operand kOperand, int kIndex>
cudaError_t launch_fp8_gemm(const Fp8GemmCall& call, int, cudaStream_t) {
  return multiply(call, kOperand, std::is_same_v<Element, Bf16> ? reference::bf16() : reference::fp16());
}

#define LYNX_INSTANTIATE(element, operand, index)                                                        \
  template cudaError_t launch_fp8_gemm<Fp8Set::kWgmma, element, operand, index>(const Fp8GemmCall&, int, \
                                                                                cudaStream_t);
#define LYNX_INSTANTIATE_OPERANDS(element, index)             \
  LYNX_INSTANTIATE(element, Fp8Operand::kSparseWeight, index) \
  LYNX_INSTANTIATE(element, Fp8Operand::kDense, index)        \
  LYNX_INSTANTIATE(element, Fp8Operand::kSparseActivation, index)
#define LYNX_INSTANTIATE_ALL(element)   \
  LYNX_INSTANTIATE_OPERANDS(element, 0) \
  LYNX_INSTANTIATE_OPERANDS(element, 1) \
  LYNX_INSTANTIATE_OPERANDS(element, 2) \
  LYNX_INSTANTIATE_OPERANDS(element, 3)
LYNX_INSTANTIATE_ALL(Bf16)
LYNX_INSTANTIATE_ALL(Fp16)

}  // namespace lynx
