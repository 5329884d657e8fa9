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
#include "tests/reference.h"

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

  // Of a token.
  void add(const std::vector<reference::Near>& due, const std::vector<reference::Near>& dense) {
    for (const reference::Near& each : due) y.push_back(each.value), tolerance.push_back(each.tolerance);
    for (const reference::Near& each : dense) unpruned.push_back(each.value);
  }

  DataType type() const { return inputs[0].type; }
  int64_t rows() const { return inputs[0].dims[0] * inputs[0].dims[1]; }
};

inline const reference::Rounding& rounding(DataType type) {
  return type == DataType::kBF16 ? reference::bf16() : reference::fp16();
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
  void set(int64_t i, double value) { bits_[size_t(i)] = rounding(type_).nearest(float(value)); }
  double operator[](int64_t i) const { return rounding(type_)[bits_[size_t(i)]]; }
  uint16_t bits(int64_t i) const { return bits_[size_t(i)]; }
  const uint16_t* data() const { return bits_.data(); }
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
  int activation = 0, producer_activation = 0, halves = 0;
  int64_t activation_from = 0;

  bool norm() const { return plugin == "LynxNormSparseLinear"; }
  bool gated() const { return plugin == "LynxGatedSparseLinear"; }
  bool produced() const { return plugin != "LynxSparseLinear"; }
};

inline std::string epilogue_name(const reference::Epilogue& epilogue) {
  static const char* const kNames[] = {"", "GELU", "GELU by erf", "SiLU"};
  if (epilogue.activation == 0) return "";
  return std::string(", ") + kNames[epilogue.activation] + " from " + std::to_string(epilogue.from) +
         (epilogue.gated ? ", gated" : "");
}

// x for a fused producer: in each group two channels much larger than the others, and positive, so that the
// last bit of the producer's result decides nothing.
inline double separated(std::mt19937& random, int64_t k, int64_t row) {
  constexpr double kSizes[4] = {0.3, 3.0, 0.5, 2.0};
  std::uniform_real_distribution<double> spread(0.9, 1.1);
  return kSizes[size_t(k + k / 4 + row) % 4] * spread(random);
}

// z of one row, exact, before its rounding to the element type. `first`: gain or gate; `second`: shift.
inline reference::Row producer_row(const SparseLinearCase& c, const Values& x, const Values& first,
                                   const Values& second, int64_t row, int64_t gain_row, double epsilon) {
  reference::Row z(static_cast<size_t>(c.channels));
  for (int64_t k = 0; k < c.channels; ++k) z[size_t(k)] = x[row * c.channels + k];
  const reference::Moments moments = reference::moments(z, c.rms);
  for (int64_t k = 0; k < c.channels; ++k) {
    double& value = z[size_t(k)];
    if (c.norm()) {
      const double normed = (value - moments.mean) / std::sqrt(moments.variance + epsilon);
      value = normed * first[gain_row * c.channels + k] + second[gain_row * c.channels + k];
    } else if (c.produced()) {
      value = reference::activate(c.producer_activation, value);
      if (c.gated()) value *= first[row * c.channels + k];
    }
  }
  return z;
}

// x and its gate as the halves of one tensor, in the order that the case has.
inline Values halves_of(const SparseLinearCase& c, const Values& x, const Values& gate) {
  const bool x_first = c.halves == 1;
  Values out(c.type, {c.batch, c.length, 2 * c.channels});
  return out.fill([&](int64_t i) {
    const int64_t row = i / (2 * c.channels), k = i % (2 * c.channels);
    const bool first = k < c.channels;
    return (first == x_first ? x : gate)[row * c.channels + (first ? k : k - c.channels)];
  });
}

