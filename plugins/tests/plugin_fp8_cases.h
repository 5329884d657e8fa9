// SPDX-License-Identifier: Apache-2.0
// Problems of the FP8 plugins, for plugin_host and plugin_test. Included by plugin_cases.h, whose types they
// are.
#pragma once

#include "kernels/fp8.h"
#include "tests/reference.h"

namespace lynx::test {

// What can be said of a plugin in FP8: with 2:4 weights, or dense ones and 2:4 activations or not.
struct Fp8Case {
  std::string plugin = "LynxFp8Linear";
  DataType type = DataType::kBF16;
  int64_t batch = 2, length = 33, channels = 208, out_channels = 72;
  bool prune = false, rms = false;
  int producer_activation = 0, halves = 0;  // 0: SiLU of a gate, else the tanh GELU
  reference::Epilogue epilogue;

  bool sparse_weight() const { return plugin.find("SparseWeight") != std::string::npos; }
  bool makes(const char* what) const { return plugin.rfind(std::string("Lynx") + what, 0) == 0; }
  bool produced() const { return makes("Norm") || makes("Gelu") || makes("Gated"); }
};

// One row in e4m3: codes, and what they are worth.
struct Fp8Row {
  std::vector<uint8_t> codes;
  std::vector<double> values;  // with the scale
  float scale;
};

inline Fp8Row round_row(const std::vector<double>& row, const std::vector<bool>& keep) {
  float largest = 0.0f;
  for (const double value : row) largest = std::max(largest, std::fabs(float(value)));
  const Fp8Scale scale = fp8_scale(largest);
  Fp8Row out{{}, {}, scale.scale};
  for (size_t k = 0; k < row.size(); ++k) {
    const float kept = keep[k] ? float(row[k]) : 0.0f;
    out.codes.push_back(e4m3_of(kept * scale.inverse));
    out.values.push_back(reference::e4m3_value(out.codes.back()) * double(scale.scale));
  }
  return out;
}

// The two largest of every four, the first of equals.
inline std::vector<bool> kept_of(const std::vector<double>& row) {
  std::vector<bool> keep(row.size(), false);
  for (size_t group = 0; group < row.size(); group += 4) {
    const std::array<double, 4> sizes{std::fabs(row[group]), std::fabs(row[group + 1]),
                                      std::fabs(row[group + 2]), std::fabs(row[group + 3])};
    for (const int position : reference::kept_positions(sizes)) keep[group + size_t(position)] = true;
  }
  return keep;
}

// The weight's inputs, as ops/fp8.py packs them.
struct Fp8Weight {
  HostTensor values, metadata;  // metadata: of a 2:4 one
  HostTensor scale;
};

inline HostTensor words_of(std::vector<int64_t> dims, const std::vector<uint8_t>& codes) {
  HostTensor out{DataType::kINT32, std::move(dims), std::vector<char>(codes.size())};
  std::memcpy(out.bytes.data(), codes.data(), codes.size());
  return out;
}

inline Fp8Weight pack(const std::vector<Fp8Row>& rows, const std::vector<std::vector<bool>>& keep,
                      bool sparse) {
  const auto count = int64_t(rows.size()), channels = int64_t(rows[0].codes.size());
  const int64_t width = fp8_width(channels), padded = sparse ? padded_rows(count) : count;
  const int64_t columns = sparse ? width / 2 : width;
  std::vector<uint8_t> codes(size_t(padded * columns), 0);
  std::vector<uint8_t> nibbles(sparse ? size_t(padded * width / 8) : 0, 0x44);
  std::vector<float> scales;
  for (int64_t n = 0; n < count; ++n) {
    const Fp8Row& row = rows[size_t(n)];
    scales.push_back(row.scale);
    if (!sparse) std::copy(row.codes.begin(), row.codes.end(), codes.begin() + n * columns);
    for (int64_t group = 0; sparse && group < channels / 4; ++group) {
      int nibble = 0, found = 0;
      for (int position = 0; position < 4; ++position) {
        if (!keep[size_t(n)][size_t(4 * group + position)]) continue;
        codes[size_t(n * columns + 2 * group + found)] = row.codes[size_t(4 * group + position)];
        nibble |= position << (2 * found++);
      }
      // [width / 128, padded, 16 bytes]: the groups of 128 channels, two to a byte
      uint8_t& byte = nibbles[size_t((group / 32 * padded + n) * 16 + group % 32 / 2)];
      byte = uint8_t((byte & ~(15 << 4 * (group % 2))) | nibble << 4 * (group % 2));
    }
  }
  HostTensor scale{DataType::kFLOAT, {count}, std::vector<char>(size_t(count) * 4)};
  std::memcpy(scale.bytes.data(), scales.data(), scale.bytes.size());
  return {words_of({padded, columns / 4}, codes), words_of({width / 128, padded, 4}, nibbles), scale};
}

// What makes x, as the cases in 16 bits have it.
inline SparseLinearCase producer_of(const Fp8Case& c) {
  SparseLinearCase like;
  like.type = c.type, like.batch = c.batch, like.length = c.length;
  like.channels = c.channels, like.rms = c.rms, like.halves = c.halves;
  if (c.makes("Norm")) like.plugin = "LynxNormSparseLinear";
  if (c.makes("Gelu")) like.plugin = "LynxGeluSparseLinear", like.producer_activation = 1;
  if (c.makes("Gated")) like.plugin = "LynxGatedSparseLinear", like.producer_activation = 3;
  if (c.producer_activation) like.producer_activation = c.producer_activation;
  return like;
}

inline std::string fp8_title(const Fp8Case& c) {
  return c.plugin + (c.type == DataType::kBF16 ? " bf16 " : " fp16 ") + std::to_string(c.batch * c.length) +
         " x " + std::to_string(c.channels) + " -> " + std::to_string(c.out_channels) +
         (c.prune ? ", 2:4 x" : "") + (c.rms ? ", RMS" : "") +
         (c.producer_activation ? ", of activation " + std::to_string(c.producer_activation) : "") +
         (c.halves ? ", halves " + std::to_string(c.halves) : "") + epilogue_name(c.epilogue);
}

// `unpruned` is what y would be without producer and pruning, or where there is neither, without rounding.
inline Problem fp8_linear(const Fp8Case& c) {
  std::mt19937 random(unsigned(c.channels + 3 * c.out_channels + 7 * c.length));
  std::normal_distribution<double> normal;
  const int64_t rows = c.batch * c.length;
  const bool norm = c.makes("Norm"), gated = c.makes("Gated");
  const SparseLinearCase producer = producer_of(c);
  const double deviation = 1.0 / std::sqrt(double(c.channels)), epsilon = 1e-6;
  Values x(c.type, {c.batch, c.length, c.channels}), bias(c.type, {c.out_channels});
  x.fill([&](int64_t i) {
    if (!c.produced()) return normal(random) * (1.0 + double(i / c.channels % 5));
    // GELU: by groups, so that it changes the order of sizes in half of them; SiLU: positive.
    const bool negative = norm ? random() % 2 : c.makes("Gelu") && i / 4 % 2;
    return (negative ? -1.0 : 1.0) * separated(random, i % c.channels, i / c.channels);
  });
  bias.fill([&](int64_t) { return normal(random); });
  Values first(c.type, {c.batch, norm ? 1 : gated ? c.length : 0, c.channels});  // gain, or the gate
  Values second(c.type, {c.batch, norm ? 1 : 0, c.channels});                    // shift
  // A gate of both signs: GELU and SiLU leave large numbers nearly as they are.
  first.fill([&](int64_t i) { return (gated && i % 2 ? -1.0 : 1.0) * (1.0 + 0.05 * normal(random)); });
  second.fill([&](int64_t) { return 0.05 * normal(random); });

  std::vector<std::vector<double>> dense;
  std::vector<std::vector<bool>> keep;
  std::vector<Fp8Row> weight;
  for (int64_t n = 0; n < c.out_channels; ++n) {
    dense.emplace_back();
    for (int64_t k = 0; k < c.channels; ++k) dense.back().push_back(deviation * normal(random));
    keep.push_back(c.sparse_weight() ? kept_of(dense.back()) : std::vector<bool>(dense[0].size(), true));
    weight.push_back(round_row(dense.back(), keep.back()));
  }
  const Fp8Weight packed = pack(weight, keep, c.sparse_weight());

  Problem out;
  out.plugin = c.plugin, out.title = fp8_title(c);
  out.attributes = {{"activation", double(c.epilogue.activation)},
                    {"activation_from", double(c.epilogue.from)},
                    {"gated", double(c.epilogue.gated)}};
  const int64_t behind = c.out_channels - c.epilogue.from;
  out.out_channels = c.epilogue.gated ? c.epilogue.from + behind / 2 : c.out_channels;
  if (c.sparse_weight()) out.attributes["out_channels"] = double(c.out_channels);
  if (!c.sparse_weight()) out.attributes["prune"] = double(c.prune);
  if (norm) out.attributes["rms"] = double(c.rms), out.attributes["epsilon"] = epsilon;
  if (c.produced() && !norm) out.attributes["producer_activation"] = double(producer.producer_activation);
  if (gated) out.attributes["halves"] = double(c.halves);
  const HostTensor both = c.halves ? halves_of(producer, x, first).tensor() : HostTensor();
  out.inputs = {c.halves ? both : x.tensor(), packed.values};
  if (c.sparse_weight()) out.inputs.push_back(packed.metadata);
  out.inputs.push_back(packed.scale), out.inputs.push_back(bias.tensor());
  if (norm || gated) out.inputs.push_back(c.halves ? both : first.tensor());
  if (norm) out.inputs.push_back(second.tensor());

  const reference::Rounding& type = rounding(c.type);
  for (int64_t m = 0; m < rows; ++m) {
    std::vector<double> z = producer_row(producer, x, first, second, m, m / c.length, epsilon), raw;
    for (double& value : z) value = type[type.nearest(float(value))];
    for (int64_t k = 0; k < c.channels; ++k) raw.push_back(x[m * c.channels + k]);
    const Fp8Row token = round_row(z, c.prune ? kept_of(z) : std::vector<bool>(z.size(), true));
    const bool plain = !c.produced() && !c.prune;
    const std::vector<double> other = plain ? z : round_row(raw, std::vector<bool>(raw.size(), true)).values;
    std::vector<reference::Near> due, dense_due;
    for (int64_t n = 0; n < c.out_channels; ++n) {
      double y = bias[n], unpruned = bias[n], square = 0.0;
      for (size_t k = 0; k < z.size(); ++k) {
        const double term = token.values[k] * weight[size_t(n)].values[k];
        y += term, square += term * term;
        unpruned += other[k] * (plain ? dense[size_t(n)][k] : weight[size_t(n)].values[k]);
      }
      // The tensor cores' short sums, cut off after every 32 channels; and what else a producer rounds up
      // where we round down, above all of the largest, which scales all the others.
      const double sums = 0x1p-7 + 0x1p-15 * double(c.channels / 32);
      const double error = (sums + (c.produced() ? 0.1 : 0.0)) * std::sqrt(square) + 1e-6;
      due.push_back({y, error}), dense_due.push_back({unpruned, 0.0});
    }
    out.add(reference::stored(reference::finish(due, c.epilogue), roundoff(c.type)),
            reference::finish(dense_due, c.epilogue));
  }
  return out;
}

inline std::vector<Problem> fp8_problems_of(const std::string& plugin) {
  std::vector<Problem> out;
  for (const DataType type : {DataType::kBF16, DataType::kHALF}) {
    Fp8Case c;
    c.plugin = plugin, c.type = type;
    out.push_back(fp8_linear(c));
    Fp8Case long_one = c;  // long enough for stream-K
    long_one.channels = 8256, long_one.out_channels = 200, long_one.length = 5;
    long_one.rms = c.makes("Norm");
    out.push_back(fp8_linear(long_one));
    Fp8Case other = c;  // producers in their other forms
    other.producer_activation = c.makes("Norm") ? 0 : 2, other.halves = c.makes("Gated") ? 2 : 0;
    if (c.makes("Gelu") || c.makes("Gated")) out.push_back(fp8_linear(other));
    other = c, other.halves = 1;
    if (c.makes("Gated")) out.push_back(fp8_linear(other));
    Fp8Case behind = c;
    behind.out_channels = 136, behind.length = 1, behind.epilogue = {1, 64, false};
    out.push_back(fp8_linear(behind));
    Fp8Case gated = c;
    gated.out_channels = 224, gated.epilogue = {3, 64, true};
    out.push_back(fp8_linear(gated));
    if (!c.produced()) {
      behind.epilogue.activation = 2;
      out.push_back(fp8_linear(behind));
      for (const int activation : {1, 2}) {
        gated.epilogue = {activation, 0, true};
        out.push_back(fp8_linear(gated));
      }
    }
    if (c.sparse_weight()) continue;
    c.prune = true;
    out.push_back(fp8_linear(c));
    gated.prune = true;
    out.push_back(fp8_linear(gated));
    long_one.prune = true;
    out.push_back(fp8_linear(long_one));
  }
  return out;
}

}  // namespace lynx::test
