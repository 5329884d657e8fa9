// SPDX-License-Identifier: Apache-2.0
// Runs the pruning pass and the sparse GEMM on a GPU and holds them against reference.h: the operand byte by
// byte, the result within its tolerance. Stand-alone: needs no TensorRT, and no CUDA
// library but the driver.
//
//   device_test            all cases; exit 1 when one fails, 77 when there is no GPU
//   device_test TEXT       only the cases whose name holds TEXT, as for compute-sanitizer
//   device_test --time     all cases, then the times of the two kernels on shapes of FLUX.1
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "kernels/sparse24.h"
#include "kernels/sparse_gemm.h"
#include "kernels/sparse_linear.h"
#include "reference.h"

namespace {

using lynx::test::check;
using lynx::test::Guarded;

int passed = 0, failed = 0;

void report(bool ok, const std::string& name, const std::string& detail = "") {
  std::printf("%s %s%s%s\n", ok ? "PASS" : "FAIL", name.c_str(), detail.empty() ? "" : ": ", detail.c_str());
  std::fflush(stdout);
  ++(ok ? passed : failed);
}

// ---- Problems
// -----------------------------------------------------------------------------------------------

lynx::InstructionSet set;  // under test

const char* set_name() { return lynx::traits_of(set).name; }

enum class Special { kNone, kTies, kZeroRows, kInfinity, kNan };

struct Case {
  lynx::DType dtype = lynx::DType::kBf16;
  int rows = 300, channels = 192, out_channels = 576, rank = 16;
  bool norm_scale = true;
  Special special = Special::kNone;
  int activation = 0, activation_from = 0;

  const reference::Rounding& value() const {
    return dtype == lynx::DType::kBf16 ? reference::bf16() : reference::fp16();
  }

