// SPDX-License-Identifier: Apache-2.0
// The plugins' host code on kernels that run on the CPU (emulation/): what TensorRT may do beyond what
// plugin_host does, which needs a GPU to enqueue. Built twice: with all kernels, and with mma.sp's for bf16
// alone.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "build_id.h"
#include "emulation/emulation.h"
#include "fp8_plugin.h"
#include "kernels/prune_grid.h"
#include "log.h"
#include "plugin_cases.h"
#include "sparse_linear_plugin.h"
#include "sparse_weight_plugin.h"
#include "tensorrt_side.h"

namespace {

bool no_memory = false;         // for operator new
std::vector<std::string> said;  // instead of the log

}  // namespace

// Not inlined: g++ would warn of free() on what another new gave.
__attribute__((noinline)) void* operator new(size_t bytes) {
  void* const memory = no_memory ? nullptr : std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }

void lynx::log_error(const char* message) noexcept {
  const bool was = no_memory;
  no_memory = false;
  said.emplace_back(message);
  no_memory = was;
}

namespace {

using namespace lynx::test;
using emulation::Buffer;
using lynx::Producer;
using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;

int passed = 0, failed = 0;

void report(bool ok, const std::string& name) {
  std::printf("%s %s\n", ok ? "PASS" : "FAIL", name.c_str());
  for (const std::string& line : said) std::printf("  said: %s\n", line.c_str());
  said.clear();
  ++(ok ? passed : failed);
}

// Whether `part` was logged, and nothing else.
bool was_said(const std::string& part) {
  const bool ok = said.size() == 1 && said[0].find(part) != std::string::npos;
  if (ok) said.clear();
  return ok;
}

constexpr bool kWhole = LYNX_WHOLE_LIBRARY;

lynx::Creator<lynx::SparseLinearOp<Producer::kNone>> linear_creator;
lynx::Creator<lynx::SparseLinearOp<Producer::kNorm>> norm_creator;
lynx::Creator<lynx::SparseLinearOp<Producer::kGelu>> gelu_creator;
lynx::Creator<lynx::SparseLinearOp<Producer::kGated>> gated_creator;
lynx::Creator<lynx::SparseWeightOp> weight_creator;
lynx::Creator<lynx::Fp8Op<false, Producer::kNone>> fp8_creator;
lynx::Creator<lynx::Fp8Op<false, Producer::kNorm>> norm_fp8_creator;
lynx::Creator<lynx::Fp8Op<false, Producer::kGelu>> gelu_fp8_creator;
lynx::Creator<lynx::Fp8Op<false, Producer::kGated>> gated_fp8_creator;
lynx::Creator<lynx::Fp8Op<true, Producer::kNone>> fp8_weight_creator;
lynx::Creator<lynx::Fp8Op<true, Producer::kNorm>> norm_fp8_weight_creator;
lynx::Creator<lynx::Fp8Op<true, Producer::kGelu>> gelu_fp8_weight_creator;
lynx::Creator<lynx::Fp8Op<true, Producer::kGated>> gated_fp8_weight_creator;
nvinfer1::IPluginCreatorV3One* const fp8_creators[] = {
    &fp8_creator,        &norm_fp8_creator,        &gelu_fp8_creator,        &gated_fp8_creator,
    &fp8_weight_creator, &norm_fp8_weight_creator, &gelu_fp8_weight_creator, &gated_fp8_weight_creator};

std::unique_ptr<IPluginV3> make(nvinfer1::IPluginCreatorV3One& creator,
                                const std::map<std::string, double>& attributes) {
  Fields fields(*creator.getFieldNames(), attributes);
  return std::unique_ptr<IPluginV3>(creator.createPlugin("node", fields.collection(), TensorRTPhase::kBUILD));
}

// ---- Problems

Problem linear_problem(int64_t batch = 2, int64_t length = 9) {
  SparseLinearCase c;
  c.batch = batch, c.length = length, c.out_channels = 64;
  return sparse_linear(c);
}

Problem norm_problem(int64_t batch = 2, int64_t length = 9) {
  SparseLinearCase c;
  c.plugin = "LynxNormSparseLinear", c.batch = batch, c.length = length, c.out_channels = 64;
  return sparse_linear(c);
}

Problem weight_problem(int64_t layout, DataType type = DataType::kBF16) {
  SparseWeightCase c;
  c.layout = layout, c.type = type, c.length = 9, c.out_channels = 64;
  return sparse_weight(c);
}

Problem fp8_problem(const nvinfer1::IPluginCreatorV3One& creator, bool prune = false,
                    DataType type = DataType::kBF16) {
  Fp8Case c;
  c.plugin = const_cast<nvinfer1::IPluginCreatorV3One&>(creator).getPluginName();
  c.prune = prune, c.type = type, c.length = 9;
  c.halves = c.makes("Gated");
  return fp8_linear(c);
}

// The descriptions of a network whose batch and tokens are decided by each run, up to `batch` times `length`.
std::vector<DynamicPluginTensorDesc> two_dynamic_axes(const Problem& problem, int64_t batch, int64_t length) {
  std::vector<DynamicPluginTensorDesc> out = dynamic_descs(problem);
  for (const size_t x_or_y : {size_t(0), out.size() - 1}) {
    out[x_or_y].desc.dims.d[1] = -1;
    out[x_or_y].min.d[0] = out[x_or_y].min.d[1] = 0;
    out[x_or_y].max.d[0] = batch, out[x_or_y].max.d[1] = length;
  }
  return out;
}

int32_t configure(IPluginV3& plugin, const std::vector<DynamicPluginTensorDesc>& descs) {
  return build_of(plugin)->configurePlugin(descs.data(), int32_t(descs.size()) - 1, &descs.back(), 1);
}

size_t workspace_of(IPluginV3& plugin, const std::vector<DynamicPluginTensorDesc>& descs) {
  return build_of(plugin)->getWorkspaceSize(descs.data(), int32_t(descs.size()) - 1, &descs.back(), 1);
}

// Enqueues the problem in a workspace of so many bytes, and compares y with float64; "" when nothing is
// wrong.
std::string run(IPluginV3& plugin, const Problem& problem, size_t workspace_bytes) {
  const std::vector<PluginTensorDesc> descs = static_descs(problem);
  std::vector<std::unique_ptr<Buffer>> inputs;
  std::vector<const void*> pointers;
  for (const HostTensor& input : problem.inputs) {
    inputs.push_back(std::make_unique<Buffer>("input", input.bytes.size()));
    inputs.back()->set(input.bytes.data());
    pointers.push_back(inputs.back()->data());
  }
  Buffer workspace("workspace", workspace_bytes), y("y", problem.y.size() * 2);
  workspace.fill(0xff), y.fill(0xff);
  void* outputs[] = {y.data()};
  auto* const runtime = runtime_of(plugin);
  const auto count = int32_t(inputs.size());
  if (runtime->setTactic(0) != 0 || runtime->onShapeChange(descs.data(), count, &descs.back(), 1) != 0)
    return "refused";
  if (runtime->enqueue(descs.data(), &descs.back(), pointers.data(), outputs, workspace.data(), nullptr) !=
      0) {
    return "not enqueued: " + emulation::error;
  }
  if (!workspace.intact() || !y.intact()) return "bytes outside a buffer were written";
  const auto* found = static_cast<const uint16_t*>(y.data());
  for (size_t i = 0; i < problem.y.size(); ++i) {
    const double value = rounding(problem.type())[found[i]];
    if (!(std::fabs(value - problem.y[i]) <= problem.tolerance[i])) {
      return "y[" + std::to_string(i) + "] is " + std::to_string(value) + ", not " +
             std::to_string(problem.y[i]);
    }
  }
  return "";
}

void report_run(IPluginV3& plugin, const Problem& problem, size_t workspace_bytes, const std::string& name) {
  const std::string wrong = run(plugin, problem, workspace_bytes);
  report(wrong.empty(), name + (wrong.empty() ? "" : ": " + wrong));
}

// ---- Checks

// An engine may run on another GPU than the one it was built on, and with fewer rows than it was sized for.
void check_workspace() {
  for (const int built_on : {0, 80, 90}) {
    for (const int runs_on : {80, 90}) {
      for (const auto& problem : {linear_problem(2, 9), linear_problem(1, 1)}) {
        emulation::compute_capability = built_on;
        const auto plugin = make(linear_creator, problem.attributes);
        const auto descs = two_dynamic_axes(problem, 3, 100);
        const bool configured = configure(*plugin, descs) == 0;
        const size_t bytes = workspace_of(*plugin, descs);
        emulation::compute_capability = runs_on;
        report(configured, "two dynamic axes configured");
        report_run(*plugin, problem, bytes,
                   std::to_string(problem.rows()) + " of 300 rows, built on " + std::to_string(built_on) +
                       ", run on " + std::to_string(runs_on));
      }
    }
  }
}

// Everything that plugin_host runs on a GPU, every producer and epilogue among it.
void check_problems() {
  const std::pair<const char*, nvinfer1::IPluginCreatorV3One*> plugins[] = {
      {"LynxSparseLinear", &linear_creator},
      {"LynxNormSparseLinear", &norm_creator},
      {"LynxGeluSparseLinear", &gelu_creator},
      {"LynxGatedSparseLinear", &gated_creator},
      {"LynxSparseWeightLinear", &weight_creator}};
  for (const auto& [name, creator] : plugins) {
    for (const Problem& problem : problems_of(name)) {
      const auto layout = problem.attributes.find("metadata_layout");
      const bool for_90 = layout != problem.attributes.end() && layout->second == 90;
      if (!kWhole && (for_90 || problem.type() != DataType::kBF16)) continue;
      emulation::compute_capability = for_90 ? 90 : 80;
      const auto plugin = make(*creator, problem.attributes);
      if (plugin == nullptr) {
        report(false, problem.title);
        continue;
      }
      report_run(*plugin, problem, workspace_of(*plugin, dynamic_descs(problem)), problem.title);
    }
  }
}

// A kernel that leaves out pruning and producer is found out: by more elements than plugin_host asks for.
void check_fp8_problems_tell() {
  for (nvinfer1::IPluginCreatorV3One* const creator : fp8_creators) {
    for (const Problem& problem : problems_of(creator->getPluginName())) {
      if (problem.type() != DataType::kBF16) continue;
      size_t told = 0;
      for (size_t i = 0; i < problem.y.size(); ++i) {
        told += std::fabs(problem.y[i] - problem.unpruned[i]) > 2.0 * problem.tolerance[i];
      }
      report(told > problem.y.size() / 4, problem.title + " is far from what it would be without that");
    }
  }
}

// A workspace for many rows is enough for any fewer.
void check_workspace_grows() {
  bool ok = true;
  lynx::SparseLinearParams params{};
  params.channels = 3072, params.out_channels = 9216, params.rank = 64;
  size_t before = 0;
  for (params.rows = 0; params.rows < 20000; params.rows += 37) {
    const size_t bytes = lynx::workspace_bytes(params);
    ok &= bytes >= before;
    before = bytes;
    for (const lynx::InstructionSetTraits& each : lynx::kInstructionSets) {
      if (!lynx::holds(each.set, params.dtype)) continue;
      const lynx::CompressedOperand operand = lynx::compressed_operand(params, each.set);
      ok &= size_t(static_cast<char*>(operand.gemm) - static_cast<char*>(nullptr)) + operand.gemm_bytes <=
            bytes;
    }
  }
  report(ok, "the workspace grows with the rows and holds every kernel's parts");
}

void check_dynamic_axes() {
  const Problem problem = norm_problem();
  const auto plugin = make(norm_creator, problem.attributes);
  auto descs = two_dynamic_axes(problem, 2, 100);  // gain and shift: [batch, 1, K]
  for (const size_t gains : {size_t(4), size_t(5)}) descs[gains] = dynamic_descs(problem)[gains];
  report(configure(*plugin, descs) == 0, "x [-1, -1, K] with gain [-1, 1, K]");
  for (const size_t gains : {size_t(4), size_t(5)}) descs[gains].desc.dims.d[0] = 2;
  report(configure(*plugin, descs) == 0, "x [-1, -1, K] with gain [2, 1, K]: x is not one row");
  report_run(*plugin, problem, workspace_of(*plugin, descs), "and run with 2 x 9 tokens");
  auto nothing = static_descs(problem);
  nothing[0].dims.d[1] = nothing.back().dims.d[1] = 0;
  auto* const runtime = runtime_of(*plugin);
  report(runtime->onShapeChange(nothing.data(), 6, &nothing.back(), 1) == 0 &&
             runtime->enqueue(nothing.data(), &nothing.back(), nullptr, nullptr, nullptr, nullptr) == 0,
         "no tokens: nothing is touched");
  auto odd = static_descs(problem);
  odd[0].dims.d[0] = odd.back().dims.d[0] = 1, odd[0].dims.d[1] = odd.back().dims.d[1] = 9;
  report(
      runtime->onShapeChange(odd.data(), 6, &odd.back(), 1) != 0 && was_said("gain has 2 rows for 9 tokens"),
      "9 tokens are not 2 rows of gains");
}

void check_fields() {
  const Problem problem = norm_problem();
  for (const auto& [name, value] : problem.attributes) {
    auto attributes = problem.attributes;
    attributes.erase(name);
    report(make(norm_creator, attributes) == nullptr && was_said("attribute " + name + " is missing"),
           "without " + name);
  }
  const Problem weight = weight_problem(80);
  for (const auto& [name, value] : weight.attributes) {
    auto attributes = weight.attributes;
    attributes.erase(name);
    report(make(weight_creator, attributes) == nullptr && was_said("attribute " + name + " is missing"),
           "without " + name);
  }
  report(
      norm_creator.createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr && was_said("is missing"),
      "without any");
  std::vector<PluginField> fields;
  std::deque<int64_t> wide;
  for (const auto& [name, value] : weight.attributes) {
    wide.push_back(name == "out_channels" ? (int64_t(1) << 32) + 64 : int64_t(value));
    fields.emplace_back(name.c_str(), &wide.back(), PluginFieldType::kINT64, 1);
  }
  const PluginFieldCollection collection{int32_t(fields.size()), fields.data()};
  report(weight_creator.createPlugin("node", &collection, TensorRTPhase::kBUILD) == nullptr &&
             was_said("out_channels is 4294967360"),
         "an integer of 64 bits that does not fit");
}

void check_tactics() {
  const Problem problem = linear_problem();
  const auto plugin = make(linear_creator, problem.attributes);
  const auto descs = static_descs(problem);
  auto* const runtime = runtime_of(*plugin);
  const auto taken = [&](int32_t tactic) {
    return runtime->setTactic(tactic) == 0 && runtime->onShapeChange(descs.data(), 4, &descs.back(), 1) == 0;
  };
  emulation::compute_capability = 80;
  report(taken(0) && taken(2), "tactics 0 and 2");
  report(!taken(-1) && was_said("no tactic -1"), "no tactic -1");
  report(!taken(99) && was_said("no tactic 99"), "no tactic 99");
  report(!taken(3) && was_said("this GPU has no tactic 3"), "tactic 3 is sm_90's");
  emulation::compute_capability = 90;
  report(taken(3) == kWhole && (kWhole || was_said("no tactic 3")), "tactic 3 on sm_90");
}

void check_cache_id() {
  const Problem problem = linear_problem();
  auto other = problem.attributes;
  other["norm_scale"] = 0;
  const auto id = [](IPluginV3& plugin) { return std::string(build_of(plugin)->getTimingCacheID()); };
  const auto one = make(linear_creator, problem.attributes), two = make(linear_creator, other);
  const std::string library = lynx::build_id();
  report(library.size() == 40 && id(*one).find(library) != std::string::npos,
         "the timing cache ID names the library's build");
  report(id(*one) == id(*make(linear_creator, problem.attributes)) && id(*one) != id(*two),
         "and the attributes");
}

void check_types() {
  for (const DataType type : {DataType::kBF16, DataType::kHALF}) {
    SparseLinearCase c;
    c.type = type, c.length = 2, c.out_channels = 64;
    const Problem problem = sparse_linear(c);
    const auto plugin = make(linear_creator, problem.attributes);
    std::vector<DataType> types;
    for (const HostTensor& input : problem.inputs) types.push_back(input.type);
    DataType y;
    const bool held = kWhole || type == DataType::kBF16;
    const bool taken = build_of(*plugin)->getOutputDataTypes(&y, 1, types.data(), int32_t(types.size())) == 0;
    report(taken == held && (held || was_said("x is fp16, and the plugin library was built without fp16")),
           held ? "a type that the library holds" : "a type that the library lacks");
    const auto descs = dynamic_descs(problem);
    report(build_of(*plugin)->supportsFormatCombination(0, descs.data(), 4, 1) == held,
           "the same as a format");
  }
}

void check_layouts() {
  for (const int device : {0, 75, 80, 89, 90, 120}) {
    for (const int layout : {80, 90}) {
      emulation::compute_capability = device;
      const auto plugin = make(weight_creator, weight_problem(layout).attributes);
      const bool held = layout == 80 || kWhole,
                 runs = device == 0 || (layout == 80 ? device >= 80 : device == 90);
      const bool taken = configure(*plugin, dynamic_descs(weight_problem(layout))) == 0;
      const std::string cause =
          held ? ", which this GPU does not read" : ", and the plugin library was built without";
      report(taken == (held && runs) &&
                 (taken || was_said("metadata_layout is " + std::to_string(layout) + cause)),
             "layout " + std::to_string(layout) + " on sm_" + std::to_string(device));
    }
  }
  emulation::compute_capability = 75;
  const auto plugin = make(linear_creator, linear_problem().attributes);
  report(configure(*plugin, dynamic_descs(linear_problem())) != 0 && was_said("this GPU does not run"),
         "activations on sm_75");
  emulation::compute_capability = 90;
}

void check_rows() {
  const Problem problem = linear_problem();
  const auto plugin = make(linear_creator, problem.attributes);
  const auto below = two_dynamic_axes(problem, 512, 65535), above = two_dynamic_axes(problem, 512, 65536);
  report(configure(*plugin, below) == 0, "just below 2^25 rows");
  report(configure(*plugin, above) != 0 && was_said("x has 33554432 rows"), "2^25 rows are refused at build");
  auto fixed = static_descs(problem);
  fixed[0].dims.d[0] = 512, fixed[0].dims.d[1] = 65536;
  report(runtime_of(*plugin)->onShapeChange(fixed.data(), 4, &fixed.back(), 1) != 0 &&
             was_said("x has 33554432 rows"),
         "and at run time");
}

// ---- FP8

void check_fp8_runs() {
  for (nvinfer1::IPluginCreatorV3One* const creator : fp8_creators) {
    for (const bool prune : {false, true}) {
      for (const DataType type : {DataType::kBF16, DataType::kHALF}) {
        const Problem problem = fp8_problem(*creator, prune, type);
        if (prune && problem.attributes.count("prune") == 0) continue;
        const auto plugin = make(*creator, problem.attributes);
        emulation::compute_capability = 0;  // built where there is no GPU
        const bool configured = configure(*plugin, dynamic_descs(problem)) == 0;
        const size_t bytes = workspace_of(*plugin, two_dynamic_axes(problem, 3, 100));
        const int32_t tactics = build_of(*plugin)->getNbTactics();
        emulation::compute_capability = 90;
        report(configured && tactics == 0, problem.title + ": configured without a GPU");
        report_run(*plugin, problem, bytes, problem.title + " in a workspace for 300 rows");
        Problem other = problem;
        other.y = problem.unpruned;
        report(!run(*plugin, other, bytes).empty(), problem.title + " is not what it would be without that");
      }
    }
  }
}

void check_fp8_devices() {
  const Problem problem = fp8_problem(fp8_weight_creator);
  const auto plugin = make(fp8_weight_creator, problem.attributes);
  const auto fixed = static_descs(problem);
  for (const int device : {0, 75, 80, 86, 89, 90, 100, 120}) {
    emulation::compute_capability = device;
    const std::string cause = "this GPU does not run the plugin's FP8 kernels";
    const std::string name = " on sm_" + std::to_string(device);
    const bool due = device == 0 || device == 89 || device == 90 || device == 120;  // 0: there is none
    bool taken = configure(*plugin, dynamic_descs(problem)) == 0;
    report(taken == due && (taken || was_said(cause)), "FP8 is built" + name);
    taken = runtime_of(*plugin)->onShapeChange(fixed.data(), 5, &fixed.back(), 1) == 0;
    report(taken == due && (taken || was_said(cause)), "FP8 is run" + name);
    if (due && device != 0) {
      const size_t bytes = workspace_of(*plugin, two_dynamic_axes(problem, 2, 9));
      report_run(*plugin, problem, bytes, problem.title + name);
    }
  }
  emulation::compute_capability = 90;
}

void check_fp8_types() {
  for (const DataType type : {DataType::kBF16, DataType::kHALF}) {
    const Problem problem = fp8_problem(fp8_weight_creator, false, type);
    const auto plugin = make(fp8_weight_creator, problem.attributes);
    std::vector<DataType> types;
    for (const HostTensor& input : problem.inputs) types.push_back(input.type);
    DataType y = DataType::kINT8;
    const auto taken = [&] {
      return build_of(*plugin)->getOutputDataTypes(&y, 1, types.data(), int32_t(types.size())) == 0;
    };
    report(taken() == kWhole && (kWhole ? y == type : was_said("built without FP8 kernels for ")),
           "FP8 of a type that the library holds, or lacks");
    if (!kWhole) continue;
    for (const auto& [input, remedy] : {std::pair{1, "values has the wrong dtype. Make it int32"},
                                        std::pair{2, "metadata has the wrong dtype. Make it int32"},
                                        std::pair{3, "weight_scale has the wrong dtype. Make it float32"},
                                        std::pair{4, "bias has the wrong dtype. Give it the dtype of x"}}) {
      const DataType due = types[size_t(input)];
      types[size_t(input)] = DataType::kINT8;
      report(!taken() && was_said(remedy), remedy);
      types[size_t(input)] = due;
    }
  }
}

void check_fp8_attributes() {
  const auto refused = [](nvinfer1::IPluginCreatorV3One& creator, const char* name, double value,
                          const std::string& message) {
    Fp8Case c;
    c.plugin = creator.getPluginName(), c.length = 1, c.out_channels = 136, c.epilogue = {1, 64, false};
    auto attributes = fp8_linear(c).attributes;
    attributes[name] = value;
    report(make(creator, attributes) == nullptr && was_said(message), message);
  };
  refused(fp8_creator, "prune", 2, "a flag is 2");
  refused(fp8_creator, "gated", 2, "a flag is 2");
  refused(fp8_creator, "activation", 3, "activation is 3");
  refused(fp8_weight_creator, "gated", 1, "gated rows are 72");
  refused(gelu_fp8_creator, "producer_activation", 3, "producer_activation is 3");
  refused(gated_fp8_weight_creator, "producer_activation", 0, "producer_activation is 0");
  refused(gated_fp8_creator, "halves", 3, "halves is 3");
  refused(fp8_creator, "activation_from", -64, "activation_from is -64");
  refused(fp8_weight_creator, "activation_from", 8, "activation_from is 8");
  refused(fp8_weight_creator, "activation_from", 192, "activation_from is 192");
  refused(fp8_weight_creator, "out_channels", 100, "out_channels is 100, not a multiple of 8");
  refused(fp8_weight_creator, "out_channels", -8, "out_channels is -8, not a multiple of 8");
  refused(norm_fp8_weight_creator, "epsilon", 0, "epsilon is not positive");
  refused(norm_fp8_creator, "rms", -1, "rms is -1");
  auto attributes = fp8_problem(fp8_weight_creator).attributes;
  attributes.erase("out_channels");
  report(make(fp8_weight_creator, attributes) == nullptr && was_said("attribute out_channels is missing"),
         "attribute out_channels is missing");
}

void check_fp8_shapes() {
  const auto refused = [](nvinfer1::IPluginCreatorV3One& creator, size_t input, int axis, int64_t extent,
                          const std::string& message) {
    const Problem problem = fp8_problem(creator);
    const auto plugin = make(creator, problem.attributes);
    auto descs = static_descs(problem);
    descs[input].dims.d[axis] = extent;
    const auto count = int32_t(descs.size()) - 1;
    report(
        runtime_of(*plugin)->onShapeChange(descs.data(), count, &descs.back(), 1) != 0 && was_said(message),
        message);
  };  // x [2, 9, 208], N = 72
  refused(fp8_creator, 0, 2, 200, "x has 200 channels, not a multiple of 16");
  refused(fp8_creator, 0, 2, 32784, "x has 32784 channels. The kernels take up to 32768");
  refused(gated_fp8_creator, 0, 2, 415, "x has 415 channels, which are no two halves");
  refused(gated_fp8_creator, 0, 2, 400, "x has 200 channels, not a multiple of 16");
  refused(gated_fp8_creator, 4, 2, 208, "gate has 208 channels where 416 are due");
  refused(fp8_creator, 1, 1, 52, "weight has 52 columns where 64 are due");
  refused(fp8_creator, 1, 0, 76, "the rows of weight are 76, not a multiple of 8");
  refused(fp8_creator, 2, 0, 64, "weight_scale has 64 elements where 72 are due");
  refused(fp8_creator, 3, 0, 80, "bias has 80 elements where 72 are due");
  refused(fp8_weight_creator, 1, 0, 72, "values has 72 rows where 128 are due");
  refused(fp8_weight_creator, 1, 1, 64, "values has 64 columns where 32 are due");
  refused(fp8_weight_creator, 2, 0, 4, "metadata has 4 steps of 128 channels where 2 are due");
  refused(fp8_weight_creator, 2, 1, 72, "metadata has 72 rows where 128 are due");
  refused(fp8_weight_creator, 2, 2, 8, "metadata has 8 words where 4 are due");
  refused(norm_fp8_weight_creator, 5, 2, 192, "gain has 192 channels where 208 are due");
  refused(norm_fp8_weight_creator, 6, 0, 1, "shift has 1 rows where 2 are due");
  const Problem problem = fp8_problem(norm_fp8_creator);
  const auto plugin = make(norm_fp8_creator, problem.attributes);
  auto descs = static_descs(problem);
  descs[4].dims.d[0] = descs[5].dims.d[0] = 4;
  report(runtime_of(*plugin)->onShapeChange(descs.data(), 6, &descs.back(), 1) != 0 &&
             was_said("gain has 4 rows for 18 tokens"),
         "gain has 4 rows for 18 tokens");
}

// Every operand has tiles of its own.
void check_fp8_tactics() {
  const auto count = [](nvinfer1::IPluginCreatorV3One& creator, bool prune) {
    return build_of(*make(creator, fp8_problem(creator, prune).attributes))->getNbTactics();
  };
  report(count(fp8_creator, false) == lynx::fp8_tile_count(lynx::Fp8Operand::kDense) &&
             count(fp8_creator, true) == lynx::fp8_tile_count(lynx::Fp8Operand::kSparseActivation) &&
             count(fp8_weight_creator, false) == lynx::fp8_tile_count(lynx::Fp8Operand::kSparseWeight),
         "FP8's tactics are its tiles");
  const Problem problem = fp8_problem(fp8_creator, true);
  const auto plugin = make(fp8_creator, problem.attributes);
  const int32_t all = lynx::fp8_tile_count(lynx::Fp8Operand::kSparseActivation);
  auto* const runtime = runtime_of(*plugin);
  report(runtime->setTactic(all) == 0 && runtime->setTactic(all + 1) != 0 && was_said("there is no tactic"),
         "no tactic beyond the last tile");
  const auto other = make(fp8_creator, fp8_problem(fp8_creator, false).attributes);
  report(std::string(build_of(*plugin)->getTimingCacheID()) != build_of(*other)->getTimingCacheID(),
         "times of dense x and of 2:4 x are not mixed");
}

// TensorRT calls these as noexcept: an exception would end the process.
void check_memory() {
  const Problem problem = linear_problem();
  const auto plugin = make(linear_creator, problem.attributes);
  std::vector<DataType> types(problem.inputs.size(), DataType::kFLOAT);
  auto descs = dynamic_descs(problem);
  descs[1].max.nbDims = 1;
  const auto wrong = static_descs(problem);
  const Fields bad(*linear_creator.getFieldNames(), {});
  auto* const build = build_of(*plugin);
  auto* const runtime = runtime_of(*plugin);
  const void* const nowhere[4] = {};
  void* nothing = nullptr;
  DataType y;
  no_memory = true;
  const bool failed_all =
      build->getOutputDataTypes(&y, 1, types.data(), 4) != 0 &&
      build->getOutputDataTypes(&y, 1, types.data(), 3) != 0 &&
      build->configurePlugin(descs.data(), 4, &descs.back(), 1) != 0 && runtime->setTactic(99) != 0 &&
      runtime->enqueue(wrong.data(), &wrong.back(), nowhere, &nothing, nullptr, nullptr) != 0 &&
      linear_creator.createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr &&
      plugin->clone() == nullptr;
  no_memory = false;
  report(failed_all && said.size() >= 6, "no memory for a message");
}

}  // namespace

int main() {
  emulation::compute_capability = 90;
  if (kWhole) check_workspace(), check_dynamic_axes();
  check_workspace_grows();
  check_problems();
  if (kWhole) check_fp8_problems_tell();
  check_fields();
  check_tactics();
  check_cache_id();
  check_types();
  check_layouts();
  check_rows();
  if (kWhole) check_fp8_runs(), check_fp8_tactics(), check_fp8_shapes(), check_fp8_devices();
  check_fp8_types();
  check_fp8_attributes();
  check_memory();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