inline Problem sparse_linear(const SparseLinearCase& c) {
  std::mt19937 random(unsigned(c.channels + 3 * c.out_channels + 5 * c.rank + 7 * c.length));
  std::normal_distribution<double> normal;
  const bool produced = c.produced(), norm = c.norm(), gated = c.gated();
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
              (c.producer_activation ? ", of activation " + std::to_string(c.producer_activation) : "") +
              (c.halves ? ", halves " + std::to_string(c.halves) : "") +
              epilogue_name({c.activation, c.activation_from, false});
  out.attributes = {{"rank", double(c.rank)},
                    {"norm_scale", double(c.norm_scale)},
                    {"activation", double(c.activation)},
                    {"activation_from", double(c.activation_from)}};
  if (norm) out.attributes["rms"] = double(c.rms), out.attributes["epsilon"] = epsilon;
  if (produced && !norm) out.attributes["producer_activation"] = double(c.producer_activation);
  if (gated) out.attributes["halves"] = double(c.halves);
  const HostTensor both = c.halves ? halves_of(c, x, first).tensor() : HostTensor();
  out.inputs = {c.halves ? both : x.tensor(), weight.tensor(), down.tensor(), bias.tensor()};
  if (norm || gated) out.inputs.push_back(c.halves ? both : first.tensor());
  if (norm) out.inputs.push_back(second.tensor());
  out.out_channels = c.out_channels;

  const reference::SparseLinear op = {rounding(c.type), roundoff(c.type),
                                      c.channels,       c.out_channels,
                                      c.rank,           width,
                                      weight.data(),    down.data(),
                                      bias.data(),      {c.activation, c.activation_from, false}};
  for (int64_t m = 0; m < rows; ++m) {
    reference::Row z = producer_row(c, x, first, second, m, m / c.length, epsilon);
    for (double& value : z) value = op.rounded(value);
    const reference::Row kept = reference::pruned(z);
    const double scale = c.norm_scale ? reference::norm_scale(z, kept) : 1.0;
    out.add(op.y(kept, scale, op.low_rank(z, scale)), op.y(z, 1.0, op.low_rank(z, 1.0)));
  }
  return out;
}

// What can be said of the plugin with 2:4 weights.
struct SparseWeightCase {
  DataType type = DataType::kBF16;
  int64_t batch = 2, length = 33, channels = 192, out_channels = 200, layout = 80;
  reference::Epilogue epilogue;
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
      const int64_t block = group / 4, at = c.layout == 90 ? reference::sm90_index(n, block, padded, 64)
                                                           : reference::sm80_index(n, block, padded);
      const int64_t shift = 4 * (group % 4) + (at % 2 ? 16 : 0);  // of a word of two
      int32_t& to = metadata[size_t(at / 2)];
      to = int32_t((uint32_t(to) & ~(15u << shift)) | nibble << shift);
    }
  }
  Problem out;
  out.plugin = "LynxSparseWeightLinear";
  out.title = out.plugin + (c.type == DataType::kBF16 ? " bf16 " : " fp16 ") + std::to_string(rows) + " x " +
              std::to_string(c.channels) + " -> " + std::to_string(c.out_channels) + ", layout " +
              std::to_string(c.layout) + epilogue_name(c.epilogue);
  out.attributes = {{"out_channels", double(c.out_channels)},
                    {"metadata_layout", double(c.layout)},
                    {"activation", double(c.epilogue.activation)},
                    {"activation_from", double(c.epilogue.from)},
                    {"gated", double(c.epilogue.gated)}};
  out.inputs = {x.tensor(), values.tensor(), int_tensor({c.channels / 64, padded / 64, 128}, metadata),
                bias.tensor()};
  const int64_t behind = c.out_channels - c.epilogue.from;
  out.out_channels = c.epilogue.gated ? c.epilogue.from + behind / 2 : c.out_channels;
  for (int64_t m = 0; m < rows; ++m) {
    std::vector<reference::Near> y, unpruned;
    for (int64_t n = 0; n < c.out_channels; ++n) {
      reference::Sum sum;
      double whole = bias[n];
      for (int64_t k = 0; k < c.channels; ++k) {
        const double of_x = x[m * c.channels + k];
        sum.add(of_x * pruned[size_t(n * c.channels + k)]), whole += of_x * dense[n * c.channels + k];
      }
      y.push_back({sum.value + bias[n], reference::sum_error(c.channels) * sum.magnitude + 1e-6});
      unpruned.push_back({whole, 0.0});
    }
    out.add(reference::stored(reference::finish(y, c.epilogue), roundoff(c.type)),
            reference::finish(unpruned, c.epilogue));
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
        SparseWeightCase behind = c;
        behind.channels = 256, behind.out_channels = 256;
        for (const reference::Epilogue& epilogue : {reference::Epilogue{1, 128, false},
                                                    {2, 64, false},
                                                    {1, 0, true},
                                                    {2, 64, true},
                                                    {3, 64, true}}) {
          behind.epilogue = epilogue;
          out.push_back(sparse_weight(behind));
        }
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
    if (c.produced() && !c.norm()) c.producer_activation = c.gated() ? 3 : 1;
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
    for (const int activation : {1, 2}) {
      SparseLinearCase behind = c;
      behind.activation = activation, behind.activation_from = 64;
      if (behind.produced() && !behind.norm()) behind.producer_activation = activation;
      out.push_back(sparse_linear(behind));
    }
    for (const int halves : {1, 2}) {
      SparseLinearCase halved = c;
      halved.halves = halves;
      if (c.gated()) out.push_back(sparse_linear(halved));
    }
  }
  return out;
}

}  // namespace lynx::test