  std::string name() const {
    static const char* const kSpecial[] = {"", ", ties", ", zero rows", ", infinities", ", NaNs"};
    return std::string(dtype == lynx::DType::kBf16 ? "bf16" : "fp16") + " " + std::to_string(rows) + " x " +
           std::to_string(channels) + " -> " + std::to_string(out_channels) + ", rank " +
           std::to_string(rank) + (norm_scale ? ", norm scale" : "") +
           (activation == 0   ? ""
            : activation == 1 ? ", GELU from "
                              : ", GELU by erf from ") +
           (activation == 0 ? "" : std::to_string(activation_from)) + kSpecial[int(special)];
  }
};

// Unit roundoff: half the distance of neighbours, relative.
double roundoff(lynx::DType dtype) { return dtype == lynx::DType::kBf16 ? 0x1p-8 : 0x1p-11; }

using Halves = std::vector<uint16_t>;

// The op's inputs on the host.
struct Inputs {
  Halves x, weight, lora_down, bias;
};

Halves normal_values(std::mt19937& random, size_t count, float deviation, const Case& c) {
  std::normal_distribution<float> normal(0.0f, deviation);
  Halves out(count);
  for (uint16_t& value : out) value = c.value().nearest(normal(random));
  return out;
}

void make_special(Halves& x, const Case& c, std::mt19937& random) {
  const auto at = [&](int row, int channel) -> uint16_t& { return x[size_t(row) * c.channels + channel]; };
  for (int row = 0; row < c.rows; ++row) {
    if (c.special == Special::kTies) {  // few values, both signs, many zeros
      for (int k = 0; k < c.channels; ++k)
        at(row, k) = c.value().nearest(float(int(random() % 5) - 2) * 0.5f);
    } else if (row % 3 != 0) {
      continue;
    } else if (c.special == Special::kZeroRows) {
      for (int k = 0; k < c.channels; ++k) at(row, k) = random() % 2 ? 0x8000 : 0;
    } else if (c.special == Special::kInfinity) {
      at(row, int(random() % c.channels)) = c.value().nearest(row % 2 ? INFINITY : -INFINITY);
    } else if (c.special == Special::kNan) {
      for (int i = 0; i < 4; ++i) at(row, int(random() % c.channels)) = row % 2 ? 0x7fff : 0xffff;
    }
  }
}

Inputs make_inputs(const Case& c) {
  std::mt19937 random(unsigned(c.rows + 3 * c.channels + 5 * c.out_channels + 7 * c.rank));
  const int width = int(lynx::padded_width(c.channels, c.rank));
  Inputs in;
  in.x = normal_values(random, size_t(c.rows) * c.channels, 1.0f, c);
  make_special(in.x, c, random);
  const float deviation = 1.0f / std::sqrt(float(c.channels));
  in.weight = normal_values(random, size_t(c.out_channels) * width, deviation, c);
  for (int n = 0; n < c.out_channels; ++n) {  // B's pairs, zeros elsewhere
    for (int k = c.channels; k < width; ++k) {
      const bool is_b = k < c.channels + 2 * c.rank && (k - c.channels) % 4 < 2;
      if (!is_b) in.weight[size_t(n) * width + k] = 0;
    }
  }
  in.lora_down = normal_values(random, size_t(std::max(c.rank, 1)) * c.channels, deviation, c);
  in.bias = normal_values(random, size_t(c.out_channels), 1.0f, c);
  return in;
}

// ---- Expectations
// -------------------------------------------------------------------------------------------

// What the pruning pass must leave: U, within its tolerance, and all other bytes.
struct Expected {
  reference::Operand operand;  // U left zero
  std::vector<double> scale;   // [rows]
};

reference::Row row_of(const Case& c, const Inputs& in, int m) {
  reference::Row z;
  for (int k = 0; k < c.channels; ++k) z.push_back(c.value()[in.x[size_t(m) * c.channels + k]]);
  return z;
}

Expected expected_operand(const Case& c, const Inputs& in) {
  const auto index = [](int64_t m, int64_t block, int64_t rows) {
    return set == lynx::InstructionSet::kWgmmaSp ? reference::sm90_index(m, block, rows, lynx::kAtomWidthSm90)
                                                 : reference::sm80_index(m, block, rows);
  };
  Expected out{{lynx::padded_rows(c.rows), lynx::padded_width(c.channels, c.rank), index}, {}};
  for (int m = 0; m < c.rows; ++m) {
    for (int group = 0; group < c.channels / 4; ++group) {
      out.operand.set_group(m, group, &in.x[size_t(m) * c.channels + 4 * group], c.value());
    }
    const reference::Row z = row_of(c, in, m);
    out.scale.push_back(c.norm_scale ? reference::norm_scale(z, reference::pruned(z)) : 1.0);
  }
  return out;
}

// One row of the op.
struct ExpectedRow {
  std::vector<reference::Near> u, y;
};

ExpectedRow expected_row(const Case& c, const Inputs& in, const Expected& wanted, int m) {
  const reference::SparseLinear op = {c.value(),        roundoff(c.dtype),
                                      c.channels,       c.out_channels,
                                      c.rank,           lynx::padded_width(c.channels, c.rank),
                                      in.weight.data(), in.lora_down.data(),
                                      in.bias.data(),   {c.activation, c.activation_from, false}};
  const reference::Row z = row_of(c, in, m);
  const double scale = wanted.scale[size_t(m)];
  const std::vector<reference::Near> u = op.low_rank(z, scale);
  return {u, op.y(reference::pruned(z), scale, u)};
}

bool within(double found, double wanted, double tolerance) {
  if (std::isnan(wanted)) return std::isnan(found);
  if (std::isinf(wanted)) return found == wanted;
  return std::fabs(found - wanted) <= tolerance;
}

// Rows to compute in float64: all of a small problem, else the edges and some in between.
std::vector<int> sample_rows(const Case& c) {
  const double work_per_row = double(c.out_channels) * double(lynx::padded_width(c.channels, c.rank));
  const int affordable = std::max(4, int(1.5e8 / work_per_row));
  std::vector<int> rows;
  if (c.rows <= affordable) {
    rows.resize(size_t(c.rows));
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
  }
  std::mt19937 random(unsigned(c.rows));
  rows = {0, c.rows - 1};
  while (int(rows.size()) < affordable) rows.push_back(int(random() % unsigned(c.rows)));
  return rows;
}

// ---- The device

template <class T>
size_t bytes_of(const std::vector<T>& values) {
  return values.size() * sizeof(T);
}

// A problem on the device, with everything a launch needs.
class DeviceProblem {
 public:
  DeviceProblem(const Case& c, const Inputs& in)
      : x(bytes_of(in.x)),
        y(size_t(c.rows) * c.out_channels * 2),
        workspace(lynx::workspace_bytes(sizes_of(c))),
        case_(c),
        weight_(bytes_of(in.weight)),
        lora_down_(bytes_of(in.lora_down)),
        bias_(bytes_of(in.bias)) {
    x.set(in.x), weight_.set(in.weight), lora_down_.set(in.lora_down), bias_.set(in.bias);
  }

