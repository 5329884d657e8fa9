// SPDX-License-Identifier: Apache-2.0
// Runs the pruning kernels, device code as it is, on the CPU (emulation/) and holds every byte they leave
// against reference.h: kept values, metadata words of both layouts, padding and the extension exactly; the
// row scale and U = T / s, whose float32 sums may be taken in any order, within what such a sum can be off a
// float64 one, and U then within that one rounding. Needs g++ alone.
//
//   emulation_test           all cases; exit 1 when one fails
//   emulation_test --quick   a selection, and stops at the first failure: for plugins/tests/mutations.py
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulation/emulation.h"
#include "emulation/sparse_gemm.h"
#include "kernels/sparse24.h"
#include "kernels/sparse_linear.h"
#include "kernels/tile_config.h"
#include "reference.h"

namespace {

using emulation::Guarded;
using emulation::Schedule;
using lynx::DType;
using lynx::Kernels;

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
  Kernels kernels = Kernels::kSm80;
  DType dtype = DType::kBf16;
  int rows = 70, channels = 192, rank = 16;
  bool norm_scale = true, order = false, centre = false, saliency = false;
  Special special = Special::kNone;

  int64_t rows_padded() const { return (rows + 63) / 64 * 64; }
  int64_t width() const { return (channels + 2 * rank + 63) / 64 * 64; }
  const reference::Rounding& value() const {
    return dtype == DType::kBf16 ? reference::bf16() : reference::fp16();
  }

  std::string name() const {
    static const char* const kSpecial[] = {"",       ", ties",       ", zero rows", ", infinities",
                                           ", NaNs", ", subnormals", ", huge",      ", any bits"};
    return std::string(kernels == Kernels::kSm90 ? "wgmma.sp " : "mma.sp ") +
           (dtype == DType::kBf16 ? "bf16 " : "fp16 ") + std::to_string(rows) + " x " +
           std::to_string(channels) + ", rank " + std::to_string(rank) + (norm_scale ? ", norm scale" : "") +
           (order ? ", order" : "") + (centre ? ", centre" : "") + (saliency ? ", saliency" : "") +
           kSpecial[int(special)];
  }
};

using Halves = std::vector<uint16_t>;

struct Inputs {
  Halves x, lora_down, centre, saliency;
  std::vector<int32_t> order;
};

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
  in.centre = normal_values(random, c.channels, 0.5f, value);
  in.saliency = normal_values(random, c.channels, 0.5f, value);  // the kernels take its magnitude
  if (c.special == Special::kAnything) {
    for (uint16_t& each : in.saliency) each = any_bits(random, value);
  }
  in.order.resize(size_t(c.channels));
  std::iota(in.order.begin(), in.order.end(), 0);
  std::shuffle(in.order.begin(), in.order.end(), random);
  return in;
}

// ---- Expectations ----

struct Range {
  double low, high;  // of what is expected; both NaN where a NaN is

  bool holds(double found) const {
    if (std::isnan(low)) return std::isnan(found);
    return low <= found && found <= high;
  }
};

struct Expected {
  Halves reordered;               // [rows, channels]
  Halves values;                  // [rows_padded, width / 2], U left 0
  Halves metadata;                // [rows_padded, width / 16], as the layout deals them
  std::vector<Range> scale;       // [rows_padded]
  std::vector<double> t, t_size;  // [rows, rank]: T, and the sum of its terms' magnitudes
};

// Around a sum of non-negative terms taken in float32 in any order: `steps` roundings of the total at most,
// and one of each term, which may be subnormal. A float32 sum overflows to infinity.
Range float_sum(double sum, int64_t steps) {
  const double relative = double(steps) * 0x1p-24, absolute = double(steps) * 0x1p-149;
  return {double(float(sum * (1.0 - relative) - absolute)), double(float(sum * (1.0 + relative) + absolute))};
}

