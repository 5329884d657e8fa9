// SPDX-License-Identifier: Apache-2.0
// In place of CUTLASS's GEMMs: multiplies a compressed operand, read as the tensor cores read it, in float64.
// Writes all of its workspace, as stream-K may.
#include <cstring>
#include <functional>

#include "kernels/sparse_gemm.h"

#include "tests/reference.h"

namespace lynx {
namespace {

using reference::Index;

// One row of the decompressed operand [width], zeros where nothing was kept.
std::vector<double> decompress(const SparseGemmCall& call, int64_t m, const Index& index,
                               const reference::Rounding& value) {
  const auto* values = static_cast<const uint16_t*>(call.values) + int64_t(m) * call.width / 2;
  const auto* metadata = reinterpret_cast<const uint16_t*>(call.metadata);
  std::vector<double> row(size_t(call.width), 0.0);
  for (int64_t group = 0; group < call.width / 4; ++group) {
    const int nibble = metadata[index(m, group / 4, padded_rows(call.m))] >> (4 * (group % 4)) & 15;
    row[size_t(4 * group + (nibble & 3))] = value[values[2 * group]];
    row[size_t(4 * group + (nibble >> 2))] = value[values[2 * group + 1]];
  }
  return row;
}

// D [m, n] of the call, scaled and with its bias.
std::vector<double> product(const SparseGemmCall& call, Operand operand, const Index& index,
                            const reference::Rounding& value) {
  const auto* dense = static_cast<const uint16_t*>(call.dense);
  const auto* bias = static_cast<const uint16_t*>(call.bias);
  const bool by_token = operand == Operand::kActivation;
  std::vector<double> d;
  for (int64_t m = 0; m < call.m; ++m) {
    const std::vector<double> row = decompress(call, m, index, value);
    for (int64_t n = 0; n < call.n; ++n) {
      double sum = 0.0;
      for (int64_t k = 0; k < call.width; ++k) sum += row[size_t(k)] * value[dense[n * call.width + k]];
      d.push_back((by_token ? sum * double(call.scale[m]) : sum) + value[bias[by_token ? n : m]]);
    }
  }
  return d;
}

cudaError_t multiply(const SparseGemmCall& call, Operand operand, const Index& index,
                     const reference::Rounding& value) {
  if (call.workspace_bytes > 0) std::memset(call.workspace, 0xff, call.workspace_bytes);
  const std::vector<double> d = product(call, operand, index, value);
  const bool by_token = operand == Operand::kActivation;
  const int64_t tokens = by_token ? call.m : call.n, channels = by_token ? call.n : call.m;
  auto* y = static_cast<uint16_t*>(call.y);
  for (int64_t token = 0; token < tokens; ++token) {
    std::vector<reference::Near> row;
    for (int64_t n = 0; n < channels; ++n) {
      row.push_back({d[size_t(by_token ? token * call.n + n : n * call.n + token)], 0.0});
    }
    for (const reference::Near& each :
         reference::finish(row, {int(call.activation), call.activation_from, call.gated})) {
      *y++ = value.nearest(float(each.value));
    }
  }
  return cudaSuccess;
}

template <class Element>
const reference::Rounding& rounding() {
  return std::is_same_v<Element, Bf16> ? reference::bf16() : reference::fp16();
}

}  // namespace

// An atom of wgmma.sp's metadata is as wide as the tile, up to 128 channels.
template <InstructionSet kSet, class Element, Operand kOperand>
cudaError_t launch_gemm(const SparseGemmCall& call, int tile, int, cudaStream_t) {
  const auto index = [tile](int64_t m, int64_t block, int64_t rows) {
    return kSet == InstructionSet::kMmaSp
               ? reference::sm80_index(m, block, rows)
               : reference::sm90_index(m, block, rows, std::min(kTilesSm90[tile].k, 128));
  };
  return multiply(call, kOperand, index, rounding<Element>());
}

LYNX_INSTANTIATE_GEMM(InstructionSet::kMmaSp, Bf16, Operand::kActivation);
LYNX_INSTANTIATE_GEMM(InstructionSet::kMmaSp, Bf16, Operand::kWeight);
LYNX_INSTANTIATE_GEMM(InstructionSet::kMmaSp, Fp16, Operand::kActivation);
LYNX_INSTANTIATE_GEMM(InstructionSet::kMmaSp, Fp16, Operand::kWeight);
LYNX_INSTANTIATE_GEMM(InstructionSet::kWgmmaSp, Bf16, Operand::kActivation);
LYNX_INSTANTIATE_GEMM(InstructionSet::kWgmmaSp, Bf16, Operand::kWeight);
LYNX_INSTANTIATE_GEMM(InstructionSet::kWgmmaSp, Fp16, Operand::kActivation);
LYNX_INSTANTIATE_GEMM(InstructionSet::kWgmmaSp, Fp16, Operand::kWeight);

}  // namespace lynx
