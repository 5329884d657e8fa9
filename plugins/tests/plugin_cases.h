// SPDX-License-Identifier: Apache-2.0
// Problems for plugin_host: a node's attributes and inputs, and what it must compute, in float64.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/sparse24.h"

namespace lynx::test {

using nvinfer1::DataType;

// An input on the host: bf16 and fp16 as bits.
struct HostTensor {
  DataType type;
  std::vector<int64_t> dims;
  std::vector<char> bytes;
};

// One node. `inputs` in the order of the op, x first; `attributes` by field name.
struct Problem {
  std::string plugin, title;
  std::map<std::string, double> attributes;
  std::vector<HostTensor> inputs;
  int64_t out_channels = 0;
  std::vector<double> y, tolerance;  // [rows, out_channels]
  std::vector<double> unpruned;      // y if nothing were dropped: must not pass for y

  DataType type() const { return inputs[0].type; }
  int64_t rows() const { return inputs[0].dims[0] * inputs[0].dims[1]; }
};

inline float to_float(DataType type, uint16_t bits) {
  return type == DataType::kBF16 ? Bf16::to_float(bits) : Fp16::to_float(bits);
}

inline uint16_t from_float(DataType type, double value) {
  return type == DataType::kBF16 ? Bf16::from_float(float(value)) : Fp16::from_float(float(value));
}

// Half the distance of neighbouring numbers, relative.
inline double roundoff(DataType type) { return type == DataType::kBF16 ? 0x1p-8 : 0x1p-11; }

// A matrix or vector of 16-bit floats, rounded once and used as the node will read it.
class Values {
 public:
  Values(DataType type, std::vector<int64_t> dims) : type_(type), dims_(std::move(dims)) {
    int64_t count = 1;
    for (const int64_t extent : dims_) count *= extent;
    bits_.resize(size_t(count));
  }
  void set(int64_t i, double value) { bits_[size_t(i)] = from_float(type_, value); }
  double operator[](int64_t i) const { return to_float(type_, bits_[size_t(i)]); }
  uint16_t bits(int64_t i) const { return bits_[size_t(i)]; }
  int64_t count() const { return int64_t(bits_.size()); }

  template <class Draw>
  Values& fill(Draw draw) {
    for (int64_t i = 0; i < count(); ++i) set(i, draw(i));
    return *this;
  }

  HostTensor tensor() const {
    HostTensor out{type_, dims_, std::vector<char>(bits_.size() * 2)};
    std::memcpy(out.bytes.data(), bits_.data(), out.bytes.size());
    return out;
  }

