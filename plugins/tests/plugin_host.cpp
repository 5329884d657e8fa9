// SPDX-License-Identifier: Apache-2.0
// A minimal host of the plugins: does to every plugin of the library what TensorRT does, by the IPluginV3
// interfaces and in TensorRT's order, and holds the results against float64. It needs no TensorRT, and so
// runs where TensorRT for RTX does not (Hopper).
//
//   plugin_host LIBRARY [TEXT]   problems whose title holds TEXT; exit 1 when a check fails, 77 when there
//   was
//                                no GPU to enqueue on (all that comes before enqueue was checked)
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "guarded.h"
#include "plugin_cases.h"
#include "tensorrt_side.h"

namespace {

using namespace lynx::test;
using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

int passed = 0, failed = 0;

bool report(bool ok, const std::string& name, const std::string& detail = "") {
  std::printf("%s %s%s%s\n", ok ? "PASS" : "FAIL", name.c_str(), detail.empty() ? "" : ": ", detail.c_str());
  std::fflush(stdout);
  ++(ok ? passed : failed);
  return ok;
}

// ---- The build, as far as it needs no GPU

int32_t input_count(const Problem& problem) { return int32_t(problem.inputs.size()); }

bool check_types(nvinfer1::IPluginV3OneBuild& build, const Problem& problem) {
  std::vector<DataType> types;
  for (const HostTensor& input : problem.inputs) types.push_back(input.type);
  DataType y = DataType::kINT8;
  bool ok = build.getOutputDataTypes(&y, 1, types.data(), input_count(problem)) == 0 && y == types[0];
  types[0] = DataType::kFLOAT;
  ok &= build.getOutputDataTypes(&y, 1, types.data(), input_count(problem)) != 0;
  return ok;
}

bool check_shapes(nvinfer1::IPluginV3OneBuild& build, const Problem& problem) {
  Extents extents;
  std::vector<nvinfer1::DimsExprs> in;
  for (const DynamicPluginTensorDesc& desc : dynamic_descs(problem)) {
    nvinfer1::DimsExprs dims{};
    dims.nbDims = desc.desc.dims.nbDims;
    for (int32_t i = 0; i < dims.nbDims; ++i) dims.d[i] = extents.constant(desc.desc.dims.d[i]);
    in.push_back(dims);
  }
  in.pop_back();
  nvinfer1::DimsExprs y{};
  if (build.getOutputShapes(in.data(), input_count(problem), nullptr, 0, &y, 1, extents) != 0) return false;
  if (y.nbDims != 3 || y.d[0] != in[0].d[0] || y.d[1] != in[0].d[1]) return false;
  if (!y.d[2]->isConstant() || y.d[2]->getConstantValue() != problem.out_channels) return false;
  in[1].nbDims = 1;  // a weight that is no matrix
  return build.getOutputShapes(in.data(), input_count(problem), nullptr, 0, &y, 1, extents) != 0;
}

// TensorRT asks position by position, with the ones before as it has chosen them.
bool check_formats(nvinfer1::IPluginV3OneBuild& build, const Problem& problem) {
  std::vector<DynamicPluginTensorDesc> tensors = dynamic_descs(problem);
  const int32_t inputs = input_count(problem);
  for (int32_t position = 0; position <= inputs; ++position) {
    DynamicPluginTensorDesc& tensor = tensors[size_t(position)];
    const DynamicPluginTensorDesc due = tensor;
    const auto supported = [&] {
      return build.supportsFormatCombination(position, tensors.data(), inputs, 1);
    };
    if (!supported()) return false;
    tensor.desc.type = due.desc.type == DataType::kFLOAT ? DataType::kINT32 : DataType::kFLOAT;
    if (supported()) return false;
    tensor = due, tensor.desc.format = TensorFormat::kCHW32;
    if (supported()) return false;
    tensor = due;
  }
  return true;
}

// Of each tactic its number; the first is TensorRT's default, 0.
std::vector<int32_t> tactics_of(nvinfer1::IPluginV3OneBuild& build) {
  std::vector<int32_t> tactics(size_t(std::max(build.getNbTactics(), 0)));
  if (!tactics.empty() && build.getValidTactics(tactics.data(), int32_t(tactics.size())) != 0)
    tactics.clear();
  tactics.insert(tactics.begin(), 0);
  return tactics;
}

// What an engine keeps of a node.
struct BuiltNode {
  std::unique_ptr<IPluginV3> plugin;  // of the runtime phase, which contexts are made from
  size_t workspace_bytes = 0;
  std::vector<int32_t> tactics;
};

// From the creator to the plugin of the runtime phase; null where a check failed.
BuiltNode build(nvinfer1::IPluginCreatorV3One& creator, const Problem& problem) {
  const std::string& name = problem.title;
  Fields attributes(*creator.getFieldNames(), problem.attributes);
  std::unique_ptr<IPluginV3> made(
      creator.createPlugin("node", attributes.collection(), TensorRTPhase::kBUILD));
  if (!report(made != nullptr, name + ": created")) return {};
  std::unique_ptr<IPluginV3> plugin(made->clone());  // what addPluginV3 does
  made.reset();
  const auto* core = core_of(*plugin);
  auto* builder = build_of(*plugin);
  auto* runtime = runtime_of(*plugin);
  bool ok = core != nullptr && builder != nullptr && runtime != nullptr;
  ok = ok && core->getPluginName() == problem.plugin && builder->getNbOutputs() == 1 &&
       std::string(core->getPluginNamespace()) == creator.getPluginNamespace() &&
       std::string(core->getPluginVersion()) == creator.getPluginVersion();
  if (!report(ok, name + ": capabilities and name")) return {};
  ok = report(check_types(*builder, problem), name + ": output type");
  ok &= report(check_shapes(*builder, problem), name + ": output shape, batch unknown");
  ok &= report(check_formats(*builder, problem), name + ": formats, position by position");
  const auto descs = dynamic_descs(problem);
  const int32_t inputs = input_count(problem);
  const auto* out = &descs.back();
  ok &= report(builder->configurePlugin(descs.data(), inputs, out, 1) == 0, name + ": configured");
  BuiltNode node;
  node.workspace_bytes = builder->getWorkspaceSize(descs.data(), inputs, out, 1);
  auto smaller = descs;
  smaller[0].max.d[0] = 1;
  const size_t less = builder->getWorkspaceSize(smaller.data(), inputs, out, 1);
  ok &= report(less <= node.workspace_bytes, name + ": workspace grows with the tokens",
               std::to_string(less) + " and " + std::to_string(node.workspace_bytes) + " bytes");
  node.tactics = tactics_of(*builder);

  Fields serialized(*runtime->getFieldsToSerialize());
  plugin.reset();  // the engine file is all that is left of the build
  node.plugin.reset(creator.createPlugin("node", serialized.collection(), TensorRTPhase::kRUNTIME));
  ok &= report(node.plugin != nullptr, name + ": created again from what was serialized");
  if (!ok) return {};
  const Fields again(*runtime_of(*node.plugin)->getFieldsToSerialize());
  return report(again == serialized, name + ": serializes to the same fields") ? std::move(node)
                                                                               : BuiltNode{};
}

// ---- Execution

// An execution context: its own clone of the plugin, workspace, and here its own inputs and output.
class Context {
 public:
  Context(const Problem& problem, const BuiltNode& node)
      : descs_(static_descs(problem)),
        workspace_(node.workspace_bytes),
        y_(size_t(problem.rows() * problem.out_channels) * 2),
        plugin_(runtime_of(*node.plugin)->attachToContext(&resources_)) {
    for (const HostTensor& input : problem.inputs) {
      inputs_.push_back(std::make_unique<Guarded>(input.bytes.size()));
      inputs_.back()->set(input.bytes);
      pointers_.push_back(inputs_.back()->data());
    }
  }