  lynx::SparseLinearParams params() const {
    lynx::SparseLinearParams p = sizes_of(case_);
    p.x = x.data(), p.weight = weight_.data(), p.lora_down = lora_down_.data(), p.bias = bias_.data();
    p.y = y.data(), p.workspace = workspace.data();
    return p;
  }

  lynx::CompressedOperand operand() const { return lynx::compressed_operand(params(), set); }

  Halves result() const { return y.copy<uint16_t>(); }

  bool intact() const {
    for (const Guarded* part : {&x, &y, &workspace, &weight_, &lora_down_, &bias_}) {
      if (!part->intact()) return false;
    }
    return true;
  }

  Guarded x, y, workspace;

 private:
  static lynx::SparseLinearParams sizes_of(const Case& c) {
    lynx::SparseLinearParams p{};
    p.dtype = c.dtype;
    p.rows = c.rows, p.channels = c.channels, p.out_channels = c.out_channels, p.rank = c.rank;
    p.norm_scale = c.norm_scale;
    p.activation = lynx::Activation(c.activation), p.activation_from = c.activation_from;
    return p;
  }

  Case case_;
  Guarded weight_, lora_down_, bias_;
};

template <class T>
std::vector<T> from_device(const void* data, size_t count) {
  std::vector<T> out(count);
  check(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return out;
}

// The whole op by the instruction set under test; as the plugin launches it where that is the device's best.
cudaError_t launch(const DeviceProblem& problem, cudaStream_t stream) {
  lynx::InstructionSet best;
  check(lynx::choose_instructions(problem.params().dtype, &best), "choose_instructions");
  if (set == best) return lynx::launch_sparse_linear(problem.params(), lynx::kAnyTile, stream);
  const cudaError_t error = lynx::launch_prune(problem.params(), problem.operand(), stream);
  if (error != cudaSuccess) return error;
  return lynx::launch_pruned_gemm(problem.params(), problem.operand(), lynx::kAnyTile, stream);
}

// ---- Checks
// -------------------------------------------------------------------------------------------------

// The compressed operand: bytes of the channels, the padding and the metadata; scale and U within their
// tolerance.
std::string check_operand(const Case& c, const DeviceProblem& problem, const Expected& wanted,
                          const std::vector<int>& rows, const std::vector<ExpectedRow>& row_values) {
  const size_t half_width = size_t(lynx::padded_width(c.channels, c.rank) / 2);
  const lynx::CompressedOperand operand = problem.operand();
  Halves values = from_device<uint16_t>(operand.values, wanted.operand.values.size());
  const auto metadata = from_device<uint16_t>(operand.metadata, wanted.operand.metadata.size());
  const auto scale = from_device<float>(operand.scale, size_t(c.rows));
  for (size_t i = 0; i < rows.size(); ++i) {
    const uint16_t* u = &values[size_t(rows[i]) * half_width + size_t(c.channels) / 2];
    for (size_t j = 0; j < size_t(c.rank); ++j) {
      const reference::Near& due = row_values[i].u[j];
      if (!within(c.value()[u[j]], due.value, due.tolerance)) {
        return "U[" + std::to_string(rows[i]) + "," + std::to_string(j) + "] is " +
               std::to_string(c.value()[u[j]]) + ", not " + std::to_string(due.value);
      }
    }
  }
  for (int m = 0; m < c.rows; ++m) {  // now the rest must agree in every byte
    std::fill_n(&values[size_t(m) * half_width + size_t(c.channels) / 2], c.rank, uint16_t(0));
    if (!within(scale[size_t(m)], wanted.scale[size_t(m)], 1e-5 * wanted.scale[size_t(m)])) {
      return "scale[" + std::to_string(m) + "] is " + std::to_string(scale[size_t(m)]) + ", not " +
             std::to_string(wanted.scale[size_t(m)]);
    }
  }
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] != wanted.operand.values[i]) {
      return "value [" + std::to_string(i / half_width) + "," + std::to_string(i % half_width) + "] differs";
    }
  }
  for (size_t i = 0; i < metadata.size(); ++i) {
    if (metadata[i] != wanted.operand.metadata[i])
      return "metadata halfword " + std::to_string(i) + " differs";
  }
  return "";
}