 private:
  DataType type_;
  std::vector<int64_t> dims_;
  std::vector<uint16_t> bits_;
};

inline HostTensor int_tensor(std::vector<int64_t> dims, const std::vector<int32_t>& values) {
  HostTensor out{DataType::kINT32, std::move(dims), std::vector<char>(values.size() * 4)};
  std::memcpy(out.bytes.data(), values.data(), out.bytes.size());
  return out;
}

// What can be said of a plugin that prunes x.
struct SparseLinearCase {
  std::string plugin = "LynxSparseLinear";
  DataType type = DataType::kBF16;
  int64_t batch = 2, length = 33, channels = 192, out_channels = 192, rank = 16;
  bool norm_scale = true, rms = false;
  int64_t gelu_from = -1;  // none
};

inline double gelu(double x) {
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

// Sums of n float32 terms stay within this much of the sum of their magnitudes: a random walk, times 4, since
// tensor cores cut off where they align addends.
inline double sum_error(int64_t terms) { return 4.0 * 0x1p-23 * std::sqrt(double(terms)); }

// x for a fused producer: in each group two channels much larger than the others, and positive, so that the
// last bit of the producer's result decides nothing.
inline double separated(std::mt19937& random, int64_t k, int64_t row) {
  constexpr double kSizes[4] = {0.3, 3.0, 0.5, 2.0};
  std::uniform_real_distribution<double> spread(0.9, 1.1);
  return kSizes[size_t(k + k / 4 + row) % 4] * spread(random);
}

// z of one row, exact, before its rounding to the element type.
inline std::vector<double> producer_row(const SparseLinearCase& c, const Values& x, const Values& first,
                                        const Values& second, int64_t row, int64_t gain_row, double epsilon) {
  const int64_t k_count = c.channels;
  std::vector<double> z(static_cast<size_t>(k_count));
  for (int64_t k = 0; k < k_count; ++k) z[size_t(k)] = x[row * k_count + k];
  if (c.plugin == "LynxNormSparseLinear") {
    double mean = 0.0, square = 0.0;
    for (const double value : z) mean += c.rms ? 0.0 : value / double(k_count);
    for (const double value : z) square += (value - mean) * (value - mean) / double(k_count);
    for (int64_t k = 0; k < k_count; ++k) {
      double& value = z[size_t(k)];
      const double normed = (value - mean) / std::sqrt(square + epsilon);
      value = normed * first[gain_row * k_count + k] + second[gain_row * k_count + k];
    }
  } else if (c.plugin == "LynxGeluSparseLinear") {
    for (double& value : z) value = gelu(value);
  } else if (c.plugin == "LynxGatedSparseLinear") {
    for (int64_t k = 0; k < k_count; ++k)
      z[size_t(k)] *= first[row * k_count + k] / (1.0 + std::exp(-z[size_t(k)]));
  }
  return z;
}

inline Problem sparse_linear(const SparseLinearCase& c) {
  std::mt19937 random(unsigned(c.channels + 3 * c.out_channels + 5 * c.rank + 7 * c.length));
  std::normal_distribution<double> normal;
  const bool produced = c.plugin != "LynxSparseLinear", norm = c.plugin == "LynxNormSparseLinear";
  const bool gated = c.plugin == "LynxGatedSparseLinear";
  const int64_t rows = c.batch * c.length, width = padded_width(c.channels, c.rank);
  const int64_t down_rows = std::max<int64_t>(c.rank, 1);
  const double deviation = 1.0 / std::sqrt(double(c.channels)), epsilon = 1e-6;

  Values x(c.type, {c.batch, c.length, c.channels});
  x.fill([&](int64_t i) {
    if (!produced) return normal(random);
    const double sign = norm && random() % 2 ? -1.0 : 1.0;  // GELU and SiLU: positive
    return sign * separated(random, i % c.channels, i / c.channels);
  });
  Values weight(c.type, {c.out_channels, width}), down(c.type, {down_rows, c.channels});
  weight.fill([&](int64_t i) {  // W', B in pairs, zeros
    const int64_t k = i % width - c.channels;
    return k < 0 || (k < 2 * c.rank && k % 4 < 2) ? deviation * normal(random) : 0.0;
  });
  down.fill([&](int64_t) { return deviation * normal(random); });
  Values bias(c.type, {c.out_channels});
  bias.fill([&](int64_t) { return normal(random); });
  const int64_t first_rows = norm ? c.batch : gated ? rows : 0;
  Values first(c.type, {c.batch, first_rows / c.batch, c.channels});  // gain, or the gate
  first.fill([&](int64_t) { return 1.0 + 0.05 * normal(random); });
  Values second(c.type, {c.batch, norm ? 1 : 0, c.channels});  // shift
  second.fill([&](int64_t) { return 0.05 * normal(random); });

  Problem out;
  out.plugin = c.plugin;
  out.title = c.plugin + (c.type == DataType::kBF16 ? " bf16 " : " fp16 ") + std::to_string(rows) + " x " +
              std::to_string(c.channels) + " -> " + std::to_string(c.out_channels) + ", rank " +
              std::to_string(c.rank) + (c.norm_scale ? ", norm scale" : "") + (c.rms ? ", RMS" : "") +
              (c.gelu_from >= 0 ? ", GELU from " + std::to_string(c.gelu_from) : "");
  out.attributes = {{"rank", double(c.rank)},
                    {"norm_scale", double(c.norm_scale)},
                    {"activation", double(c.gelu_from >= 0)},
                    {"activation_from", double(std::max<int64_t>(c.gelu_from, 0))}};
  if (norm) out.attributes["rms"] = double(c.rms), out.attributes["epsilon"] = epsilon;
  out.inputs = {x.tensor(), weight.tensor(), down.tensor(), bias.tensor()};
  if (norm || gated) out.inputs.push_back(first.tensor());
  if (norm) out.inputs.push_back(second.tensor());
  out.out_channels = c.out_channels;

  const double half = roundoff(c.type);
  const auto rounded = [&](double value) { return double(to_float(c.type, from_float(c.type, value))); };
  for (int64_t m = 0; m < rows; ++m) {
    std::vector<double> z = producer_row(c, x, first, second, m, m / c.length, epsilon);
    for (double& value : z) value = rounded(value);
    std::vector<double> kept(z.size(), 0.0);
    double all_squares = 0.0, kept_squares = 0.0;
    for (int64_t group = 0; group < c.channels; group += 4) {
      int64_t position[4] = {group, group + 1, group + 2, group + 3};
      const auto score = [&](int64_t k) {  // in float32, as the op says
        return float(std::fabs(z[size_t(k)]));
      };
      std::stable_sort(position, position + 4, [&](int64_t a, int64_t b) { return score(a) > score(b); });
      for (int i = 0; i < 2; ++i) kept[size_t(position[i])] = z[size_t(position[i])];
    }
    for (size_t k = 0; k < z.size(); ++k) all_squares += z[k] * z[k], kept_squares += kept[k] * kept[k];
    const double scale = c.norm_scale ? std::sqrt(all_squares / (kept_squares + 1e-8)) : 1.0;
    std::vector<double> u, u_error;
    for (int64_t j = 0; j < c.rank; ++j) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < c.channels; ++k) {
        const double term = z[size_t(k)] * down[j * c.channels + k];
        sum += term, magnitude += std::fabs(term);
      }
      u.push_back(rounded(sum / scale));
      u_error.push_back(2.0 * half * std::fabs(sum / scale) + sum_error(c.channels) * magnitude / scale +
                        1e-7);
    }
    for (int64_t n = 0; n < c.out_channels; ++n) {
      double sum = 0.0, dense = 0.0, magnitude = 0.0, square = 0.0, error = 0.0;
      for (int64_t k = 0; k < c.channels; ++k) {
        const double w = weight[n * width + k], term = kept[size_t(k)] * w;
        sum += term, dense += z[size_t(k)] * w, magnitude += std::fabs(term), square += term * term;
      }
      for (int64_t j = 0; j < c.rank; ++j) {
        const double b = weight[n * width + c.channels + j / 2 * 4 + j % 2];
        sum += u[size_t(j)] * b, dense += u[size_t(j)] * b, magnitude += std::fabs(u[size_t(j)] * b);
        error += u_error[size_t(j)] * std::fabs(b);
      }
      if (produced) error += 8.0 * half * std::sqrt(square);  // z may be off by one bit where it was rounded
      error = scale * (error + sum_error(width) * magnitude) + 1e-6;
      double y = scale * sum + bias[n], unpruned = dense + bias[n];
      if (c.gelu_from >= 0 && n >= c.gelu_from) {  // slope at most 1.13; the hardware's tanh is off by 2^-11
        error = 1.13 * error + 0x1p-12 * std::fabs(y);
        y = gelu(y), unpruned = gelu(unpruned);
      }
      out.y.push_back(y), out.unpruned.push_back(unpruned);
      out.tolerance.push_back(error + 1.01 * half * std::fabs(y));
    }
  }
  return out;
}

