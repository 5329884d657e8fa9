// SPDX-License-Identifier: Apache-2.0
// Runs the pruning kernels, device code as it is, on the CPU (emulation/) and holds every byte they leave
// against reference.h: kept values, metadata words of both layouts, padding and the extension exactly; the
// row scale and U = T / s, whose float32 sums may be taken in any order, within what such a sum can be off a
// float64 one, and U then within one rounding of that. Behind a producer (norm, GELU, gate) z itself is only
// known to such a range: then what was kept must be possible for some z in it. Needs g++ alone.
//
//   emulation_test           all cases; exit 1 when one fails
//   emulation_test --quick   a selection in bf16, and stops at the first failure: for test_mutations.py
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulation/emulation.h"
#include "kernels/prune_grid.h"
#include "kernels/sparse24.h"
#include "kernels/sparse_linear.h"
#include "kernels/tile_config.h"
#include "reference.h"

namespace {

using emulation::Buffer;
using emulation::Schedule;
using lynx::DType;
using lynx::InstructionSet;
using lynx::Producer;

int passed = 0, failed = 0;
bool quick = false;

void report(const std::string& wrong, const std::string& name) {
  std::printf("%s %s%s%s\n", wrong.empty() ? "PASS" : "FAIL", name.c_str(), wrong.empty() ? "" : ": ",
              wrong.c_str());
  ++(wrong.empty() ? passed : failed);
  if (quick && failed) std::exit(1);
}

// ---- Problems ----

// What x is made of, beside normal values.
enum class Special { kNone, kTies, kZeroRows, kInfinity, kNan, kSubnormal, kHuge, kAnything };

struct Case {
  InstructionSet set = InstructionSet::kMmaSp;
  DType dtype = DType::kBf16;
  int rows = 70, channels = 192, rank = 16;
  bool norm_scale = true;
  Special special = Special::kNone;
  Producer producer = Producer::kNone;
  lynx::Activation activation = lynx::Activation::kNone;  // the producer's
  lynx::Halves halves = lynx::Halves::kApart;
  bool rms = false;
  int gain_rows = 1;
  int sm_count = 132;  // few: the tiles take several waves, and those behind the last full one may be shared

  // With the activation that it has as a rule.
  void produce(Producer by) {
    producer = by;
    if (by == Producer::kGelu) activation = lynx::Activation::kGeluTanh;
    if (by == Producer::kGated) activation = lynx::Activation::kSilu;
  }

  int64_t rows_padded() const { return (rows + 63) / 64 * 64; }
  int64_t width() const { return (channels + 2 * rank + 63) / 64 * 64; }
  const reference::Rounding& value() const {
    return dtype == DType::kBf16 ? reference::bf16() : reference::fp16();
  }

