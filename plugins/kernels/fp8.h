// SPDX-License-Identifier: Apache-2.0
// FP8 of activations and weights: what a token is rounded to, and where the metadata of 2:4 operands lie.
//
// The C++ statement of lynx_compile/ops/fp8.py. Compiles for host and device, as sparse24.h does.
#pragma once

#include "sparse24.h"

#if defined(__CUDACC__)
#include "fp8_convert.h"
#endif

namespace lynx {

constexpr int kFp8Step =
    128;  // K', channels with their padding, comes in whole steps: a metadata atom's width
constexpr float kFp8Max = 448.0f;  // the largest e4m3
constexpr float kFp8Least =
    0x1p-100f;  // a token of smaller magnitudes, zeros too, is rounded as if it had this one

LYNX_HOST_DEVICE int64_t fp8_width(int64_t channels) { return round_up(channels, kFp8Step); }

// ---- e4m3

// Round to nearest even; beyond 448 is 448, every NaN 0x7f.
LYNX_HOST_DEVICE uint8_t e4m3_of(float value) {
#if defined(__CUDA_ARCH__)
  return uint8_t(e4m3_pair(value, 0.0f));
#else
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const auto sign = uint8_t(bits >> 24 & 0x80u);
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude >= 0x43e00000u) return uint8_t(sign | 0x7e);  // 448 and above
  if (magnitude < 0x3c800000u) {                              // below 2^-6: multiples of 2^-9
    return uint8_t(sign | uint8_t(std::nearbyint(bits_float(magnitude) * 512.0f)));
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return uint8_t(sign | uint8_t((rounded >> 20) - (120u << 3)));
#endif
}

// ---- The scale of a token

struct Fp8Scale {
  float scale;    // s_x: a value is x_q s_x
  float inverse;  // x_q = e4m3(x inverse)
};

// Of a token's largest magnitude. A token with an infinity or a NaN is NaN throughout.
LYNX_HOST_DEVICE Fp8Scale fp8_scale(float largest) {
  // fault: finite
  if (!(largest < bits_float(0x7f800000u))) return {bits_float(0x7fc00000u), bits_float(0x7fc00000u)};
  const float bounded = largest > kFp8Least ? largest : kFp8Least;  // fault: least scale
#if defined(__CUDA_ARCH__)
  return {__fdiv_rn(bounded, kFp8Max), __fdiv_rn(kFp8Max, bounded)};
#else
  return {bounded / kFp8Max, kFp8Max / bounded};
#endif
}

// ---- Metadata of a 2:4 operand: of each 128 channels, row by row the 16 bytes of its nibbles

struct Fp8Metadata {
  // Index of the 16 bits of row m and 16 channels; `rows` is the padded number of rows.
  static LYNX_HOST_DEVICE int64_t halfword(int64_t m, int64_t block, int64_t rows) {
    constexpr int kBlocks = kFp8Step / kBlock;
    return (block / kBlocks * rows + m) * kBlocks + block % kBlocks;  // fault: place of metadata
  }
  static LYNX_HOST_DEVICE int64_t bytes(int64_t rows, int64_t width) { return rows * (width / kBlock) * 2; }
};

}  // namespace lynx