// y on the sampled rows. `worst` becomes the largest error as a share of its tolerance.
std::string check_result(const Case& c, const Halves& y, const std::vector<int>& rows,
                         const std::vector<ExpectedRow>& wanted, double* worst) {
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t n = 0; n < size_t(c.out_channels); ++n) {
      const double found = c.value()[y[size_t(rows[i]) * size_t(c.out_channels) + n]];
      const double due = wanted[i].y[n].value, tolerance = wanted[i].y[n].tolerance;
      if (!within(found, due, tolerance)) {
        return "y[" + std::to_string(rows[i]) + "," + std::to_string(n) + "] is " + std::to_string(found) +
               ", not " + std::to_string(due) + " +- " + std::to_string(tolerance);
      }
      if (std::isfinite(due)) *worst = std::max(*worst, std::fabs(found - due) / tolerance);
    }
  }
  return "";
}

// Every tile configuration, on the operand that the pruning pass left.
std::string check_tiles(const Case& c, DeviceProblem& problem, const std::vector<int>& rows,
                        const std::vector<ExpectedRow>& wanted, double* worst) {
  for (int tile = 0; tile < lynx::tile_count(set); ++tile) {
    check(cudaMemset(problem.y.data(), 0xff, size_t(c.rows) * c.out_channels * 2), "cudaMemset");
    const cudaError_t error = lynx::launch_pruned_gemm(problem.params(), problem.operand(), tile, nullptr);
    check(cudaDeviceSynchronize(), "GEMM");
    if (error != cudaSuccess) return "tile " + std::to_string(tile) + ": " + cudaGetErrorString(error);
    const std::string wrong = check_result(c, problem.result(), rows, wanted, worst);
    if (!wrong.empty()) return "tile " + std::to_string(tile) + ": " + wrong;
  }
  return "";
}