  std::string name() const {
    static const char* const kSpecial[] = {"",       ", ties",       ", zero rows", ", infinities",
                                           ", NaNs", ", subnormals", ", huge",      ", any bits"};
    static const char* const kProducer[] = {"", "", ", activated", ", gated"};
    static const char* const kActivation[] = {"", " by GELU", " by GELU (erf)", " by SiLU"};
    static const char* const kHalves[] = {"", ", x first", ", gate first"};
    return traits_of(set).name + std::string(" ") + (dtype == DType::kBf16 ? "bf16 " : "fp16 ") +
           std::to_string(rows) + " x " + std::to_string(channels) + ", rank " + std::to_string(rank) +
           (norm_scale ? ", norm scale" : "") +
           (producer == Producer::kNorm
                ? (rms ? ", RMSNorm, gains " : ", LayerNorm, gains ") + std::to_string(gain_rows)
                : kProducer[int(producer)]) +
           kActivation[int(activation)] + kHalves[int(halves)] + kSpecial[int(special)] +
           (sm_count == 132 ? "" : ", " + std::to_string(sm_count) + " SMs");
  }
};

using Halves = std::vector<uint16_t>;

struct Inputs {
  Halves x, lora_down, gain, shift, gate;
};

constexpr float kEpsilon = 1e-6f;  // of the norms

Halves normal_values(std::mt19937& random, int64_t count, float deviation, const reference::Rounding& value) {
  std::normal_distribution<float> normal(0.0f, deviation);
  Halves out(static_cast<size_t>(count));
  for (uint16_t& each : out) each = value.nearest(normal(random));
  return out;
}

// Any bit pattern; magnitudes below 2^15, so that no sum overflows, and NaNs with one payload: a NaN outranks
// another by its payload where there is no saliency.
uint16_t any_bits(std::mt19937& random, const reference::Rounding& value) {
  const auto bits = uint16_t(random() >> 8);
  const double magnitude = std::fabs(value[bits]);
  if (std::isnan(magnitude)) return uint16_t(0x7fff | (bits & 0x8000));
  return magnitude > 0x1p15 && std::isfinite(magnitude) ? uint16_t(bits & 0xbfff) : bits;
}

void make_special(Halves& x, const Case& c, std::mt19937& random) {
  const reference::Rounding& value = c.value();
  const auto at = [&](int row, int channel) -> uint16_t& {
    return x[size_t(row) * size_t(c.channels) + size_t(channel)];
  };
  const auto somewhere = [&](int row) -> uint16_t& { return at(row, int(random() % unsigned(c.channels))); };
  const auto all_of = [&](int row, const std::function<uint16_t()>& make) {
    for (int k = 0; k < c.channels; ++k) at(row, k) = make();
  };
  for (int row = 0; row < c.rows; ++row) {
    const auto sign = uint16_t(row % 2 ? 0x8000 : 0);
    switch (c.special) {
      case Special::kNone:
        return;
      case Special::kTies:  // few values, both signs, many zeros
        all_of(row, [&] { return value.nearest(float(int(random() % 5) - 2) * 0.5f); });
        break;
      case Special::kSubnormal:
        all_of(row, [&] { return uint16_t(random() & 0x803f); });
        break;
      case Special::kHuge:  // squares overflow float32 in bf16
        all_of(row, [&] { return uint16_t((value.infinity() - 1 - random() % 64) | (random() & 0x8000)); });
        break;
      case Special::kAnything:
        all_of(row, [&] { return any_bits(random, value); });
        break;
      case Special::kZeroRows:
        if (row % 3 == 0) all_of(row, [&] { return uint16_t(random() & 0x8000); });
        break;
      case Special::kInfinity:
        for (int i = 0; row % 3 == 0 && i < c.channels / 8; ++i)
          somewhere(row) = uint16_t(value.infinity() | sign);
        break;
      case Special::kNan:
        for (int i = 0; row % 3 == 0 && i < c.channels / 8; ++i) somewhere(row) = uint16_t(0x7fff | sign);
        break;
    }
  }
}

Inputs make_inputs(const Case& c) {
  std::mt19937 random(unsigned(c.rows + 3 * c.channels + 7 * c.rank + 11 * int(c.special)));
  const reference::Rounding& value = c.value();
  Inputs in;
  in.x = normal_values(random, int64_t(c.rows) * c.channels, 1.0f, value);
  make_special(in.x, c, random);
  in.lora_down =
      normal_values(random, int64_t(c.rank) * c.channels, 1.0f / std::sqrt(float(c.channels)), value);
  in.gain = normal_values(random, int64_t(c.gain_rows) * c.channels, 1.0f, value);
  in.shift = normal_values(random, int64_t(c.gain_rows) * c.channels, 0.3f, value);
  in.gate = normal_values(random, int64_t(c.rows) * c.channels, 1.0f, value);
  return in;
}

// ---- Expectations ----

struct Range {
  double low, high;  // of what is expected; both NaN where a NaN is