// What can be said of the plugin with 2:4 weights.
struct SparseWeightCase {
  DataType type = DataType::kBF16;
  int64_t batch = 2, length = 33, channels = 192, out_channels = 200, layout = 80, gelu_from = -1;
};

inline Problem sparse_weight(const SparseWeightCase& c) {
  std::mt19937 random(unsigned(c.channels + 3 * c.out_channels + c.layout));
  std::normal_distribution<double> normal;
  const int64_t rows = c.batch * c.length, padded = padded_rows(c.out_channels);
  Values x(c.type, {c.batch, c.length, c.channels}), values(c.type, {padded, c.channels / 2});
  Values dense(c.type, {c.out_channels, c.channels}), bias(c.type, {c.out_channels});
  x.fill([&](int64_t) { return normal(random); });
  dense.fill([&](int64_t) { return normal(random) / std::sqrt(double(c.channels)); });
  bias.fill([&](int64_t) { return normal(random); });
  std::vector<double> pruned(size_t(c.out_channels * c.channels), 0.0);
  std::vector<int32_t> metadata(size_t(padded * c.channels / 32), int32_t(kEmptyMetadataPair));
  for (int64_t n = 0; n < c.out_channels; ++n) {
    for (int64_t group = 0; group < c.channels / 4; ++group) {
      const uint32_t lo = random() % 3, hi = lo + 1 + random() % (3 - lo);  // any two of four
      const uint32_t nibble = lo | hi << 2;
      int64_t slot = n * c.channels / 2 + 2 * group;
      for (const uint32_t position : {lo, hi}) {
        const int64_t at = n * c.channels + 4 * group + position;
        values.set(slot++, dense[at]);
        pruned[size_t(at)] = dense[at];
      }
      const int64_t block = group / 4, shift = 4 * (group % 4) + (n & 8 ? 16 : 0), row = n & ~int64_t(8);
      const int64_t word = c.layout == 90 ? Sm90Metadata<64>::word(row, block, padded)
                                          : Sm80Metadata::word(row, block, padded);
      int32_t& to = metadata[size_t(word)];
      to = int32_t((uint32_t(to) & ~(15u << shift)) | nibble << shift);
    }
  }
  Problem out;
  out.plugin = "LynxSparseWeightLinear";
  out.title = out.plugin + (c.type == DataType::kBF16 ? " bf16 " : " fp16 ") + std::to_string(rows) + " x " +
              std::to_string(c.channels) + " -> " + std::to_string(c.out_channels) + ", layout " +
              std::to_string(c.layout) +
              (c.gelu_from >= 0 ? ", GELU from " + std::to_string(c.gelu_from) : "");
  out.attributes = {{"out_channels", double(c.out_channels)},
                    {"metadata_layout", double(c.layout)},
                    {"activation", double(c.gelu_from >= 0)},
                    {"activation_from", double(std::max<int64_t>(c.gelu_from, 0))}};
  out.inputs = {x.tensor(), values.tensor(), int_tensor({c.channels / 64, padded / 64, 128}, metadata),
                bias.tensor()};
  out.out_channels = c.out_channels;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < c.out_channels; ++n) {
      double y = bias[n], unpruned = bias[n], magnitude = 0.0;
      for (int64_t k = 0; k < c.channels; ++k) {
        const double term = x[m * c.channels + k] * pruned[size_t(n * c.channels + k)];
        y += term, magnitude += std::fabs(term);
        unpruned += x[m * c.channels + k] * dense[n * c.channels + k];
      }
      double error = sum_error(c.channels) * magnitude + 1e-6;
      if (c.gelu_from >= 0 && n >= c.gelu_from) {
        error = 1.13 * error + 0x1p-12 * std::fabs(y);
        y = gelu(y), unpruned = gelu(unpruned);
      }
      out.y.push_back(y), out.unpruned.push_back(unpruned);
      out.tolerance.push_back(error + 1.01 * roundoff(c.type) * std::fabs(y));
    }
  }
  return out;
}

}  // namespace lynx::test