Range expected_scale(double all, double kept, int64_t terms) {
  const Range above = float_sum(all, terms), below = float_sum(kept, terms);
  const auto scale = [](double a, double b) {
    return std::sqrt(std::max(a, 0.0) / (std::max(b, 0.0) + 1e-8));
  };
  return {scale(above.low, below.high) * (1.0 - 0x1p-22), scale(above.high, below.low) * (1.0 + 0x1p-22)};
}

int64_t metadata_index(const Case& c, int64_t m, int64_t block) {
  return c.kernels == Kernels::kSm90 ? reference::sm90_index(m, block, c.rows_padded(), lynx::kAtomWidthSm90)
                                     : reference::sm80_index(m, block, c.rows_padded());
}

// z of row m; zeros beyond the last row.
Halves expected_z(const Case& c, const Inputs& in, int64_t m) {
  const reference::Rounding& value = c.value();
  Halves z(static_cast<size_t>(c.channels));
  if (m >= c.rows) return z;
  for (size_t k = 0; k < z.size(); ++k) {
    const size_t from = c.order ? size_t(in.order[k]) : k;
    z[k] = in.x[size_t(m) * z.size() + from];
    if (c.centre) z[k] = value.nearest(float(value[z[k]] - value[in.centre[k]]));
  }
  return z;
}

// Keeps 2 of group `group` of row m; adds the squares of what is kept.
void expect_group(const Case& c, const Inputs& in, const Halves& z, int64_t m, int64_t group, Expected& out,
                  double& kept_squares) {
  const reference::Rounding& value = c.value();
  std::array<double, 4> score;
  for (size_t i = 0; i < 4; ++i) {
    const size_t k = size_t(4 * group) + i;
    score[i] = std::fabs(value[z[k]]);
    if (c.saliency) score[i] = double(float(score[i] * std::fabs(value[in.saliency[k]])));
  }
  const auto kept = reference::kept_positions(score);
  for (size_t i = 0; i < 2; ++i) {
    const uint16_t bits = z[size_t(4 * group + kept[i])];
    out.values[size_t(m * c.width() / 2 + 2 * group) + i] = bits;
    kept_squares += value[bits] * value[bits];
  }
  uint16_t& metadata = out.metadata[size_t(metadata_index(c, m, group / 4))];
  const auto shift = 4 * (group % 4);
  metadata = uint16_t((metadata & ~(15 << shift)) | (kept[0] | kept[1] << 2) << shift);
}

Expected expect(const Case& c, const Inputs& in) {
  const reference::Rounding& value = c.value();
  Expected out;
  out.values.assign(size_t(c.rows_padded() * c.width() / 2), 0);
  out.metadata.assign(size_t(c.rows_padded() * c.width() / 16), 0x4444);
  const double padded_scale = c.norm_scale ? 0.0 : 1.0;
  out.scale.assign(size_t(c.rows_padded()), {padded_scale, padded_scale});
  for (int64_t m = 0; m < c.rows_padded(); ++m) {
    const Halves z = expected_z(c, in, m);
    double all = 0.0, kept = 0.0;
    for (const uint16_t bits : z) all += value[bits] * value[bits];
    for (int64_t group = 0; group < c.channels / 4; ++group) expect_group(c, in, z, m, group, out, kept);
    if (m >= c.rows) continue;
    if (c.norm_scale) out.scale[size_t(m)] = expected_scale(all, kept, c.channels);
    for (size_t j = 0; j < size_t(c.rank); ++j) {
      double t = 0.0, size = 0.0;
      for (size_t k = 0; k < z.size(); ++k) {
        const double term = value[z[k]] * value[in.lora_down[j * z.size() + k]];
        t += term, size += std::fabs(term);
      }
      out.t.push_back(t), out.t_size.push_back(size);
    }
    for (int k = 0; c.order && k < c.channels; ++k) {
      out.reordered.push_back(in.x[size_t(m * c.channels + in.order[size_t(k)])]);
    }
  }
  return out;
}