void run_case(const Case& c) {
  const Inputs in = make_inputs(c);
  const Expected operand = expected_operand(c, in);
  const std::vector<int> rows = sample_rows(c);
  std::vector<ExpectedRow> wanted;
  for (const int row : rows) wanted.push_back(expected_row(c, in, operand, row));

  DeviceProblem problem(c, in);
  const cudaError_t error = launch(problem, nullptr);
  check(cudaDeviceSynchronize(), c.name().c_str());
  if (error != cudaSuccess) return report(false, c.name(), cudaGetErrorString(error));
  double worst = 0.0;
  std::string wrong = check_operand(c, problem, operand, rows, wanted);
  if (wrong.empty()) wrong = check_result(c, problem.result(), rows, wanted, &worst);
  const Halves first = problem.result();
  if (wrong.empty()) wrong = check_tiles(c, problem, rows, wanted, &worst);
  if (wrong.empty()) {
    check(launch(problem, nullptr), "second launch");
    check(cudaDeviceSynchronize(), "second launch");
    if (problem.result() != first) wrong = "a second run gives other bits";
  }
  if (wrong.empty() && !problem.intact()) wrong = "bytes outside a tensor were written";
  char detail[64];
  std::snprintf(detail, sizeof detail, "error up to %.0f %% of its bound", 100.0 * worst);
  report(wrong.empty(), c.name(), wrong.empty() ? detail : wrong);
}

// The tolerance must be able to fail: y of the halves of x that are dropped may not pass for y.
void run_negative_control() {
  Case c;
  const Inputs in = make_inputs(c);
  const Expected operand = expected_operand(c, in);
  Inputs other = in;
  for (size_t i = 0; i < in.x.size(); i += 4) {
    const auto size = [&](size_t k) { return std::fabs(c.value()[in.x[i + k]]); };
    std::array<size_t, 4> order = {0, 1, 2, 3};
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size(a) > size(b); });
    other.x[i + order[0]] = other.x[i + order[1]] = 0;
  }
  DeviceProblem problem(c, other);
  check(launch(problem, nullptr), "negative control");
  check(cudaDeviceSynchronize(), "negative control");
  int refused = 0;
  for (int row = 0; row < c.rows; ++row) {
    double worst = 0.0;
    refused += !check_result(c, problem.result(), {row}, {expected_row(c, in, operand, row)}, &worst).empty();
  }
  report(refused == c.rows, "the tolerance tells another mask apart in every row");
}

Case flux_case() {
  Case c;
  c.rows = 512, c.channels = 768, c.out_channels = 1152, c.rank = 64;
  return c;
}

void run_graph() {
  const Case c = flux_case();
  const Inputs in = make_inputs(c);
  DeviceProblem problem(c, in);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  check(launch(problem, stream), "direct launch");
  check(cudaStreamSynchronize(stream), "direct launch");
  const Halves direct = problem.result();
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  const cudaError_t error = launch(problem, stream);
  check(cudaStreamEndCapture(stream, &graph), "end capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  bool same = error == cudaSuccess;
  Halves negated = in.x;
  for (uint16_t& value : negated) value ^= 0x8000;
  for (const Halves& x : {negated, in.x}) {  // the second replay must follow the new input back
    problem.x.set(x);
    check(cudaMemset(problem.y.data(), 0xff, direct.size() * 2), "cudaMemset");
    check(cudaDeviceSynchronize(), "before replay");
    check(cudaGraphLaunch(executable, stream), "replay");
    check(cudaStreamSynchronize(stream), "replay");
    same &= (problem.result() == direct) == (x == in.x);
  }
  report(same, "CUDA graph: captured, replayed on new input, same bits as a direct launch");
  cudaGraphExecDestroy(executable), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
}

void run_streams() {
  const Case c = flux_case();
  const Inputs in = make_inputs(c);
  Inputs other = in;
  std::reverse(other.x.begin(), other.x.end());
  DeviceProblem a(c, in), b(c, other);
  check(launch(a, nullptr), "launch");
  check(launch(b, nullptr), "launch");
  check(cudaDeviceSynchronize(), "launch");
  const Halves alone_a = a.result(), alone_b = b.result();
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams)
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  bool same = alone_a != alone_b;
  for (int round = 0; round < 50; ++round) {
    check(launch(a, streams[0]), "stream 0");
    check(launch(b, streams[1]), "stream 1");
  }
  check(cudaDeviceSynchronize(), "streams");
  same &= a.result() == alone_a && b.result() == alone_b && a.intact() && b.intact();
  report(same, "two streams at once, same bits as alone");
  for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
}