  bool holds(double found) const {
    if (std::isnan(low)) return std::isnan(found);
    return low <= found && found <= high;
  }
  Range widened(double by) const { return {low - by, high + by}; }
};

Range operator*(Range a, Range b) {
  const double products[] = {a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high};
  if (std::isnan(products[0])) return {NAN, NAN};
  return {*std::min_element(products, products + 4), *std::max_element(products, products + 4)};
}

struct Expected {
  reference::Operand operand;      // U left 0
  std::vector<Range> z;            // [rows, channels], only behind a producer: then the above hold none of it
  std::vector<Range> squares;      // [rows]: their sum over z
  std::vector<double> t, t_error;  // [rows, rank]: T, and how far float32 sums may be off
};

// Around a sum of non-negative terms taken in float32 in any order: `steps` roundings of the total at most,
// and one of each term, which may be subnormal. A float32 sum overflows to infinity.
Range float_sum(Range sum, int64_t steps) {
  const double relative = double(steps) * 0x1p-24, absolute = double(steps) * 0x1p-149;
  return {double(float(sum.low * (1.0 - relative) - absolute)),
          double(float(sum.high * (1.0 + relative) + absolute))};
}

Range expected_scale(Range all, double kept, int64_t terms) {
  const Range above = float_sum(all, terms), below = float_sum({kept, kept}, terms);
  const auto scale = [](double a, double b) {
    return std::sqrt(std::max(a, 0.0) / (std::max(b, 0.0) + 1e-8));
  };
  return {scale(above.low, below.high) * (1.0 - 0x1p-22), scale(above.high, below.low) * (1.0 + 0x1p-22)};
}

int64_t metadata_index(const Case& c, int64_t m, int64_t block) {
  return c.set == InstructionSet::kWgmmaSp
             ? reference::sm90_index(m, block, c.rows_padded(), std::min(lynx::kTilesSm90[0].k, 128))
             : reference::sm80_index(m, block, c.rows_padded());
}

// Roundings that a float32 sum over the channels goes through at most, at the kernels' worst: lanes and warps
// share the channels, tensor cores round once per 16 terms.
double roundings(const Case& c) { return double(c.channels / 16 + 16) * 0x1p-24; }

// z of row m without a producer, to the bit; zeros beyond the last row.
Halves exact_z(const Case& c, const Inputs& in, int64_t m) {
  const auto channels = size_t(c.channels);
  if (m >= c.rows) return Halves(channels);
  const uint16_t* const row = &in.x[size_t(m) * channels];
  return Halves(row, row + channels);
}

// norm(x) of row m before gain and shift, in float32.
std::vector<Range> normalized(const Case& c, const std::vector<double>& x) {
  const double count = double(x.size());
  const auto [mean, squares] = reference::moments(x, c.rms);
  double size = 0.0;
  for (const double each : x) size += c.rms ? 0.0 : std::fabs(each) / count;
  const double mean_error = roundings(c) * size;
  const double variance_error = 2.0 * roundings(c) * squares + mean_error * mean_error;
  const Range scale = {
      (1.0 - 0x1p-22) / std::sqrt(squares + variance_error + double(kEpsilon)),
      (1.0 + 0x1p-22) / std::sqrt(std::max(squares - variance_error, 0.0) + double(kEpsilon))};
  std::vector<Range> out;
  for (const double each : x) {
    const double difference = each - mean;
    out.push_back(Range{difference, difference}.widened(mean_error + 0x1p-23 * std::fabs(difference)) *
                  scale);
  }
  return out;
}

// Row m behind the producer, rounded to the element type.
std::vector<Range> produced_z(const Case& c, const Inputs& in, int64_t m) {
  const reference::Rounding& value = c.value();
  const auto channels = size_t(c.channels), row = size_t(m) * channels;
  const size_t gain_row = size_t(m / (c.rows / c.gain_rows)) * channels;
  std::vector<double> x(channels);
  for (size_t k = 0; k < channels; ++k) x[k] = value[in.x[row + k]];
  std::vector<Range> z(channels);
  if (c.producer == Producer::kNorm) z = normalized(c, x);
  for (size_t k = 0; k < channels; ++k) {
    if (c.producer == Producer::kNorm) {
      const double gain = value[in.gain[gain_row + k]], shift = value[in.shift[gain_row + k]];
      z[k] = z[k] * Range{gain, gain};
      const double error = 0x1p-22 * (std::fabs(z[k].high) + std::fabs(z[k].low) + std::fabs(shift));
      z[k] = Range{z[k].low + shift, z[k].high + shift}.widened(error);
    } else {
      const double activated = reference::activate(int(c.activation), x[k]);
      const double gate = c.producer == Producer::kGated ? value[in.gate[row + k]] : 1.0;
      const double size =
          c.activation == lynx::Activation::kSilu ? activated : x[k];  // GELU: of its two addends
      z[k] = Range{activated * gate, activated * gate}.widened(0x1p-21 * std::fabs(size * gate));
    }
    const auto rounded = [&](double each) { return value[value.nearest(float(each))]; };
    z[k] = {rounded(z[k].low), rounded(z[k].high)};
  }
  return z;
}

// T of a row, and how far the device's may be off.
void expect_t(const Case& c, const Inputs& in, const std::vector<Range>& z, Expected& out) {
  for (size_t j = 0; j < size_t(c.rank); ++j) {
    double t = 0.0, error = double(c.channels) * 0x1p-149;
    for (size_t k = 0; k < z.size(); ++k) {
      const double down = c.value()[in.lora_down[j * z.size() + k]];
      const double term = z[k].low == z[k].high ? z[k].low * down : (z[k].low + z[k].high) / 2.0 * down;
      t += term;
      error += roundings(c) * std::fabs(term) + (z[k].high - z[k].low) / 2.0 * std::fabs(down);
    }
    out.t.push_back(t), out.t_error.push_back(error);
  }
}

Expected expect(const Case& c, const Inputs& in) {
  const auto index = [c](int64_t m, int64_t block, int64_t) { return metadata_index(c, m, block); };
  Expected out{{c.rows_padded(), c.width(), index}, {}, {}, {}, {}};
  for (int64_t m = 0; m < c.rows_padded(); ++m) {
    std::vector<Range> z;
    if (c.producer == Producer::kNone || m >= c.rows) {
      const Halves exact = exact_z(c, in, m);
      for (int64_t group = 0; group < c.channels / 4; ++group) {
        out.operand.set_group(m, group, &exact[size_t(4 * group)], c.value());
      }
      for (const uint16_t bits : exact) z.push_back({c.value()[bits], c.value()[bits]});
    } else {
      z = produced_z(c, in, m);
      out.z.insert(out.z.end(), z.begin(), z.end());
    }
    if (m >= c.rows) continue;
    Range squares = {0.0, 0.0};
    for (const Range& each : z) {
      const bool crosses = each.low < 0.0 && each.high > 0.0;
      const double one = each.low * each.low, other = each.high * each.high;
      squares.low += crosses ? 0.0 : std::min(one, other), squares.high += std::max(one, other);
      if (std::isnan(one)) squares = {NAN, NAN};
    }
    out.squares.push_back(squares);
    expect_t(c, in, z, out);
  }
  return out;
}

// U[m, j] under the scale that was found.
Range expected_u(const Case& c, const Expected& wanted, int64_t m, int64_t j, float scale) {
  if (!(scale > 0.0f)) return {0.0, 0.0};
  const double t = wanted.t[size_t(m * c.rank + j)], error = wanted.t_error[size_t(m * c.rank + j)];
  if (!std::isfinite(t)) return {t / double(scale), t / double(scale)};
  const auto rounded = [&](double value) {
    return c.value()[c.value().nearest(float(value / double(scale)))];
  };
  return {rounded(t - error), rounded(t + error)};
}

// Whether some z within `z` (4 channels) keeps `values` at the positions of `nibble`.
bool possible(const Range* z, int nibble, const double (&values)[2]) {
  const auto magnitude = [](double value) { return std::isnan(value) ? INFINITY : std::fabs(value); };
  const auto least = [&](Range of) {
    return of.low < 0.0 && of.high > 0.0 ? 0.0 : std::min(magnitude(of.low), magnitude(of.high));
  };
  const int kept[2] = {nibble & 3, nibble >> 2};
  if (kept[0] >= kept[1]) return false;
  for (int i = 0; i < 2; ++i) {
    if (!z[kept[i]].holds(values[i])) return false;
    for (int other = 0; other < 4; ++other) {
      if (other == kept[0] || other == kept[1]) continue;
      const double mine = magnitude(values[i]), its = least(z[other]);
      if (other < kept[i] ? its >= mine : its > mine) return false;
    }
  }
  return true;
}

// ---- The kernels ----

// What a launch left, byte by byte.
struct Found {
  Halves values, metadata;
  std::vector<float> scale;

