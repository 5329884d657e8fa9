// SPDX-License-Identifier: Apache-2.0
// Checks sparse24.h against CUTLASS's own host code, which defines what its kernels read: reorder_meta and
// uncompress for sm_80, Sm90GemmSparseConfig for sm_90. Needs the CUTLASS and CUDA headers, no GPU, no nvcc.
#include <cutlass/cutlass.h>
#include <cutlass/util/host_reorder.h>
#include <cutlass/util/host_uncompress.h>

#include <cstdio>
#include <cute/atom/mma_traits_sm120_sparse.hpp>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/builders/sm90_common.inl>
#include <cutlass/gemm/collective/builders/sm90_sparse_config.inl>
#include <random>
#include <vector>

#include "kernels/fp8.h"
#include "kernels/sparse24.h"

namespace {

int passed = 0, failed = 0;

void report(bool ok, const char* name, int64_t rows, int64_t width) {
  std::printf("%s %s, %lld x %lld\n", ok ? "PASS" : "FAIL", name, static_cast<long long>(rows),
              static_cast<long long>(width));
  ++(ok ? passed : failed);
}

// A dense operand pruned by sparse24.h.
struct Pruned {
  std::vector<uint16_t> dense;     // [rows, width], before pruning
  std::vector<uint16_t> values;    // [rows, width / 2]
  std::vector<uint16_t> metadata;  // [rows, width / 16], logical
  std::vector<uint32_t> words;     // Sm80Metadata
};

Pruned prune(int64_t rows, int64_t width) {
  std::mt19937 random(int(rows * width));
  const int64_t blocks = width / lynx::kBlock;
  Pruned out{std::vector<uint16_t>(rows * width), std::vector<uint16_t>(rows * width / 2),
             std::vector<uint16_t>(rows * blocks), std::vector<uint32_t>(rows * blocks / 2)};
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t b = 0; b < blocks; ++b) {
      uint32_t z[8];
      for (uint32_t& pair : z) pair = random() | 0x00010001u;  // no zeros: a kept one would look dropped
      const lynx::CompressedBlock block = lynx::compress_block<lynx::Fp16>(z, nullptr);
      std::memcpy(&out.values[m * width / 2 + b * 8], block.values, sizeof block.values);
      out.metadata[m * blocks + b] = uint16_t(block.metadata);
      std::memcpy(&out.dense[m * width + b * 16], z, sizeof z);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    if (m % 16 >= 8) continue;
    for (int64_t b = 0; b < blocks; ++b) {
      out.words[lynx::Sm80Metadata::word(m, b, rows)] =
          out.metadata[m * blocks + b] | uint32_t(out.metadata[(m + 8) * blocks + b]) << 16;
    }
  }
  return out;
}

// The kept values stand at their places and the metadata say the same as CUTLASS's decoder reads.
void check_uncompress(const Pruned& pruned, int64_t rows, int64_t width) {
  std::vector<uint16_t> found(rows * width);
  std::vector<uint16_t> values = pruned.values, metadata = pruned.metadata;
  using Row = cutlass::layout::RowMajor;
  cutlass::uncompress(cutlass::TensorRef<uint16_t, Row>(found.data(), Row(int(width))),
                      cutlass::TensorRef<uint16_t, Row>(values.data(), Row(int(width / 2))),
                      cutlass::TensorRef<uint16_t, Row>(metadata.data(), Row(int(width / 16))), int(rows),
                      int(width));
  bool ok = true;
  for (size_t group = 0; group < found.size(); group += 4) {
    int kept = 0, least_kept = 0xffff, most_dropped = 0;
    for (size_t i = group; i < group + 4; ++i) {
      const int magnitude = pruned.dense[i] & 0x7fff;
      if (found[i] == 0) {
        most_dropped = std::max(most_dropped, magnitude);
      } else {
        ok &= found[i] == pruned.dense[i];
        least_kept = std::min(least_kept, magnitude);
        ++kept;
      }
    }
    ok &= kept == 2 && least_kept >= most_dropped;
  }
  report(ok, "fp16 pruned, decoded by cutlass::uncompress", rows, width);
}