// U[m, j] under the scale that was found. Tensor cores round at most once per 16 terms, and the warps' sums
// are added.
Range expected_u(const Case& c, const Expected& wanted, int64_t m, int64_t j, float scale) {
  if (!(scale > 0.0f)) return {0.0, 0.0};
  const double t = wanted.t[size_t(m * c.rank + j)], size = wanted.t_size[size_t(m * c.rank + j)];
  if (!std::isfinite(t)) return {t / double(scale), t / double(scale)};
  const double roundings = double(c.channels / 16 + 16);
  const double error = roundings * (0x1p-24 * size + 0x1p-149);
  const auto rounded = [&](double value) {
    return c.value()[c.value().nearest(float(value / double(scale)))];
  };
  return {rounded(t - error), rounded(t + error)};
}

// ---- The kernels ----

// What a launch left, byte by byte.
struct Found {
  Halves reordered, values, metadata;
  std::vector<float> scale;

  bool same_bytes(const Found& other) const {
    return reordered == other.reordered && values == other.values && metadata == other.metadata &&
           std::memcmp(scale.data(), other.scale.data(), scale.size() * sizeof(float)) == 0;
  }
};

template <class T>
std::unique_ptr<Guarded> input(const char* name, const std::vector<T>& values, bool there = true) {
  if (!there || values.empty()) return nullptr;
  auto out = std::make_unique<Guarded>(name, values.size() * sizeof(T));
  out->set(values.data());
  return out;
}

template <class T>
std::vector<T> contents(const Guarded& from) {
  std::vector<T> out(from.bytes() / sizeof(T));
  std::memcpy(out.data(), from.data(), from.bytes());
  return out;
}

const void* address(const std::unique_ptr<Guarded>& buffer) { return buffer ? buffer->data() : nullptr; }

// Runs launch_prune under a schedule, its outputs filled with `fill` before; returns what went wrong.
std::string prune(const Case& c, const Inputs& in, Schedule schedule, int fill, Found& found) {
  emulation::schedule = schedule;
  const auto x = input("x", in.x), lora_down = input("lora_down", in.lora_down);
  const auto order = input("order", in.order, c.order), centre = input("centre", in.centre, c.centre);
  const auto saliency = input("saliency", in.saliency, c.saliency);
  const size_t elements = size_t(c.rows_padded() * c.width());
  Guarded values("values", elements), metadata("metadata", elements / 8);
  Guarded scale("scale", size_t(c.rows_padded()) * sizeof(float));
  Guarded reordered("reordered", c.order ? in.x.size() * 2 : 0);
  for (Guarded* out : {&values, &metadata, &scale, &reordered}) out->fill(fill);

  lynx::SparseLinearParams params = {};
  params.dtype = c.dtype, params.rows = c.rows, params.channels = c.channels, params.rank = c.rank;
  params.norm_scale = c.norm_scale;
  params.x = address(x), params.lora_down = address(lora_down);
  params.order = static_cast<const int32_t*>(address(order));
  params.centre = address(centre), params.saliency = address(saliency);
  const lynx::CompressedOperand operand = {values.data(), static_cast<uint32_t*>(metadata.data()),
                                           static_cast<float*>(scale.data()), reordered.data(), c.kernels};
  if (lynx::launch_prune(params, operand, nullptr) != cudaSuccess) return emulation::error;
  for (const Guarded* out : {&values, &metadata, &scale, &reordered}) {
    if (!out->intact()) return "bytes around an output were written";
  }
  found = {contents<uint16_t>(reordered), contents<uint16_t>(values), contents<uint16_t>(metadata),
           contents<float>(scale)};
  return "";
}

std::string place(int64_t m, int64_t k) { return "[" + std::to_string(m) + "," + std::to_string(k) + "]"; }