void run_refusals() {
  Case c;
  DeviceProblem problem(c, make_inputs(c));
  const auto refused = [&](cudaError_t wanted, const std::function<void(lynx::SparseLinearParams&)>& spoil) {
    lynx::SparseLinearParams params = problem.params();
    spoil(params);
    return lynx::launch_sparse_linear(params, lynx::kAnyTile, nullptr) == wanted &&
           cudaGetLastError() == cudaSuccess;
  };
  using Params = lynx::SparseLinearParams;
  bool ok = refused(cudaErrorInvalidValue, [](Params& p) { p.rank = 24; });
  ok &= refused(cudaErrorInvalidValue, [](Params& p) { p.rank = 144; });
  ok &= refused(cudaErrorInvalidValue, [](Params& p) { p.channels = 200; });
  ok &= refused(cudaErrorInvalidValue, [](Params& p) { p.out_channels = 12; });
  ok &= refused(cudaErrorInvalidValue, [](Params& p) { p.rows = 0; });
  ok &= refused(cudaErrorInvalidValue,
                [](Params& p) { p.activation = lynx::Activation::kGeluTanh, p.activation_from = 8; });
  ok &= refused(cudaErrorInvalidValue, [](Params& p) { p.y = nullptr; });
  ok &= refused(cudaErrorMisalignedAddress, [](Params& p) { p.x = static_cast<const char*>(p.x) + 2; });
  report(ok, "wrong sizes and pointers are refused before any launch");
}

std::vector<Case> all_cases() {
  using lynx::DType;
  std::vector<Case> cases;
  const auto add = [&](const std::function<void(Case&)>& set) {
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      Case c;
      c.dtype = dtype;
      set(c);
      cases.push_back(c);
    }
  };
  for (const int rank : {0, 16, 32, 48, 64, 96, 128}) {
    for (const bool norm_scale : {false, true})
      add([=](Case& c) { c.rank = rank, c.norm_scale = norm_scale; });
  }
  for (const int activation : {1, 2}) {
    for (const int from : {0, 64, 512}) {
      add([=](Case& c) { c.activation = activation, c.activation_from = from; });
    }
  }
  for (const int rows : {1, 33, 64, 127, 129}) add([=](Case& c) { c.rows = rows; });
  for (const int channels : {16, 48, 208, 768, 960, 3072}) add([=](Case& c) { c.channels = channels; });
  for (const int out_channels : {8, 192, 200, 264, 3072})
    add([=](Case& c) { c.out_channels = out_channels; });
  for (const Special special : {Special::kTies, Special::kZeroRows, Special::kInfinity, Special::kNan}) {
    for (const bool norm_scale : {false, true}) {
      add([=](Case& c) { c.special = special, c.norm_scale = norm_scale; });
    }
  }
  for (const int rank : {0, 32, 64, 112}) {  // few tiles: several thread blocks prune each
    add([=](Case& c) { c.rows = 33, c.channels = 3600, c.rank = rank; });
  }
  add([](Case& c) { c.rows = 4608, c.channels = 4304, c.out_channels = 512, c.rank = 64; });
  add([](Case& c) { c.rows = 4608, c.channels = 3072, c.out_channels = 9216, c.rank = 64; });
  add([](Case& c) { c.rows = 512, c.channels = 15360, c.out_channels = 3072, c.rank = 128; });
  add([](Case& c) {
    c.rows = 4608, c.channels = 3072, c.out_channels = 18432, c.rank = 0, c.norm_scale = false;
  });
  return cases;
}

// ---- Timing
// -------------------------------------------------------------------------------------------------

