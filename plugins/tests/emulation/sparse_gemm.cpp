// SPDX-License-Identifier: Apache-2.0
// In place of CUTLASS: multiplies what the pruning kernels left, read as the tensor cores read it, in
// float64.
#include "sparse_gemm.h"

#include "emulation.h"
#include "kernels/sparse24.h"
#include "kernels/sparse_gemm.h"
#include "tests/reference.h"

namespace emulation {
lynx::Kernels kernels = lynx::Kernels::kSm80;
}

namespace lynx {
namespace {

// One row of the decompressed operand [K'], zeros where nothing was kept.
std::vector<double> decompress(const SparseLinearParams& params, const CompressedOperand& a, int64_t m,
                               const reference::Rounding& value) {
  const int64_t rows = padded_rows(params.rows), width = padded_width(params.channels, params.rank);
  const auto* values = static_cast<const uint16_t*>(a.values) + m * width / 2;
  const auto* metadata = reinterpret_cast<const uint16_t*>(a.metadata);
  std::vector<double> row(size_t(width), 0.0);
  for (int64_t group = 0; group < width / 4; ++group) {
    const int64_t at = a.kernels == Kernels::kSm90 ? reference::sm90_index(m, group / 4, rows, kAtomWidthSm90)
                                                   : reference::sm80_index(m, group / 4, rows);
    const int nibble = metadata[at] >> (4 * (group % 4)) & 15;
    row[size_t(4 * group + (nibble & 3))] = value[values[2 * group]];
    row[size_t(4 * group + (nibble >> 2))] = value[values[2 * group + 1]];
  }
  return row;
}

cudaError_t launch_gemm(const SparseLinearParams& params, const CompressedOperand& a, int, cudaStream_t) {
  const reference::Rounding& value = params.dtype == DType::kBf16 ? reference::bf16() : reference::fp16();
  const auto* weight = static_cast<const uint16_t*>(params.weight);
  const auto* bias = static_cast<const uint16_t*>(params.bias);
  const int64_t width = padded_width(params.channels, params.rank);
  for (int64_t m = 0; m < params.rows; ++m) {
    const std::vector<double> row = decompress(params, a, m, value);
    for (int64_t n = 0; n < params.out_channels; ++n) {
      double sum = 0.0;
      for (int64_t k = 0; k < width; ++k) {
        sum += row[size_t(k)] * value[weight[n * width + k]];
      }
      static_cast<uint16_t*>(params.y)[m * params.out_channels + n] =
          value.nearest(float(double(a.scale[m]) * sum + value[bias[n]]));
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t choose_kernels(Kernels* kernels) {
  *kernels = emulation::kernels;
  return cudaSuccess;
}

int tile_count(Kernels) { return 1; }

SparseGemmLaunch* tile_launch(Kernels, DType, int) { return launch_gemm; }

cudaError_t launch_sparse_gemm(const SparseLinearParams& params, const CompressedOperand& a,
                               cudaStream_t stream) {
  return launch_gemm(params, a, 0, stream);
}

}  // namespace lynx

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// For tests/plugins/test_emulation.py, which chooses the kernels whose layout is written.
extern "C" __attribute__((visibility("default"))) void lynx_emulate(int sm90, int reverse) {
  emulation::kernels = sm90 ? lynx::Kernels::kSm90 : lynx::Kernels::kSm80;
  emulation::schedule = reverse ? emulation::Schedule::kReverse : emulation::Schedule::kForward;
}

extern "C" __attribute__((visibility("default"))) const char* lynx_emulation_error() {
  return emulation::error.c_str();
}
