// SPDX-License-Identifier: Apache-2.0
// 2:4 sparsity of activations: which channels are kept, how they are compressed, where their metadata lies.
//
// The C++ statement of lynx_compile/ops/sparse_linear.py. Everything here compiles for host and device and
// needs no CUDA header on the host, so that tests on any machine check what the kernels run.
//
// Terms: a *group* is 4 channels, of which 2 are kept; a *block* is 16 channels: 8 kept values and 16 bits of
// metadata, one nibble `lo | hi << 2` per group (lo < hi are the kept positions).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LYNX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <cmath>
#define LYNX_HOST_DEVICE inline
#endif

namespace lynx {

constexpr int kGroup = 4;
constexpr int kKept = 2;
constexpr int kBlock = 16;                 // channels that share one 16-bit metadata word
constexpr int kKeptPerBlock = kBlock / 2;  // values
constexpr int kRankMultiple = 16;          // so that the K-extension is made of whole blocks
constexpr int kMaxRank = 128;
constexpr int kWidthMultiple = 64;  // K step of the GEMM
constexpr int kRowMultiple = 64;    // rows the metadata layouts come in (sm_80: 32, sm_90: 64)
constexpr float kNormEpsilon = 1e-8f;
constexpr uint16_t kEmptyMetadata = 0x4444;          // keeps positions 0 and 1 of every group
constexpr uint32_t kEmptyMetadataPair = 0x44444444;  // the same for rows m and m + 8  // fault: padding

// ---- Sizes and padding
// --------------------------------------------------------------------------------------

LYNX_HOST_DEVICE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Columns of the op's weight input, K': channels and the K-extension (2 per rank) in whole GEMM steps.
LYNX_HOST_DEVICE int64_t padded_width(int64_t channels, int64_t rank) {
  return round_up(channels + 2 * rank, kWidthMultiple);
}

LYNX_HOST_DEVICE int64_t padded_rows(int64_t rows) { return round_up(rows, kRowMultiple); }

// ---- 16-bit floats as bits
// ----------------------------------------------------------------------------------

LYNX_HOST_DEVICE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

LYNX_HOST_DEVICE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

constexpr uint16_t kNan16 = 0x7fff;  // what CUDA's conversions make of any NaN, in either format

struct Bf16 {
  static LYNX_HOST_DEVICE float to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

  // Round to nearest even; every NaN becomes kNan16.
  static LYNX_HOST_DEVICE uint16_t from_float(float value) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return kNan16;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  }
};

struct Fp16 {
  static LYNX_HOST_DEVICE float to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1fu;
    const uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 0x1fu) return bits_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent != 0) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // subnormal: mantissa * 2^-24
    return bits_float(sign | float_bits(magnitude));
#endif
  }

  // Round to nearest even; every NaN becomes kNan16, overflow becomes infinity.
  static LYNX_HOST_DEVICE uint16_t from_float(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return kNan16;
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above
    if (magnitude < 0x38800000u) {                                  // below 2^-14: multiples of 2^-24
      const float units = bits_float(magnitude) * 16777216.0f;      // exact; nearbyint rounds ties to even
      return uint16_t(sign | uint16_t(std::nearbyint(units)));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return uint16_t(sign | uint16_t((rounded >> 13) - (112u << 10)));
#endif
  }
};

// ---- Selection: 2 of 4
// --------------------------------------------------------------------------------------

// The kept positions of one group, lo < hi.
struct Kept {
  uint32_t lo, hi;
};

// Selection by |z|, on the bits of four 16-bit floats: two per word, lower channel in the lower half. The
// position in the low bits of the key makes the four keys distinct and lets the lower index win a tie.
LYNX_HOST_DEVICE Kept select_by_magnitude(uint32_t z01, uint32_t z23) {
  const uint32_t k0 = ((z01 & 0x7fffu) << 2) | 3u;
  const uint32_t k1 = ((z01 >> 14) & 0x1fffcu) | 2u;
  const uint32_t k2 = ((z23 & 0x7fffu) << 2) | 1u;
  const uint32_t k3 = (z23 >> 14) & 0x1fffcu;
  const uint32_t high01 = k0 > k1 ? k0 : k1, low01 = k0 > k1 ? k1 : k0;
  const uint32_t high23 = k2 > k3 ? k2 : k3, low23 = k2 > k3 ? k3 : k2;
  const uint32_t first = high01 > high23 ? high01 : high23;
  const uint32_t runner_up = high01 > high23 ? high23 : high01;
  const uint32_t best_low = low01 > low23 ? low01 : low23;
  // fault: second largest
  const uint32_t second = runner_up > best_low ? runner_up : best_low;
  const uint32_t i = 3u - (first & 3u), j = 3u - (second & 3u);
  return i < j ? Kept{i, j} : Kept{j, i};
}

LYNX_HOST_DEVICE uint32_t nibble_of(Kept kept) { return kept.lo | kept.hi << 2; }  // fault: nibble