double microseconds(const std::function<void()>& work) {
  constexpr int kRuns = 50;
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event"), check(cudaEventCreate(&stop), "event");
  for (int i = 0; i < 5; ++i) work();
  check(cudaEventRecord(start), "event");
  for (int i = 0; i < kRuns; ++i) work();
  check(cudaEventRecord(stop), "event"), check(cudaEventSynchronize(stop), "timing");
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, start, stop), "event");
  cudaEventDestroy(start), cudaEventDestroy(stop);
  return 1000.0 * ms / kRuns;
}

void run_timing() {
  int sm_count = 0;
  check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, 0), "device attribute");
  std::printf("\n%s, bf16, times in microseconds; * is the tile that choose_tile takes\n", set_name());
  const bool sm90 = set == lynx::InstructionSet::kWgmmaSp;
  const int shapes[][4] = {{64, 3072, 9216, 64},    {128, 3072, 9216, 64},   {256, 3072, 3072, 64},
                           {512, 3072, 3072, 64},   {512, 3072, 9216, 64},   {4608, 3072, 9216, 0},
                           {4608, 3072, 9216, 64},  {4608, 3072, 9216, 128}, {4608, 3072, 12288, 64},
                           {4608, 12288, 3072, 64}, {4608, 15360, 3072, 64}};
  for (const auto& shape : shapes) {
    {
      Case c;
      c.rows = shape[0], c.channels = shape[1], c.out_channels = shape[2], c.rank = shape[3];
      DeviceProblem problem(c, make_inputs(c));
      const auto params = problem.params();
      const auto operand = problem.operand();
      const double prune =
          microseconds([&] { check(lynx::launch_prune(params, operand, nullptr), "prune"); });
      std::printf("%5d x %5d -> %5d, rank %3d: prune %.1f", c.rows, c.channels, c.out_channels, c.rank,
                  prune);
      for (int tile = 0; tile < lynx::tile_count(set); ++tile) {
        const double time =
            microseconds([&] { check(lynx::launch_pruned_gemm(params, operand, tile, nullptr), "GEMM"); });
        const int64_t width = lynx::padded_width(c.channels, c.rank);
        const int chosen = sm90 ? lynx::choose_tile(lynx::kTilesSm90, c.rows, c.out_channels, width, sm_count)
                                : lynx::choose_tile(lynx::kTiles, c.rows, c.out_channels, width, sm_count);
        const int m = sm90 ? lynx::kTilesSm90[tile].m : lynx::kTiles[tile].m;
        const int n = sm90 ? lynx::kTilesSm90[tile].n : lynx::kTiles[tile].n;
        std::printf(", GEMM %dx%d%s %.1f (%.0f dense TFLOP/s)", m, n, tile == chosen ? "*" : "", time,
                    2e-6 * c.rows * double(c.channels) * c.out_channels / time);
      }
      std::printf("\n");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf(
        "No CUDA device was found: run this test on a machine with a GPU of compute capability 8.0 or "
        "later.\n");
    return 77;
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "device properties");
  std::printf("%s, sm_%d%d\n", properties.name, properties.major, properties.minor);
  const bool timing = argc > 1 && std::strcmp(argv[1], "--time") == 0;
  const std::string only = argc > 1 && !timing ? argv[1] : "";
  std::vector<lynx::InstructionSet> all;
  for (const lynx::InstructionSetTraits& each : lynx::kInstructionSets) {
    if (lynx::check_runs(each.set, lynx::DType::kBf16) == cudaSuccess) all.push_back(each.set);
  }
  for (const lynx::InstructionSet each : all) {
    set = each;
    std::printf("%s\n", set_name());
    for (const Case& c : all_cases()) {
      const bool runs = lynx::check_runs(set, c.dtype) == cudaSuccess;  // else the library was built without
      if (runs && c.name().find(only) != std::string::npos) run_case(c);
    }
    if (!only.empty()) continue;
    run_negative_control();
    run_graph();
    run_streams();
    run_refusals();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  for (const lynx::InstructionSet each : all) {
    set = each;
    if (timing) run_timing();
  }
  return failed == 0 ? 0 : 1;
}