  bool prepare(int32_t tactic) {
    if (plugin_ == nullptr) return false;
    auto* runtime = runtime_of(*plugin_);
    const auto inputs = int32_t(inputs_.size());
    return runtime->setTactic(tactic) == 0 &&
           runtime->onShapeChange(descs_.data(), inputs, &descs_.back(), 1) == 0;
  }

  bool enqueue(cudaStream_t stream) {
    void* y = y_.data();
    return runtime_of(*plugin_)->enqueue(descs_.data(), &descs_.back(), pointers_.data(), &y,
                                         workspace_.data(), stream) == 0;
  }

  // Enqueued alone; empty where the plugin refuses.
  std::vector<uint16_t> run() {
    y_.poison();
    if (!enqueue(nullptr)) return {};
    check(cudaDeviceSynchronize(), "enqueue");
    return y_.copy<uint16_t>();
  }

  void set_x(const std::vector<char>& bytes) { inputs_[0]->set(bytes); }
  Guarded& y() { return y_; }
  bool intact() const {
    return y_.intact() && workspace_.intact() &&
           std::all_of(inputs_.begin(), inputs_.end(), [](const auto& input) { return input->intact(); });
  }

 private:
  std::vector<PluginTensorDesc> descs_;
  Guarded workspace_, y_;
  ResourceContext resources_;
  std::unique_ptr<IPluginV3> plugin_;
  std::vector<std::unique_ptr<Guarded>> inputs_;
  std::vector<const void*> pointers_;
};

// How many elements are further from `due` than allowed. `worst`: the largest error as a share of its bound.
size_t wrong_elements(const Problem& problem, const std::vector<uint16_t>& y, const std::vector<double>& due,
                      double* worst) {
  size_t wrong = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double error = std::fabs(lynx::test::rounding(problem.type())[y[i]] - due[i]);
    wrong += !(error <= problem.tolerance[i]);  // a NaN is wrong
    *worst = std::max(*worst, error / problem.tolerance[i]);
  }
  return wrong;
}