#include "plugin_fp8_cases.h"

namespace lynx::test {

// What plugin_host runs of a plugin; none for one that it does not know.
inline std::vector<Problem> problems_of(const std::string& plugin) {
  if (plugin.find("Fp8") != std::string::npos) return fp8_problems_of(plugin);
  std::vector<Problem> out;
  if (plugin == "LynxSparseWeightLinear") {
    for (const DataType type : {DataType::kBF16, DataType::kHALF}) {
      for (const int64_t layout : {80, 90}) {
        SparseWeightCase c;
        c.type = type, c.layout = layout;
        out.push_back(sparse_weight(c));
        SparseWeightCase gelu_behind = c;
        gelu_behind.channels = 256, gelu_behind.out_channels = 256, gelu_behind.gelu_from = 128;
        out.push_back(sparse_weight(gelu_behind));
        c.channels = 8256;  // long enough for stream-K
        out.push_back(sparse_weight(c));
      }
    }
    return out;
  }
  const char* const known[] = {"LynxSparseLinear", "LynxNormSparseLinear", "LynxGeluSparseLinear",
                               "LynxGatedSparseLinear"};
  if (std::find(std::begin(known), std::end(known), plugin) == std::end(known)) return out;
  for (const DataType type : {DataType::kBF16, DataType::kHALF}) {
    SparseLinearCase c;
    c.plugin = plugin, c.type = type;
    out.push_back(sparse_linear(c));
    SparseLinearCase bare = c;
    bare.rank = 0, bare.norm_scale = false, bare.length = 1;
    out.push_back(sparse_linear(bare));
    SparseLinearCase wide = c;
    wide.channels = 768, wide.out_channels = 256, wide.rank = 64, wide.rms = plugin == "LynxNormSparseLinear";
    out.push_back(sparse_linear(wide));
    SparseLinearCase deep = c;  // long enough for stream-K
    deep.channels = 8208, deep.out_channels = 72, deep.length = 5;
    out.push_back(sparse_linear(deep));
    SparseLinearCase gelu_behind = c;
    gelu_behind.gelu_from = 64;
    out.push_back(sparse_linear(gelu_behind));
  }
  return out;
}

}  // namespace lynx::test