// The two kept values of a group, in channel order, as one word.
LYNX_HOST_DEVICE uint32_t compress_group(uint32_t z01, uint32_t z23, Kept kept) {
#if defined(__CUDA_ARCH__)
  // fault: kept values
  return __byte_perm(z01, z23, 0x1010u + 0x0022u * kept.lo + 0x2200u * kept.hi);
#else
  const uint64_t group = uint64_t(z23) << 32 | z01;
  return uint32_t(group >> (16 * kept.lo) & 0xffffu) | uint32_t(group >> (16 * kept.hi) & 0xffffu) << 16;
#endif
}

// ---- One block of 16 channels
// -------------------------------------------------------------------------------

struct CompressedBlock {
  uint32_t values[kKeptPerBlock / 2];  // 8 kept values, two per word
  uint32_t metadata;                   // 16 bits: the nibble of group q at bit 4 q
};

// Adds the squares of a word's two values.
template <class Element>
LYNX_HOST_DEVICE float sum_of_squares(uint32_t pair, float sum) {
  const float low = Element::to_float(uint16_t(pair)), high = Element::to_float(uint16_t(pair >> 16));
  return sum + low * low + high * high;  // fault: squares
}

// Squared norms of a row, summed block by block.
struct RowNorm {
  float all = 0.0f, kept = 0.0f;
};

// Prunes one block. `z`: 16 values, two per word. `norm` grows by the block's squares when it is not null.
template <class Element>
LYNX_HOST_DEVICE CompressedBlock compress_block(const uint32_t (&z)[kBlock / 2], RowNorm* norm) {
  CompressedBlock out;
  out.metadata = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int q = 0; q < kBlock / kGroup; ++q) {
    const uint32_t z01 = z[2 * q], z23 = z[2 * q + 1];
    const Kept kept = select_by_magnitude(z01, z23);
    out.values[q] = compress_group(z01, z23, kept);
    out.metadata |= nibble_of(kept) << (4 * q);
    if (norm != nullptr) {
      norm->all = sum_of_squares<Element>(z23, sum_of_squares<Element>(z01, norm->all));
      norm->kept = sum_of_squares<Element>(out.values[q], norm->kept);
    }
  }
  return out;
}

// ---- Row scale
// ----------------------------------------------------------------------------------------------

// s = sqrt(|z|^2 / (|z~|^2 + epsilon)); 0 for an all-zero row.
LYNX_HOST_DEVICE float norm_scale(RowNorm norm) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(__fdiv_rn(norm.all, norm.kept + kNormEpsilon));
#else
  return std::sqrt(norm.all / (norm.kept + kNormEpsilon));
#endif
}

// U = T / s, rounded; 0 where s is 0 or NaN.
template <class Element>
LYNX_HOST_DEVICE uint16_t low_rank_value(float t, float scale) {
  return Element::from_float(scale > 0.0f ? t / scale : 0.0f);  // fault: U
}

// ---- Metadata layouts
// --------------------------------------------------------------------------------------- A layout says where
// the metadata of rows m (m % 16 < 8) and m + 8 lie: in both one 32-bit word per block, row m in the lower
// half. `rows` is the padded number of rows, `block` the index of 16 channels.

// mma.sp of sm_80 and later: ColumnMajorInterleaved<2> of 16-bit words, after CUTLASS's reorder_meta.
struct Sm80Metadata {
  static constexpr int kRows = 32;

  static LYNX_HOST_DEVICE int64_t bytes(int64_t rows, int64_t width) { return rows * (width / kBlock) * 2; }

  static LYNX_HOST_DEVICE int64_t word(int64_t m, int64_t block, int64_t rows) {
    // fault: word of mma.sp
    const int64_t in_tile = (m % 8) * 4 + ((m / 8) & 2) + (block & 1);
    return (block / 2) * rows + (m / kRows) * kRows + in_tile;
  }
};

// wgmma.sp of sm_90a: atoms of 64 rows by kAtomWidth = min(tile K, 128) channels (CUTLASS's sparse config).
template <int kAtomWidth>
struct Sm90Metadata {
  static_assert(kAtomWidth == 64 || kAtomWidth == 128, "an atom is 64 or 128 channels wide");
  static constexpr int kRows = 64;

  static LYNX_HOST_DEVICE int64_t bytes(int64_t rows, int64_t width) {
    return rows * (round_up(width, kAtomWidth) / kBlock) * 2;
  }

  static LYNX_HOST_DEVICE int64_t word(int64_t m, int64_t block, int64_t rows) {
    const int64_t m0 = m % 8, m2 = (m / 16) % 4;
    const int64_t k = block * kBlock % kAtomWidth, k1 = (k / 16) % 2, k2 = k / 32;
    // fault: word of wgmma.sp
    const int64_t halfword = 2 * k2 + kAtomWidth / 16 * m0 + kAtomWidth / 2 * k1 + kAtomWidth * m2;
    const int64_t atom_bytes =
        block * kBlock / kAtomWidth * rows * kAtomWidth / 8 + m / kRows * 8 * kAtomWidth;
    return atom_bytes / 4 + halfword / 2;
  }
};

}  // namespace lynx