std::vector<char> negated(const std::vector<char>& halves) {
  std::vector<char> out = halves;
  for (size_t i = 1; i < out.size(); i += 2) out[i] = char(out[i] ^ 0x80);
  return out;
}

void run_tactics(const Problem& problem, const BuiltNode& node) {
  Context context(problem, node);
  for (const int32_t tactic : node.tactics) {
    const std::string name = problem.title + ": tactic " + std::to_string(tactic);
    if (!report(context.prepare(tactic), name + " set, shapes taken")) continue;
    const std::vector<uint16_t> y = context.run();
    if (!report(!y.empty(), name + " enqueued")) continue;
    double worst = 0.0, ignored = 0.0;
    const size_t wrong = wrong_elements(problem, y, problem.y, &worst);
    char detail[96];
    std::snprintf(detail, sizeof detail, "%zu of %zu wrong, error up to %.0f %% of its bound", wrong,
                  y.size(), 100.0 * worst);
    report(wrong == 0, name + " against float64", detail);
    const size_t other = wrong_elements(problem, y, problem.unpruned, &ignored);
    report(other > y.size() / 4, name + " is not what it would be without its pruning");
    report(context.run() == y && context.intact(), name + " again, same bits, nothing written outside");
  }
}

void run_graph(const Problem& problem, const BuiltNode& node) {
  Context context(problem, node);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  if (!context.prepare(0)) return void(report(false, problem.title + ": CUDA graph"));
  const std::vector<uint16_t> direct = context.run();
  context.set_x(negated(problem.inputs[0].bytes));
  const std::vector<uint16_t> other = context.run();
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  bool ok = context.enqueue(stream);
  check(cudaStreamEndCapture(stream, &graph), "end capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  ok &= direct != other;
  for (const auto* due : {&direct, &other, &direct}) {
    context.set_x(due == &direct ? problem.inputs[0].bytes : negated(problem.inputs[0].bytes));
    context.y().poison();
    check(cudaDeviceSynchronize(), "before replay");
    check(cudaGraphLaunch(executable, stream), "replay");
    check(cudaStreamSynchronize(stream), "replay");
    ok &= context.y().copy<uint16_t>() == *due;
  }
  report(ok && context.intact(), problem.title + ": CUDA graph, replayed on other inputs");
  cudaGraphExecDestroy(executable), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
}

void run_contexts(const Problem& problem, const BuiltNode& node) {
  Context a(problem, node), b(problem, node);
  b.set_x(negated(problem.inputs[0].bytes));
  if (!a.prepare(0) || !b.prepare(0)) return void(report(false, problem.title + ": two contexts"));
  const std::vector<uint16_t> alone_a = a.run(), alone_b = b.run();
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams)
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  bool ok = alone_a != alone_b;
  a.y().poison(), b.y().poison();
  check(cudaDeviceSynchronize(), "before the streams");
  for (int round = 0; round < 50; ++round) ok &= a.enqueue(streams[0]) && b.enqueue(streams[1]);
  check(cudaDeviceSynchronize(), "two streams");
  ok &= a.y().copy<uint16_t>() == alone_a && b.y().copy<uint16_t>() == alone_b && a.intact() && b.intact();
  report(ok, problem.title + ": two contexts on two streams, same bits as alone");
  for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
}

// The problem with the first of its batches alone.
Problem first_batch(const Problem& problem) {
  Problem out = problem;
  const int64_t batches = problem.inputs[0].dims[0];
  for (HostTensor& input : out.inputs) {
    if (input.dims.size() != 3 || input.type == DataType::kINT32) continue;
    input.dims[0] = 1;
    input.bytes.resize(input.bytes.size() / size_t(batches));
  }
  for (std::vector<double>* of_y : {&out.y, &out.tolerance, &out.unpruned})
    of_y->resize(of_y->size() / size_t(batches));
  return out;
}

