// SPDX-License-Identifier: Apache-2.0
// What sparse24.h and the pruning kernels must compute, stated independently of them for the tests: 16-bit
// floats by their definition, selection by a stable sort, metadata addresses by their published digit order.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace reference {

// ---- 16-bit floats ----

struct Format {
  int exponent_bits, mantissa_bits;
};
constexpr Format kBf16Format{8, 7}, kFp16Format{5, 10};

inline double value_of(uint16_t bits, Format format) {
  const int exponent_mask = (1 << format.exponent_bits) - 1, bias = exponent_mask / 2;
  const int exponent = bits >> format.mantissa_bits & exponent_mask;
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == exponent_mask)
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  const double fraction = std::ldexp(double(mantissa), -format.mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, exponent - bias);
}

// value_of as a table, and the nearest of all finite values.
class Rounding {
 public:
  explicit Rounding(Format format)
      : infinity_(uint16_t(((1 << format.exponent_bits) - 1) << format.mantissa_bits)), values_(0x10000) {
    for (int bits = 0; bits < 0x10000; ++bits) values_[size_t(bits)] = value_of(uint16_t(bits), format);
  }

  double operator[](uint16_t bits) const { return values_[bits]; }
  uint16_t infinity() const { return infinity_; }

  // Ties to the even mantissa; one step above the largest finite value is infinity; NaN is 0x7fff.
  uint16_t nearest(float value) const {
    if (std::isnan(value)) return 0x7fff;
    const double magnitude = std::fabs(double(value));
    uint16_t out = infinity_;
    if (!std::isinf(magnitude)) {
      const auto end = values_.begin() + infinity_;  // the finite values of sign + ascend with their bits
      const auto low = uint16_t(std::upper_bound(values_.begin(), end, magnitude) - values_.begin() - 1);
      const double below = values_[low];
      const double above = low + 1 < infinity_ ? values_[low + 1u] : 2.0 * below - values_[low - 1u];
      out = magnitude - below < above - magnitude ? low : uint16_t(low + 1);
      if (magnitude - below == above - magnitude) out = uint16_t(low + low % 2);
    }
    return uint16_t(out | (std::signbit(value) ? 0x8000 : 0));
  }

 private:
  uint16_t infinity_;
  std::vector<double> values_;
};

inline const Rounding& bf16() {
  static const Rounding rounding(kBf16Format);
  return rounding;
}

inline const Rounding& fp16() {
  static const Rounding rounding(kFp16Format);
  return rounding;
}

// ---- e4m3: 4 and 3 bits, but the largest exponent has values too, and its last one is NaN ----

inline double e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::nan("");
  const double magnitude =
      exponent == 0 ? std::ldexp(double(mantissa), -9) : std::ldexp(8.0 + double(mantissa), exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

// The nearest of all, ties to the even mantissa, beyond the largest the largest; NaN is 0x7f.
inline uint8_t nearest_e4m3(float value) {
  if (std::isnan(value)) return 0x7f;
  const double magnitude = std::fabs(double(value));
  int best = 0;
  for (int bits = 1; bits < 0x7f; ++bits) {
    const double distance = std::fabs(e4m3_value(uint8_t(bits)) - magnitude);
    const double least = std::fabs(e4m3_value(uint8_t(best)) - magnitude);
    if (distance < least || (distance == least && bits % 2 == 0)) best = bits;
  }
  if (magnitude > 448.0) best = 0x7e;
  return uint8_t(best | (std::signbit(value) ? 0x80 : 0));
}

// ---- Selection ----

// Kept positions, ascending: a stable sort by decreasing score; NaN goes first.
inline std::array<int, 2> kept_positions(const std::array<double, 4>& score) {
  std::array<int, 4> index{0, 1, 2, 3};
  std::stable_sort(index.begin(), index.end(), [&](int a, int b) {
    const bool nan_a = std::isnan(score[size_t(a)]), nan_b = std::isnan(score[size_t(b)]);
    return nan_a != nan_b ? nan_a : score[size_t(a)] > score[size_t(b)];
  });
  std::array<int, 2> kept{index[0], index[1]};
  std::sort(kept.begin(), kept.end());
  return kept;
}

// ---- Metadata addresses, in 16-bit words ----

// sm_80, as published: rows of 32 dealt to 8 x 4, then each 2 x 2 square of (row, column) turned from Z to N,
// then pairs of columns interleaved.
inline int64_t sm80_index(int64_t m, int64_t block, int64_t rows) {
  int64_t row = m / 32 * 32 + m % 8 * 4 + m % 32 / 8, column = block;
  if (row % 2 != column % 2) {
    const int64_t step = row % 2 == 0 ? 1 : -1;
    row += step;
    column -= step;
  }
  return column / 2 * (2 * rows) + 2 * row + column % 2;
}

// sm_90: digits of m and k, each with its stride, within an atom of 64 rows by `atom` channels.
inline int64_t sm90_index(int64_t m, int64_t block, int64_t rows, int64_t atom) {
  const int64_t k = block * 16;
  const int64_t row_digits[3] = {m % 8, m / 8 % 2, m / 16 % 4};
  const int64_t row_strides[3] = {atom / 16, 1, atom};
  const int64_t in_atom = std::inner_product(row_digits, row_digits + 3, row_strides, int64_t(0)) +
                          (k % 32 / 16) * (atom / 2) + (k % atom / 32) * 2;
  return k / atom * (rows * atom / 16) + m / 64 * (4 * atom) + in_atom;
}

}  // namespace reference