void check_sm80(const Pruned& pruned, int64_t rows, int64_t width) {
  using Row = cutlass::layout::RowMajor;
  using Interleaved = cutlass::layout::ColumnMajorInterleaved<2>;
  const int blocks = int(width / 16);
  std::vector<uint16_t> logical = pruned.metadata, reordered(logical.size());
  cutlass::reorder_meta(
      cutlass::TensorRef<uint16_t, Interleaved>(reordered.data(), Interleaved::packed({int(rows), blocks})),
      cutlass::TensorRef<uint16_t, Row>(logical.data(), Row(blocks)), {int(rows), int(width), blocks});
  const bool ok = std::memcmp(reordered.data(), pruned.words.data(), reordered.size() * 2) == 0;
  report(ok, "sm_80 metadata, byte for byte against reorder_meta", rows, width);
}

template <int kAtom>
void check_sm90(int64_t rows, int64_t width) {
  using Config =
      cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, cutlass::bfloat16_t>, cute::GMMA::Major::K,
                                    cute::sparse_elem<8, uint8_t>, cute::Int<kAtom>>;
  const auto layout = Config::fill_layoutE(cute::make_shape(int(rows), 8, int(width), 1));
  bool ok = int64_t(cute::cosize(layout)) / 8 == lynx::Sm90Metadata<kAtom>::bytes(rows, width);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < width; k += 8) {
      const int64_t byte = int64_t(layout(int(m), int(k), 0)) / 8;  // the layout counts elements, 8 a byte
      const int64_t word = lynx::Sm90Metadata<kAtom>::word(m % 16 < 8 ? m : m - 8, k / 16, rows);
      ok &= byte == 4 * word + (m % 16 < 8 ? 0 : 2) + k % 16 / 8;
    }
  }
  report(ok, kAtom == 64 ? "sm_90 metadata, atoms of 64" : "sm_90 metadata, atoms of 128", rows, width);
}

// The metadata of e4m3: 16 bits of a row and 16 channels where Fp8Metadata says.
void check_fp8(int64_t rows, int64_t width) {
  using Config =
      cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, cutlass::float_e4m3_t>, cute::GMMA::Major::K,
                                    cute::sparse_elem<8, uint8_t>, cute::Int<lynx::kFp8Step>>;
  const auto layout = Config::fill_layoutE(cute::make_shape(int(rows), 8, int(width), 1));
  bool ok = Config::TensorEAtomK::value == lynx::kFp8Step &&
            int64_t(cute::cosize(layout)) / 8 == lynx::Fp8Metadata::bytes(rows, width);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < width; k += 8) {
      const int64_t byte = int64_t(layout(int(m), int(k), 0)) / 8;
      ok &= byte == 2 * lynx::Fp8Metadata::halfword(m, k / 16, rows) + k % 16 / 8;
    }
  }
  report(ok, "sm_90 metadata of e4m3", rows, width);
}

// The fragments of mma.sp.m16n8k64 of 8-bit types are those that fp8_mma.h describes: a lane's word of
// metadata is that of 32 neighbouring channels of a row, as the file has it.
void check_fragments() {
  using Traits = cute::MMA_Traits<
      cute::SM120::SPARSE::SM120_SPARSE_16x8x64_TN<cutlass::float_e4m3_t, cutlass::float_e4m3_t, float>>;
  constexpr int kRows = 16, kColumns = 8;
  bool metadata = true, a = true, b = true, d = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 32; ++i) {  // channels
      metadata &= int(typename Traits::ELayout{}(lane, i)) == g + 8 * (t % 2) + kRows * (32 * (t / 2) + i);
      const int kept = i / 2, byte = 4 * t + kept % 4 + kept / 8 * 16, row = g + 8 * (kept / 4 % 2);
      a &= int(typename Traits::ALayout{}(lane, i)) == row + kRows * (2 * byte + i % 2);
    }
    for (int i = 0; i < 16; ++i)
      b &= int(typename Traits::BLayout{}(lane, i)) == g + kColumns * (i / 4 * 16 + 4 * t + i % 4);
    for (int i = 0; i < 4; ++i)
      d &= int(typename Traits::CLayout{}(lane, i)) == g + 8 * (i / 2) + kRows * (2 * t + i % 2);
  }
  report(metadata, "mma.sp of e4m3, metadata of a lane", kRows, 64);
  report(a && b && d, "mma.sp of e4m3, fragments of A, B and D", kRows, 64);
}

}  // namespace

int main() {
  check_fragments();
  for (const int64_t rows : {64, 192, 320}) {
    for (const int64_t width : {64, 192, 448}) {
      const Pruned pruned = prune(rows, width);
      check_uncompress(pruned, rows, width);
      check_sm80(pruned, rows, width);
      check_sm90<64>(rows, width);
      check_sm90<128>(rows, width);
    }
    for (const int64_t width : {128, 384}) check_fp8(rows, width);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
