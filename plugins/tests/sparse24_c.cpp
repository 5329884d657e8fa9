// SPDX-License-Identifier: Apache-2.0
// sparse24.h behind C functions, so that tests/plugins can hold it against lynx_compile/ops/sparse_linear.py
// with ctypes.
#include <cstdint>

#include "kernels/sparse24.h"

namespace {

template <class Element>
void prune(const uint16_t* x, int64_t rows, int64_t channels, uint16_t* values, uint16_t* metadata,
           float* scale) {
  for (int64_t m = 0; m < rows; ++m) {
    lynx::RowNorm norm;
    for (int64_t k = 0; k < channels; k += lynx::kBlock) {
      uint32_t words[8];
      std::memcpy(words, x + m * channels + k, sizeof words);
      const lynx::CompressedBlock block = lynx::compress_block<Element>(words, &norm);
      std::memcpy(values + (m * channels + k) / 2, block.values, sizeof block.values);
      metadata[(m * channels + k) / lynx::kBlock] = uint16_t(block.metadata);
    }
    scale[m] = lynx::norm_scale(norm);
  }
}

}  // namespace

extern "C" {

// x: [rows, channels] 16-bit patterns; values: [rows, channels / 2]; metadata: [rows, channels / 16]; scale:
// [rows]. Returns 0, or 1 for channels that are no whole blocks.
int lynx_prune(int is_bf16, const uint16_t* x, int64_t rows, int64_t channels, uint16_t* values,
               uint16_t* metadata, float* scale) {
  if (channels % lynx::kBlock != 0) return 1;
  (is_bf16 ? prune<lynx::Bf16> : prune<lynx::Fp16>)(x, rows, channels, values, metadata, scale);
  return 0;
}

// scale[i] of the squared norms all[i] and kept[i].
void lynx_norm_scale(const float* all, const float* kept, int64_t count, float* scale) {
  for (int64_t i = 0; i < count; ++i) scale[i] = lynx::norm_scale({all[i], kept[i]});
}

// words: [channels / 16 * rows / 2], filled from metadata [rows, channels / 16] in the layout 80 (mma.sp) or
// 90 (wgmma.sp, atoms of 64 channels); rows are padded. Returns 0, or 1 for another layout.
int lynx_lay_out(int layout, const uint16_t* metadata, int64_t rows, int64_t channels, uint32_t* words) {
  if (layout != 80 && layout != 90) return 1;
  const int64_t blocks = channels / lynx::kBlock;
  for (int64_t m = 0; m < rows; ++m) {
    if (m % 16 >= 8) continue;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t word = layout == 80 ? lynx::Sm80Metadata::word(m, block, rows)
                                        : lynx::Sm90Metadata<64>::word(m, block, rows);
      words[word] = metadata[m * blocks + block] | uint32_t(metadata[(m + 8) * blocks + block]) << 16;
    }
  }
  return 0;
}

int64_t lynx_padded_width(int64_t channels, int64_t rank) { return lynx::padded_width(channels, rank); }

}  // extern "C"