// What is wrong with the bytes, "" when nothing is.
std::string compare(const Case& c, const Expected& wanted, const Found& found) {
  if (c.order && found.reordered != wanted.reordered) return "x[:, order] differs";
  for (size_t m = 0; m < wanted.scale.size(); ++m) {
    if (!wanted.scale[m].holds(double(found.scale[m]))) {
      return "scale[" + std::to_string(m) + "] is " + std::to_string(found.scale[m]) + ", not within " +
             std::to_string(wanted.scale[m].low) + " .. " + std::to_string(wanted.scale[m].high);
    }
  }
  const int64_t half_width = c.width() / 2;
  for (int64_t m = 0; m < c.rows_padded(); ++m) {
    for (int64_t k = 0; k < half_width; ++k) {
      const uint16_t bits = found.values[size_t(m * half_width + k)];
      const int64_t j = k - c.channels / 2;  // rank
      if (m < c.rows && j >= 0 && j < c.rank) {
        const Range u = expected_u(c, wanted, m, j, found.scale[size_t(m)]);
        if (!u.holds(c.value()[bits])) {
          return "U" + place(m, j) + " is " + std::to_string(c.value()[bits]) + ", not within " +
                 std::to_string(u.low) + " .. " + std::to_string(u.high);
        }
      } else if (bits != wanted.values[size_t(m * half_width + k)]) {
        return "value " + place(m, k) + " differs";
      }
    }
    for (int64_t block = 0; block < c.width() / 16; ++block) {
      const auto at = size_t(metadata_index(c, m, block));
      if (found.metadata[at] != wanted.metadata[at])
        return "metadata of row, block " + place(m, block) + " differ";
    }
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

// ---- The whole op on the host ----

// A workspace of just workspace_bytes, no matter how it is divided, takes the whole op; y is what the operand
// in it, read as the tensor cores do, gives.
void run_workspace() {
  Case c;
  c.order = c.centre = true, c.kernels = emulation::kernels = Kernels::kSm90;
  const Inputs in = make_inputs(c);
  const reference::Rounding& value = c.value();
  constexpr int kOutChannels = 24;
  std::mt19937 random(3);
  Halves weight = normal_values(random, kOutChannels * c.width(), 0.1f, value);
  const Halves bias = normal_values(random, kOutChannels, 1.0f, value);
  emulation::schedule = Schedule::kForward;
  const auto x = input("x", in.x), lora_down = input("lora_down", in.lora_down), w = input("weight", weight),
             b = input("bias", bias), order = input("order", in.order), centre = input("centre", in.centre);
  Guarded workspace("workspace", lynx::workspace_bytes(c.rows, c.channels, c.rank, true));
  Guarded y("y", size_t(c.rows) * kOutChannels * 2);
  workspace.fill(0xff), y.fill(0xff);
  lynx::SparseLinearParams params = {};
  params.dtype = c.dtype, params.rows = c.rows, params.channels = c.channels, params.rank = c.rank;
  params.out_channels = kOutChannels, params.norm_scale = c.norm_scale;
  params.x = x->data(), params.weight = w->data(), params.lora_down = lora_down->data(),
  params.bias = b->data();
  params.order = static_cast<const int32_t*>(order->data()), params.centre = centre->data();
  params.y = y.data(), params.workspace = workspace.data();
  std::string wrong;
  if (lynx::launch_sparse_linear(params, nullptr) != cudaSuccess) wrong = "refused: " + emulation::error;

  const auto refused = [&](cudaError_t due, const std::function<void(lynx::SparseLinearParams&)>& spoil) {
    lynx::SparseLinearParams spoilt = params;
    spoil(spoilt);
    if (wrong.empty() && lynx::launch_sparse_linear(spoilt, nullptr) != due) wrong = "takes a wrong argument";
  };
  const Found whole = {Halves(), contents<uint16_t>(y), Halves(), {}};
  using Params = lynx::SparseLinearParams;
  refused(cudaErrorInvalidValue, [](Params& p) { p.rank = 24; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.rank = 144; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.channels = 200; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.channels = lynx::kMaxOrderedChannels + 16; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.out_channels = 12; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.rows = 0; });
  refused(cudaErrorInvalidValue, [](Params& p) { p.y = nullptr; });
  refused(cudaErrorMisalignedAddress, [](Params& p) { p.x = static_cast<const char*>(p.x) + 2; });
  if (wrong.empty() && contents<uint16_t>(y) != whole.values) wrong = "a refused call wrote y";

  // The same operand from buffers of its own gives y.
  Found apart;
  if (wrong.empty()) wrong = prune(c, in, Schedule::kForward, 0xff, apart);
  const lynx::CompressedOperand operand =
      lynx::compressed_operand(workspace.data(), c.rows, c.channels, c.rank, c.kernels);
  if (wrong.empty() &&
      (std::memcmp(operand.values, apart.values.data(), apart.values.size() * 2) != 0 ||
       std::memcmp(operand.metadata, apart.metadata.data(), apart.metadata.size() * 2) != 0 ||
       std::memcmp(operand.scale, apart.scale.data(), apart.scale.size() * 4) != 0 ||
       std::memcmp(operand.reordered, apart.reordered.data(), apart.reordered.size() * 2) != 0)) {
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
    add([=](Case& c) { c.rank = rank, c.rows = 5, c.channels = 528, c.centre = c.saliency = true; });
  }
  for (int flags = 1; flags < 8; ++flags) {
    add([=](Case& c) {
      c.rank = flags % 2 ? 64 : 0, c.order = flags & 1, c.centre = flags & 2, c.saliency = flags & 4;
    });
  }
  for (const int rows : {1, 8, 9, 16, 17, 63, 64, 65, 129})
    add([=](Case& c) { c.rows = rows, c.order = true; });
  for (const int channels : {16, 32, 48, 64, 80, 208, 512, 1040}) {
    add([=](Case& c) { c.channels = channels, c.rows = 20, c.rank = 32, c.order = true; });
    add([=](Case& c) { c.channels = channels, c.rows = 20, c.rank = 0; });
  }
  for (const Special special : {Special::kTies, Special::kZeroRows, Special::kInfinity, Special::kNan,
                                Special::kSubnormal, Special::kHuge, Special::kAnything}) {
    for (int flags = 0; flags < 4; ++flags) {
      add([=](Case& c) {
        c.special = special, c.rows = 40, c.rank = special == Special::kHuge ? 0 : 16;
        c.norm_scale = flags & 1, c.saliency = flags & 2;
        c.order = c.centre = flags == 3;
      });
    }
  }
  add([](Case& c) { c.rows = 3, c.channels = lynx::kMaxOrderedChannels, c.rank = 16, c.order = true; });
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
  add([](Case& c) { c.rank = 48, c.rows = 20, c.channels = 1040, c.order = c.centre = c.saliency = true; });
  add([](Case& c) { c.rank = 128, c.rows = 5, c.norm_scale = false, c.centre = true; });
  add([](Case& c) { c.rows = 9, c.order = true, c.special = Special::kNan; });
  add([](Case& c) { c.rows = 20, c.special = Special::kZeroRows; });
  add([](Case& c) { c.rows = 20, c.saliency = true, c.special = Special::kTies; });
  return cases;
}

std::vector<Case> random_cases(int count) {
  std::mt19937 random(17);
  const auto below = [&](int bound) { return int(random() % unsigned(bound)); };
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) {
    Case c;
    c.rows = 1 + below(130), c.channels = 16 * (1 + below(40)), c.rank = 16 * below(9);
    c.norm_scale = below(2), c.order = below(2), c.centre = below(2), c.saliency = below(2);
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
  for (const Kernels kernels : {Kernels::kSm80, Kernels::kSm90}) {
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      for (Case c : cases) {
        c.kernels = kernels, c.dtype = dtype;
        run_case(c);
      }
    }
  }
  run_workspace();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