  bool same_bytes(const Found& other) const {
    return values == other.values && metadata == other.metadata &&
           std::memcmp(scale.data(), other.scale.data(), scale.size() * sizeof(float)) == 0;
  }
};

template <class T>
std::unique_ptr<Buffer> input(const char* name, const std::vector<T>& values, bool there = true) {
  if (!there || values.empty()) return nullptr;
  auto out = std::make_unique<Buffer>(name, values.size() * sizeof(T));
  out->set(values.data());
  return out;
}

template <class T>
std::vector<T> contents(const Buffer& from) {
  std::vector<T> out(from.bytes() / sizeof(T));
  std::memcpy(out.data(), from.data(), from.bytes());
  return out;
}

const void* address(const std::unique_ptr<Buffer>& buffer) { return buffer ? buffer->data() : nullptr; }

// Two tensors [rows, channels] as one of twice the channels.
Halves side_by_side(const Case& c, const Halves& left, const Halves& right) {
  Halves out;
  for (int row = 0; row < c.rows; ++row) {
    for (const Halves* each : {&left, &right}) {
      const auto begin = each->begin() + int64_t(row) * c.channels;
      out.insert(out.end(), begin, begin + c.channels);
    }
  }
  return out;
}

// Runs launch_prune under a schedule, its outputs filled with `fill` before; returns what went wrong.
std::string prune(const Case& c, const Inputs& in, Schedule schedule, int fill, Found& found) {
  emulation::schedule = schedule;
  emulation::sm_count = c.sm_count;
  const Halves both =
      c.halves == lynx::Halves::kXFirst ? side_by_side(c, in.x, in.gate) : side_by_side(c, in.gate, in.x);
  const bool apart = c.halves == lynx::Halves::kApart;
  const auto x = input("x", apart ? in.x : both), lora_down = input("lora_down", in.lora_down);
  const bool norm = c.producer == Producer::kNorm;
  const auto gain = input("gain", in.gain, norm), shift = input("shift", in.shift, norm);
  const auto gate = input("gate", apart ? in.gate : both, c.producer == Producer::kGated);
  const size_t elements = size_t(c.rows_padded() * c.width());
  Buffer values("values", elements), metadata("metadata", elements / 8);
  Buffer scale("scale", size_t(c.rows_padded()) * sizeof(float));
  Buffer parts("parts", size_t(lynx::prune_parts_bytes(c.rows_padded(), c.rank)));
  for (Buffer* out : {&values, &metadata, &scale, &parts}) out->fill(fill);

  lynx::SparseLinearParams params = {};
  params.dtype = c.dtype, params.rows = c.rows, params.channels = c.channels, params.rank = c.rank;
  params.norm_scale = c.norm_scale;
  params.x = address(x), params.lora_down = address(lora_down);
  params.producer_activation = c.activation, params.halves = c.halves;
  params.producer = c.producer, params.rms = c.rms, params.epsilon = kEpsilon, params.gain_rows = c.gain_rows;
  params.gain = address(gain), params.shift = address(shift), params.gate = address(gate);
  lynx::CompressedOperand operand = {};
  operand.values = values.data(), operand.metadata = static_cast<uint32_t*>(metadata.data());
  operand.scale = static_cast<float*>(scale.data()), operand.parts = static_cast<float*>(parts.data());
  operand.set = c.set;
  if (lynx::launch_prune(params, operand, nullptr) != cudaSuccess) return emulation::error;
  for (const Buffer* out : {&values, &metadata, &scale, &parts}) {
    if (!out->intact()) return "bytes around an output were written";
  }
  found = {contents<uint16_t>(values), contents<uint16_t>(metadata), contents<float>(scale)};
  return "";
}

std::string place(int64_t m, int64_t k) { return "[" + std::to_string(m) + "," + std::to_string(k) + "]"; }

// The scale of row m: from what was found to be kept.
std::string compare_scale(const Case& c, const Expected& wanted, const Found& found, int64_t m) {
  Range due = {1.0, 1.0};
  if (c.norm_scale) {
    double kept = 0.0;
    for (int64_t k = 0; k < c.channels / 2; ++k) {
      const double value = c.value()[found.values[size_t(m * c.width() / 2 + k)]];
      kept += value * value;
    }
    due = m < c.rows ? expected_scale(wanted.squares[size_t(m)], kept, c.channels) : Range{0.0, 0.0};
  }
  const double scale = double(found.scale[size_t(m)]);
  if (due.holds(scale)) return "";
  return "scale[" + std::to_string(m) + "] is " + std::to_string(scale) + ", not within " +
         std::to_string(due.low) + " .. " + std::to_string(due.high);
}

// The kept values and metadata of row m behind a producer.
std::string compare_produced(const Case& c, const Expected& wanted, const Found& found, int64_t m) {
  for (int64_t group = 0; group < c.channels / 4; ++group) {
    const uint16_t metadata = found.metadata[size_t(metadata_index(c, m, group / 4))];
    const uint16_t* bits = &found.values[size_t(m * c.width() / 2 + 2 * group)];
    if (!possible(&wanted.z[size_t(m * c.channels + 4 * group)], metadata >> (4 * (group % 4)) & 15,
                  {c.value()[bits[0]], c.value()[bits[1]]})) {
      return "what is kept of row, group " + place(m, group) + " cannot be";
    }
  }
  return "";
}

// What is wrong with the bytes of row m, "" when nothing is.
std::string compare_row(const Case& c, const Expected& wanted, const Found& found, int64_t m) {
  const bool produced = c.producer != Producer::kNone && m < c.rows;
  if (produced) {
    const std::string wrong = compare_produced(c, wanted, found, m);
    if (!wrong.empty()) return wrong;
  }
  const int64_t half_width = c.width() / 2;
  for (int64_t k = produced ? c.channels / 2 : 0; k < half_width; ++k) {
    const uint16_t bits = found.values[size_t(m * half_width + k)];
    const int64_t j = k - c.channels / 2;  // rank
    if (m < c.rows && j >= 0 && j < c.rank) {
      const Range u = expected_u(c, wanted, m, j, found.scale[size_t(m)]);
      if (!u.holds(c.value()[bits])) {
        return "U" + place(m, j) + " is " + std::to_string(c.value()[bits]) + ", not within " +
               std::to_string(u.low) + " .. " + std::to_string(u.high);
      }
    } else if (bits != wanted.operand.values[size_t(m * half_width + k)]) {
      return "value " + place(m, k) + " differs";
    }
  }
  for (int64_t block = produced ? c.channels / 16 : 0; block < c.width() / 16; ++block) {
    const auto at = size_t(metadata_index(c, m, block));
    if (found.metadata[at] != wanted.operand.metadata[at])
      return "metadata of row, block " + place(m, block) + " differ";
  }
  return compare_scale(c, wanted, found, m);
}

std::string compare(const Case& c, const Expected& wanted, const Found& found) {
  for (int64_t m = 0; m < c.rows_padded(); ++m) {
    const std::string wrong = compare_row(c, wanted, found, m);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

void run_case(const Case& c) {
  const Inputs in = make_inputs(c);
  const Expected wanted = expect(c, in);
  Found forward, reverse;
  std::string wrong = prune(c, in, Schedule::kForward, 0xff, forward);
  if (wrong.empty()) wrong = compare(c, wanted, forward);
  if (wrong.empty()) wrong = prune(c, in, Schedule::kReverse, 0x5a, reverse);
  if (wrong.empty()) wrong = compare(c, wanted, reverse);
  if (wrong.empty() && !forward.same_bytes(reverse)) wrong = "threads in another order leave other bytes";
  report(wrong, c.name());
}

// ---- Far addresses ----

// As many rows as may be, of which three tiles run: the first, one at an element beyond 2^31, the last. They
// must leave what the same rows leave in a small problem.
void run_far_rows(InstructionSet set) {
  Case near;
  near.set = set, near.rows = 3 * lynx::kPruneRows;
  const Inputs in = make_inputs(near);
  Found wanted;
  std::string wrong = prune(near, in, Schedule::kForward, 0, wanted);

  Case far = near;
  far.rows = int(lynx::kMaxRows);
  const int64_t tiles[] = {0, (int64_t(1) << 31) / (far.channels * lynx::kPruneRows) + 1,
                           far.rows_padded() / lynx::kPruneRows - 1};
  const size_t elements = size_t(far.rows_padded() * far.width());
  Buffer x("x", size_t(far.rows) * size_t(far.channels) * 2), values("values", elements);
  Buffer metadata("metadata", elements / 8), scale("scale", size_t(far.rows_padded()) * sizeof(float));
  const auto lora_down = input("lora_down", in.lora_down);
  const size_t tile_elements = size_t(lynx::kPruneRows) * size_t(far.channels);
  for (size_t i = 0; i < 3; ++i) {
    std::memcpy(static_cast<uint16_t*>(x.data()) + size_t(tiles[i]) * tile_elements, &in.x[i * tile_elements],
                tile_elements * 2);
  }
  lynx::SparseLinearParams params = {};
  params.dtype = far.dtype, params.rows = far.rows, params.channels = far.channels, params.rank = far.rank;
  params.norm_scale = far.norm_scale, params.x = x.data(), params.lora_down = address(lora_down);
  lynx::CompressedOperand operand = {};
  operand.values = values.data(), operand.metadata = static_cast<uint32_t*>(metadata.data());
  operand.scale = static_cast<float*>(scale.data()), operand.set = set;
  emulation::schedule = Schedule::kForward, emulation::sm_count = 132;
  emulation::runs_block = [&](unsigned block) { return std::count(tiles, tiles + 3, int64_t(block)) > 0; };
  if (wrong.empty() && lynx::launch_prune(params, operand, nullptr) != cudaSuccess) wrong = emulation::error;
  emulation::runs_block = nullptr;

  const auto* found_values = static_cast<const uint16_t*>(values.data());
  const auto* found_metadata = static_cast<const uint16_t*>(metadata.data());
  const int64_t half_width = far.width() / 2;
  for (int64_t m = 0; wrong.empty() && m < near.rows; ++m) {
    const int64_t at = tiles[m / lynx::kPruneRows] * lynx::kPruneRows + m % lynx::kPruneRows;
    bool same = std::memcmp(found_values + at * half_width, &wanted.values[size_t(m * half_width)],
                            size_t(half_width) * 2) == 0;
    for (int64_t block = 0; block < far.width() / 16; ++block) {
      same &= found_metadata[metadata_index(far, at, block)] ==
              wanted.metadata[size_t(metadata_index(near, m, block))];
    }
    same &= static_cast<const float*>(scale.data())[at] == wanted.scale[size_t(m)];
    if (!same) wrong = "row " + std::to_string(at) + " differs";
  }
  report(wrong, "tiles beyond 2^31 elements: " + far.name());
}

// ---- The whole op on the host ----

// A workspace of just workspace_bytes, no matter how it is divided, takes the whole op; y is what the operand
// in it, read as the tensor cores do, gives.
void run_workspace() {
  Case c;
  c.set = InstructionSet::kWgmmaSp, emulation::compute_capability = 90;
  const Inputs in = make_inputs(c);
  const reference::Rounding& value = c.value();
  constexpr int kOutChannels = 24;
  std::mt19937 random(3);
  Halves weight = normal_values(random, kOutChannels * c.width(), 0.1f, value);
  const Halves bias = normal_values(random, kOutChannels, 1.0f, value);
  emulation::schedule = Schedule::kForward;
  const auto x = input("x", in.x), lora_down = input("lora_down", in.lora_down), w = input("weight", weight),
             b = input("bias", bias);
  lynx::SparseLinearParams params = {};
  params.dtype = c.dtype, params.rows = c.rows, params.channels = c.channels, params.rank = c.rank;
  params.out_channels = kOutChannels, params.norm_scale = c.norm_scale;
  params.x = x->data(), params.weight = w->data(), params.lora_down = lora_down->data(),
  params.bias = b->data();
  Buffer workspace("workspace", lynx::workspace_bytes(params));
  Buffer y("y", size_t(c.rows) * kOutChannels * 2);
  workspace.fill(0xff), y.fill(0xff);
  params.y = y.data(), params.workspace = workspace.data();
  constexpr int kAnyTile = -1;
  std::string wrong;
  if (lynx::launch_sparse_linear(params, kAnyTile, nullptr) != cudaSuccess)
    wrong = "refused: " + emulation::error;

  const auto refused = [&](cudaError_t due, const std::function<void(lynx::SparseLinearParams&)>& spoil) {
    lynx::SparseLinearParams spoilt = params;
    spoil(spoilt);
    if (wrong.empty() && lynx::launch_sparse_linear(spoilt, kAnyTile, nullptr) != due)
      wrong = "takes a wrong argument";
  };
  const Found whole = {contents<uint16_t>(y), Halves(), {}};
  using Params = lynx::SparseLinearParams;
  refused(cudaErrorInvalidValue, [](Params& p) { p.rank = 24; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.rank = 144; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.channels = 200; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.channels = lynx::kMaxChannels + 64; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.out_channels = 12; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.rows = 0; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.y = nullptr; });
  refused(cudaErrorInvalidValue,
          [](Params& p) { p.activation = lynx::Activation::kGeluErf, p.activation_from = 8; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.producer = Producer::kGated; });  // and no gate
  refused(cudaErrorMisalignedAddress, [](Params& p) { p.x = static_cast<const char*>(p.x) + 2; });
  if (wrong.empty() && contents<uint16_t>(y) != whole.values) wrong = "a refused call wrote y";

  // The same operand from buffers of its own gives y.
  Found apart;
  if (wrong.empty()) wrong = prune(c, in, Schedule::kForward, 0xff, apart);
  const lynx::CompressedOperand operand = lynx::compressed_operand(params, c.set);
  if (wrong.empty() &&
      (std::memcmp(operand.values, apart.values.data(), apart.values.size() * 2) != 0 ||
       std::memcmp(operand.metadata, apart.metadata.data(), apart.metadata.size() * 2) != 0 ||
       std::memcmp(operand.scale, apart.scale.data(), apart.scale.size() * 4) != 0)) {
    wrong = "the parts of the workspace overlap";
  }
  if (wrong.empty() && !workspace.intact()) wrong = "bytes outside the workspace were written";
  report(wrong, "the whole op in a workspace of workspace_bytes, wrong arguments refused");
}

// ---- Cases ----

std::vector<Case> base_cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::function<void(Case&)>& set) {
    cases.emplace_back();
    set(cases.back());
  };
  for (const int rank : {0, 16, 32, 48, 64, 96, 128}) {
    for (const bool norm_scale : {false, true})
      add([=](Case& c) { c.rank = rank, c.norm_scale = norm_scale; });
    add([=](Case& c) { c.rank = rank, c.rows = 5, c.channels = 528; });
  }
  for (const int rows : {1, 8, 9, 16, 17, 63, 64, 65, 129}) add([=](Case& c) { c.rows = rows; });
  for (const int channels : {16, 32, 48, 64, 80, 208, 512, 1040}) {
    add([=](Case& c) { c.channels = channels, c.rows = 20, c.rank = 32; });
    add([=](Case& c) { c.channels = channels, c.rows = 20, c.rank = 0; });
  }
  for (const Special special : {Special::kTies, Special::kZeroRows, Special::kInfinity, Special::kNan,
                                Special::kSubnormal, Special::kHuge, Special::kAnything}) {
    for (const bool norm_scale : {false, true}) {
      add([=](Case& c) {
        c.special = special, c.rows = 40, c.rank = special == Special::kHuge ? 0 : 16;
        c.norm_scale = norm_scale;
      });
    }
  }
  add([](Case& c) { c.rows = 3, c.channels = 24576; });
  // Six of eight tiles in a wave, two behind it that three thread blocks share each; then all tiles shared.
  for (const auto& [rank, sm_count] : {std::pair(0, 2), {32, 2}, {48, 3}, {112, 6}}) {
    for (const int channels : {4112, 4304}) {
      add([=, rank = rank, sm_count = sm_count](Case& c) {
        c.rows = 124, c.channels = channels, c.rank = rank, c.sm_count = sm_count;
      });
    }
    for (const Producer producer : {Producer::kNorm, Producer::kGelu, Producer::kGated}) {
      add([=, rank = rank](Case& c) {
        c.rows = 18, c.channels = 3088, c.rank = rank, c.produce(producer), c.gain_rows = 2;
      });
    }
  }
  for (const Producer producer : {Producer::kNorm, Producer::kGelu, Producer::kGated}) {
    for (const int rank : {0, 16, 32, 48, 128}) {
      add([=](Case& c) { c.produce(producer), c.rank = rank, c.rows = 30, c.gain_rows = rank ? 3 : 1; });
    }
    for (const int channels : {16, 80, 528}) {
      add([=](Case& c) { c.produce(producer), c.channels = channels, c.rows = 17, c.rms = channels != 528; });
    }
    for (const Special special : {Special::kTies, Special::kZeroRows, Special::kNan}) {
      add([=](Case& c) {
        c.produce(producer), c.special = special, c.rows = 20, c.rms = special == Special::kTies;
      });
    }
  }
  for (const lynx::Activation activation : {lynx::Activation::kGeluTanh, lynx::Activation::kGeluErf}) {
    for (const Producer producer : {Producer::kGelu, Producer::kGated}) {
      add([=](Case& c) { c.rows = 30, c.producer = producer, c.activation = activation; });
    }
  }
  for (const lynx::Halves halves : {lynx::Halves::kXFirst, lynx::Halves::kGateFirst}) {
    for (const int channels : {80, 3088}) {  // the latter shared by thread blocks
      add([=](Case& c) {
        c.rows = 20, c.produce(Producer::kGated), c.halves = halves, c.channels = channels;
      });
    }
  }
  return cases;
}

// One of each kind that a fault in the kernels may show in.
std::vector<Case> quick_cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::function<void(Case&)>& set) {
    cases.emplace_back();
    set(cases.back());
  };
  add([](Case&) {});
  add([](Case& c) { c.rank = 0, c.rows = 17, c.channels = 208, c.special = Special::kTies; });
  add([](Case& c) { c.rank = 48, c.rows = 20, c.channels = 1040; });
  add([](Case& c) { c.rank = 128, c.rows = 5, c.norm_scale = false; });
  add([](Case& c) { c.rows = 9, c.special = Special::kNan; });
  add([](Case& c) { c.rows = 20, c.special = Special::kZeroRows; });
  add([](Case& c) { c.rows = 124, c.channels = 4112, c.rank = 32, c.sm_count = 2; });
  add([](Case& c) { c.rows = 20, c.special = Special::kTies; });
  add([](Case& c) { c.rows = 18, c.produce(Producer::kNorm), c.gain_rows = 2; });
  add([](Case& c) { c.rows = 18, c.produce(Producer::kGated), c.rank = 0; });
  add([](Case& c) { c.rows = 18, c.produce(Producer::kGelu), c.channels = 528, c.rank = 32; });
  add([](Case& c) {
    c.rows = 18, c.produce(Producer::kGated), c.halves = lynx::Halves::kGateFirst, c.rank = 0;
  });
  return cases;
}

std::vector<Case> random_cases(int count) {
  std::mt19937 random(17);
  const auto below = [&](int bound) { return int(random() % unsigned(bound)); };
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) {
    Case c;
    c.rows = 1 + below(130), c.channels = 16 * (1 + below(40)), c.rank = 16 * below(9);
    c.norm_scale = below(2);
    c.special = Special(below(6));
    cases.push_back(c);
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  std::vector<Case> cases = quick ? quick_cases() : base_cases();
  if (!quick) {
    for (const Case& c : random_cases(40)) cases.push_back(c);
  }
  for (const lynx::InstructionSetTraits& traits : lynx::kInstructionSets) {
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      if (quick && dtype == DType::kFp16) continue;
      for (Case c : cases) {
        c.set = traits.set, c.dtype = dtype;
        run_case(c);
      }
    }
  }
  run_workspace();
  for (const lynx::InstructionSetTraits& traits : lynx::kInstructionSets) run_far_rows(traits.set);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
