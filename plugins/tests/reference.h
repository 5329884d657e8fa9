// SPDX-License-Identifier: Apache-2.0
// What the kernels must compute, stated independently of them for all tests in C++: 16-bit floats by their
// definition, selection by a stable sort, metadata addresses by their published digit order, and the ops in
// float64, with how far a kernel that sums in float32 may be off.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
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

// ---- The compressed operand, byte by byte ----

using Bits = std::vector<uint16_t>;
using Index = std::function<int64_t(int64_t m, int64_t block, int64_t rows)>;  // one of the above

// Where nothing is set, padding: zeros under nibble 4.
struct Operand {
  int64_t rows, width;  // padded
  Index index;
  Bits values = Bits(size_t(rows * width / 2)), metadata = Bits(size_t(rows * width / 16), 0x4444);

  // Keeps 2 of the 4 values `z` of a group of row m; by the magnitudes that `value` gives them.
  void set_group(int64_t m, int64_t group, const uint16_t* z, const Rounding& value) {
    std::array<double, 4> score;
    for (size_t i = 0; i < 4; ++i) score[i] = std::fabs(value[z[i]]);
    const auto kept = kept_positions(score);
    for (size_t i = 0; i < 2; ++i) values[size_t(m * width / 2 + 2 * group) + i] = z[kept[i]];
    uint16_t& word = metadata[size_t(index(m, group / 4, rows))];
    const auto shift = 4 * (group % 4);
    word = uint16_t((word & ~(15 << shift)) | (kept[0] | kept[1] << 2) << shift);
  }
};

// ---- The ops in float64, token by token ----

using Row = std::vector<double>;

// A value, and how far a kernel that sums in float32 and rounds to 16 bits may be off it.
struct Near {
  double value, tolerance;
};

// Sums of n terms in float32 stay within this much of the sum of their magnitudes: a random walk of n
// roundings, times 4, since tensor cores truncate where they align addends.
inline double sum_error(int64_t terms) { return 4.0 * 0x1p-23 * std::sqrt(double(terms)); }

struct Sum {
  double value = 0.0, magnitude = 0.0;

  void add(double term) { value += term, magnitude += std::fabs(term); }
};

// By the number that nodes and the C functions call it: 1 GELU (tanh), 2 GELU (erf), 3 SiLU.
inline double activate(int activation, double x) {
  switch (activation) {
    case 1:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case 2:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case 3:
      return x / (1.0 + std::exp(-x));
  }
  return x;
}

// What a norm takes of a token; the mean of an RMSNorm is 0.
struct Moments {
  double mean = 0.0, variance = 0.0;
};
inline Moments moments(const Row& x, bool rms) {
  Moments out;
  for (const double each : x) out.mean += rms ? 0.0 : each / double(x.size());
  for (const double each : x) out.variance += (each - out.mean) * (each - out.mean) / double(x.size());
  return out;
}

// z with zeros where nothing is kept.
inline Row pruned(const Row& z) {
  Row out(z.size());
  for (size_t group = 0; group < z.size(); group += 4) {
    std::array<double, 4> score;
    for (size_t i = 0; i < 4; ++i) score[i] = std::fabs(z[group + i]);
    for (const int position : kept_positions(score))
      out[group + size_t(position)] = z[group + size_t(position)];
  }
  return out;
}

inline double squares(const Row& z) { return std::inner_product(z.begin(), z.end(), z.begin(), 0.0); }

inline double norm_scale(const Row& z, const Row& kept) {
  return std::sqrt(squares(z) / (squares(kept) + 1e-8));
}

// What stands behind a product. `gated`: channels from `from` on come in runs of 16, of which 8 remain.
struct Epilogue {
  int activation = 0;
  int64_t from = 0;
  bool gated = false;
};

// GELU and SiLU have slopes of 1.13 at most; the hardware's tanh is off by 2^-11 of itself.
inline Near activate(int activation, Near x) {
  const double y = activate(activation, x.value);
  return {y, 1.13 * x.tolerance + (x.tolerance > 0.0 ? 0x1p-12 * std::fabs(x.value) : 0.0)};
}

inline Near operator*(Near a, Near b) {
  const double tolerance =
      std::fabs(a.value) * b.tolerance + (std::fabs(b.value) + b.tolerance) * a.tolerance;
  return {a.value * b.value, tolerance};
}

inline std::vector<Near> finish(const std::vector<Near>& row, const Epilogue& epilogue) {
  if (epilogue.activation == 0) return row;
  std::vector<Near> y(row.begin(), row.begin() + epilogue.from);
  for (size_t n = y.size(); n < row.size(); ++n) {
    if (epilogue.gated && (n - size_t(epilogue.from)) % 16 >= 8) continue;
    const Near activated = activate(epilogue.activation, row[n]);
    y.push_back(epilogue.gated ? activated * row[n + 8] : activated);
  }
  return y;
}

// The last rounding, to the type of `value`.
inline std::vector<Near> stored(std::vector<Near> y, double roundoff) {
  for (Near& each : y) each.tolerance += 1.01 * roundoff * std::fabs(each.value);
  return y;
}

// LynxSparseLinear's operands, as bits of the type of `value`; roundoff: half the distance of neighbours,
// relative.
struct SparseLinear {
  const Rounding& value;
  double roundoff;
  int64_t channels, out_channels, rank, width;
  const uint16_t *weight, *lora_down, *bias;
  Epilogue epilogue;

  double rounded(double exact) const { return value[value.nearest(float(exact))]; }

  // U = T / scale as stored.
  std::vector<Near> low_rank(const Row& z, double scale) const {
    std::vector<Near> u;
    for (int64_t j = 0; j < rank; ++j) {
      Sum t;
      for (int64_t k = 0; k < channels; ++k) t.add(z[size_t(k)] * value[lora_down[j * channels + k]]);
      const double exact = scale > 0.0 ? t.value / scale : 0.0;
      const double error =
          2.0 * roundoff * std::fabs(exact) + sum_error(channels) * t.magnitude / scale + 1e-7;
      u.push_back({rounded(exact), scale > 0.0 ? error : 0.0});
    }
    return u;
  }

  // y of a token of which `kept` is left, under its scale.
  std::vector<Near> y(const Row& kept, double scale, const std::vector<Near>& u) const {
    std::vector<Near> out;
    for (int64_t n = 0; n < out_channels; ++n) {
      const uint16_t* const row = weight + n * width;
      Sum sum;
      double from_u = 0.0;
      for (int64_t k = 0; k < channels; ++k) {
        if (kept[size_t(k)] != 0.0) sum.add(kept[size_t(k)] * value[row[k]]);
      }
      for (int64_t j = 0; j < rank; ++j) {
        const double b = value[row[channels + j / 2 * 4 + j % 2]];
        sum.add(u[size_t(j)].value * b), from_u += u[size_t(j)].tolerance * std::fabs(b);
      }
      const double error = std::fabs(scale) * (sum_error(width) * sum.magnitude + from_u) + 1e-6;
      out.push_back({scale * sum.value + value[bias[n]], error});
    }
    return stored(finish(out, epilogue), roundoff);
  }
};

}  // namespace reference