// Fewer rows than the engine was built for, in the workspace of all; then none at all.
void run_fewer_rows(const Problem& problem, const BuiltNode& node) {
  const Problem fewer = first_batch(problem);
  Context context(fewer, node);
  double worst = 0.0;
  const std::vector<uint16_t> y = context.prepare(0) ? context.run() : std::vector<uint16_t>();
  const bool ok = !y.empty() && wrong_elements(fewer, y, fewer.y, &worst) == 0 && context.intact();
  report(ok, problem.title + ": half of the rows that the workspace was sized for");
  std::vector<PluginTensorDesc> none = static_descs(problem);
  none[0].dims.d[1] = none.back().dims.d[1] = 0;
  if (problem.plugin.rfind("LynxGated", 0) == 0) none[size_t(input_count(problem) - 1)].dims.d[1] = 0;
  auto* const runtime = runtime_of(*node.plugin);
  const std::vector<const void*> nowhere(problem.inputs.size(), nullptr);
  void* nothing = nullptr;
  report(runtime->onShapeChange(none.data(), input_count(problem), &none.back(), 1) == 0 &&
             runtime->enqueue(none.data(), &none.back(), nowhere.data(), &nothing, nullptr, nullptr) == 0,
         problem.title + ": no tokens");
}

// Threads of the host, each with a context and a stream of its own.
void run_threads(const Problem& problem, const BuiltNode& node) {
  constexpr int kThreads = 4;
  std::vector<std::unique_ptr<Context>> contexts;
  std::vector<std::vector<uint16_t>> alone;
  for (int i = 0; i < kThreads; ++i) {
    contexts.push_back(std::make_unique<Context>(problem, node));
    if (i % 2) contexts.back()->set_x(negated(problem.inputs[0].bytes));
    if (!contexts.back()->prepare(0)) return void(report(false, problem.title + ": host threads"));
    alone.push_back(contexts.back()->run());
    contexts.back()->y().poison();
  }
  check(cudaDeviceSynchronize(), "before the threads");
  std::atomic<bool> ok{true};
  std::vector<std::thread> threads;
  for (const auto& context : contexts) {
    threads.emplace_back([&ok, &context] {
      cudaStream_t stream;
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
      for (int round = 0; round < 50; ++round) {
        if (!context->prepare(0) || !context->enqueue(stream)) ok = false;
      }
      check(cudaStreamSynchronize(stream), "thread");
      cudaStreamDestroy(stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < contexts.size(); ++i) {
    if (contexts[i]->y().copy<uint16_t>() != alone[i] || !contexts[i]->intact()) ok = false;
  }
  report(ok, problem.title + ": " + std::to_string(kThreads) + " host threads at once, same bits as alone");
}

// ---- The library

struct Creators {
  using Holds = int(int fp16, int metadata_layout);
  using Fp8 = int(int fp16);

  nvinfer1::IPluginCreatorInterface* const* first;
  int32_t count;
  Holds* holds;  // null in an old library, as the next ones
  Fp8 *fp8_holds, *fp8_runs;
};

Creators load(const char* library) {
  void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);  // stays loaded, as in TensorRT
  if (handle == nullptr) {
    std::fprintf(stderr, "%s cannot be loaded (%s). Build it with: make plugin\n", library, dlerror());
    std::exit(2);
  }
  using GetCreators = nvinfer1::IPluginCreatorInterface* const*(int32_t&);
  auto* const get_creators = reinterpret_cast<GetCreators*>(dlsym(handle, "getCreators"));
  if (get_creators == nullptr || dlsym(handle, "setLoggerFinder") == nullptr) {
    std::fprintf(stderr, "%s is no TensorRT plugin library. Give liblynx_plugin.so.\n", library);
    std::exit(2);
  }
  Creators creators{};
  creators.first = get_creators(creators.count);
  creators.holds = reinterpret_cast<Creators::Holds*>(dlsym(handle, "lynx_holds"));
  creators.fp8_holds = reinterpret_cast<Creators::Fp8*>(dlsym(handle, "lynx_fp8_holds"));
  creators.fp8_runs = reinterpret_cast<Creators::Fp8*>(dlsym(handle, "lynx_fp8_runs"));
  return creators;
}

// Attributes that the creator does not declare are ones that this library has not yet.
bool knows(nvinfer1::IPluginCreatorV3One& creator, const Problem& problem) {
  const PluginFieldCollection& fields = *creator.getFieldNames();
  return std::all_of(problem.attributes.begin(), problem.attributes.end(), [&](const auto& attribute) {
    return std::any_of(fields.fields, fields.fields + fields.nbFields,
                       [&](const PluginField& field) { return attribute.first == field.name; });
  });
}

int gpu_architecture() {
  int devices = 0, major = 0, minor = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device attribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "device attribute");
  return 10 * major + minor;
}

// Whether the library has kernels for the problem, and they run on the GPU, if there is one.
bool should_build(const Creators& library, const Problem& problem, int architecture) {
  const int fp16 = problem.type() == DataType::kHALF;
  if (problem.plugin.find("Fp8") != std::string::npos)
    return library.fp8_holds(fp16) && (architecture == 0 || library.fp8_runs(fp16));
  const auto layout = problem.attributes.find("metadata_layout");
  if (layout == problem.attributes.end()) return library.holds(fp16, 80) || library.holds(fp16, 90);
  const bool runs = layout->second == 80 || architecture == 90 || architecture == 0;
  return runs && library.holds(fp16, int(layout->second));
}

// A node that could not be enqueued must not get into an engine.
void check_refused(nvinfer1::IPluginCreatorV3One& creator, const Problem& problem) {
  Fields attributes(*creator.getFieldNames(), problem.attributes);
  const std::unique_ptr<IPluginV3> plugin(
      creator.createPlugin("node", attributes.collection(), TensorRTPhase::kBUILD));
  if (!report(plugin != nullptr, problem.title + ": created")) return;
  std::vector<DataType> types;
  for (const HostTensor& input : problem.inputs) types.push_back(input.type);
  const auto descs = dynamic_descs(problem);
  const int32_t inputs = input_count(problem);
  DataType y;
  auto* const builder = build_of(*plugin);
  const bool taken = builder->getOutputDataTypes(&y, 1, types.data(), inputs) == 0 &&
                     builder->configurePlugin(descs.data(), inputs, &descs.back(), 1) == 0;
  report(!taken, problem.title + ": refused at build, for want of kernels");
}

// Threads of the host that build at once get what one alone gets.
void build_in_threads(nvinfer1::IPluginCreatorV3One& creator, const Problem& problem) {
  const auto descs = dynamic_descs(problem);
  const auto build_one = [&] {
    Fields attributes(*creator.getFieldNames(), problem.attributes);
    const std::unique_ptr<IPluginV3> made(
        creator.createPlugin("node", attributes.collection(), TensorRTPhase::kBUILD));
    const std::unique_ptr<IPluginV3> plugin(made->clone());
    auto* const builder = build_of(*plugin);
    const char* const id = builder->getTimingCacheID();
    const int32_t inputs = input_count(problem);
    const bool configured = builder->configurePlugin(descs.data(), inputs, &descs.back(), 1) == 0;
    return std::string(id == nullptr ? "no ID" : id) + (configured ? ", " : ", refused, ") +
           std::to_string(builder->getWorkspaceSize(descs.data(), inputs, &descs.back(), 1));
  };
  const std::string alone = build_one();
  std::atomic<bool> ok{true};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) {
        if (build_one() != alone) ok = false;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  report(ok, problem.title + ": built by 8 host threads at once", alone);
}

void run_problem(const Creators& library, nvinfer1::IPluginCreatorV3One& creator, const Problem& problem,
                 int architecture) {
  if (library.holds == nullptr || library.fp8_holds == nullptr || !knows(creator, problem)) {
    report(false, problem.title, "the library is of another version; build it again with: make plugin");
    return;
  }
  if (!should_build(library, problem, architecture)) return check_refused(creator, problem);
  const BuiltNode node = build(creator, problem);
  if (node.plugin == nullptr) return;
  build_in_threads(creator, problem);
  if (architecture == 0) return;
  run_tactics(problem, node);
  run_graph(problem, node);
  run_contexts(problem, node);
  run_fewer_rows(problem, node);
  run_threads(problem, node);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: plugin_host LIBRARY [TEXT]\n");
    return 2;
  }
  const Creators creators = load(argv[1]);
  const std::string only = argc > 2 ? argv[2] : "";
  const int architecture = gpu_architecture();
  for (int32_t i = 0; i < creators.count; ++i) {
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators.first[i]);
    const std::string name = creator->getPluginName();
    const std::vector<Problem> problems = lynx::test::problems_of(name);
    report(!problems.empty(), name + ": this host has problems for it");
    for (const Problem& problem : problems) {
      if (problem.title.find(only) != std::string::npos)
        run_problem(creators, *creator, problem, architecture);
    }
  }
  if (architecture == 0) std::printf("No CUDA device was found: nothing was enqueued.\n");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed > 0 ? 1 : architecture == 0 ? 77 : 0;
}
