// SPDX-License-Identifier: Apache-2.0
// Stands in for TensorRT 10: its exported functions, and objects whose tables have the layout of TensorRT
// 10's own headers. A call of any function but those below ends the process, so that a wrong layout cannot
// pass.
#include <NvInferRuntime.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>

#include "fakes.h"

static_assert(NV_TENSORRT_MAJOR == 10, "the layout under test is that of TensorRT 10's headers");

namespace fake {

TensorRT& tensorrt() {
  static TensorRT state;
  return state;
}

namespace {

using nvinfer1::Dims;
using nvinfer1::apiv::VCudaEngine;
using nvinfer1::apiv::VExecutionContext;
using nvinfer1::apiv::VRuntime;

// Where a virtual function stands in its class's table: what the platform's C++ ABI keeps in a member
// pointer.
template <class Function>
size_t slot(Function function) {
  static_assert(sizeof function == 2 * sizeof(size_t));
  size_t words[2];
  std::memcpy(words, &function, sizeof words);
#if defined(__aarch64__)
  return words[0] / sizeof(void*);
#else
  return (words[0] - 1) / sizeof(void*);
#endif
}

[[noreturn]] void unexpected() {
  std::fprintf(stderr, "FAIL: a function of TensorRT was called that the runtime does not use\n");
  std::abort();
}

constexpr size_t kSlots = 160;
struct Table {
  Table() { functions.fill(reinterpret_cast<void*>(&unexpected)); }
  template <class Function>
  void set(size_t slot, Function* function) {
    functions.at(slot) = reinterpret_cast<void*>(function);
  }
  std::array<void*, kSlots> functions;
};

// An interface (whose table has the destructors alone) and its implementation.
struct Object {
  void* const* functions;
  Object* implementation;
  void* owner;  // what both are part of; TensorRT has its own data there
};

struct Logger {
  virtual void log(int32_t severity, const char* message) noexcept = 0;
};
Logger* logger = nullptr;

std::nullptr_t refuse(const char* message) {
  logger->log(1, message);
  return nullptr;
}

struct FakeTensor {
  nvinfer1::TensorIOMode mode;
  std::string name;
  int32_t type;
  std::vector<int64_t> shape;
};

struct FakeEngine {
  Object interface{}, implementation{};
  std::vector<FakeTensor> tensors;
};

struct FakeContext {
  Object interface{}, implementation{};
  FakeEngine* engine = nullptr;
  std::map<std::string, Bound> bound;
};

// What an interface or implementation belongs to.
template <class T>
T* owner(void* object) {
  return static_cast<T*>(static_cast<Object*>(object)->owner);
}

template <class T>
void join(T& object, const Table& interface, const Table& implementation) {
  object.interface = {interface.functions.data(), &object.implementation, &object};
  object.implementation = {implementation.functions.data(), nullptr, &object};
}

// ---- Execution contexts

void destroy_context(void* interface) {
  delete owner<FakeContext>(interface);
  --tensorrt().contexts;
}

bool set_address(void* self, const char* name, void* address) {
  if (tensorrt().refuse_address) return refuse("an address was refused"), false;
  owner<FakeContext>(self)->bound.at(name).address = address;
  return true;
}

bool set_input_shape(void* self, const char* name, const Dims* dims) {
  std::vector<int64_t>& shape = owner<FakeContext>(self)->bound.at(name).shape;
  if (size_t(dims->nbDims) != shape.size()) return refuse("a shape was refused"), false;
  shape.assign(dims->d, dims->d + dims->nbDims);
  return true;
}

Dims dims_of(const std::vector<int64_t>& shape) {
  Dims out{};
  out.nbDims = int32_t(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) out.d[i] = shape[i];
  return out;
}

Dims context_shape(void* self, const char* name) {
  return dims_of(owner<FakeContext>(self)->bound.at(name).shape);
}

bool enqueue(void* self, cudaStream_t) {
  auto& bound = owner<FakeContext>(self)->bound;
  for (const auto& [name, tensor] : bound) {
    if (tensor.address == nullptr || tensorrt().refuse_run)
      return refuse(("the address of " + name + " is not set").c_str()), false;
  }
  run(bound);
  return true;
}

const Table& context_interface() {
  static const Table table = [] {
    Table out;
    out.set(1, &destroy_context);
    return out;
  }();
  return table;
}

const Table& context_implementation() {
  static const Table table = [] {
    Table out;
    out.set(slot(&VExecutionContext::setTensorAddress), &set_address);
    out.set(slot(&VExecutionContext::setInputShape), &set_input_shape);
    out.set(slot(&VExecutionContext::getTensorShape), &context_shape);
    out.set(slot(&VExecutionContext::enqueueV3), &enqueue);
    return out;
  }();
  return table;
}

// ---- Engines

void destroy_engine(void* interface) {
  delete owner<FakeEngine>(interface);
  --tensorrt().engines;
}

int32_t tensor_count(void* self) { return int32_t(owner<FakeEngine>(self)->tensors.size()); }
const char* tensor_name(void* self, int32_t i) {
  return owner<FakeEngine>(self)->tensors.at(size_t(i)).name.c_str();
}

const FakeTensor& tensor_named(void* self, const char* name) {
  for (const FakeTensor& tensor : owner<FakeEngine>(self)->tensors) {
    if (tensor.name == name) return tensor;
  }
  unexpected();
}
int32_t tensor_mode(void* self, const char* name) { return int32_t(tensor_named(self, name).mode); }
int32_t tensor_type(void* self, const char* name) { return tensor_named(self, name).type; }
Dims tensor_shape(void* self, const char* name) { return dims_of(tensor_named(self, name).shape); }

void* create_context(void* self, int32_t strategy) {
  if (strategy != int32_t(nvinfer1::ExecutionContextAllocationStrategy::kSTATIC)) unexpected();
  if (tensorrt().refuse_context) return refuse("no context was made");
  auto context = std::make_unique<FakeContext>();
  join(*context, context_interface(), context_implementation());
  context->engine = owner<FakeEngine>(self);
  for (const FakeTensor& tensor : context->engine->tensors)
    context->bound[tensor.name] = {tensor.shape, nullptr};
  ++tensorrt().contexts;
  return &context.release()->interface;
}

const Table& engine_interface() {
  static const Table table = [] {
    Table out;
    out.set(1, &destroy_engine);
    return out;
  }();
  return table;
}

const Table& engine_implementation() {
  using Create =
      nvinfer1::IExecutionContext* (VCudaEngine::*)(nvinfer1::ExecutionContextAllocationStrategy) noexcept;
  static const Table table = [] {
    Table out;
    out.set(slot(&VCudaEngine::getNbIOTensors), &tensor_count);
    out.set(slot(&VCudaEngine::getIOTensorName), &tensor_name);
    out.set(slot(&VCudaEngine::getTensorIOMode), &tensor_mode);
    out.set(slot(&VCudaEngine::getTensorDataType), &tensor_type);
    out.set(slot(&VCudaEngine::getTensorShape), &tensor_shape);
    out.set(slot(static_cast<Create>(&VCudaEngine::createExecutionContext)), &create_context);
    return out;
  }();
  return table;
}

// ---- Runtimes

struct FakeRuntime {
  Object interface{}, implementation{};
};

void destroy_runtime(void* interface) {
  delete owner<FakeRuntime>(interface);
  --tensorrt().runtimes;
}

void* deserialize(void*, const void* plan, size_t bytes) {
  std::istringstream lines(std::string(static_cast<const char*>(plan), bytes));
  std::string line;
  if (tensorrt().refuse_engine || !std::getline(lines, line) || line != "fake engine")
    return refuse("this is no engine.");
  auto engine = std::make_unique<FakeEngine>();
  join(*engine, engine_interface(), engine_implementation());
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::string mode;
    FakeTensor tensor;
    words >> mode >> tensor.name >> tensor.type;
    if (mode != "input" && mode != "output") continue;
    tensor.mode = mode == "input" ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
    tensor.shape.assign(std::istream_iterator<int64_t>(words), {});
    engine->tensors.push_back(tensor);
  }
  ++tensorrt().engines;
  return &engine.release()->interface;
}

void* load_library(void*, const char* path) {
  if (tensorrt().refuse_library) return refuse("the library was refused");
  tensorrt().libraries.emplace_back(path);
  return tensorrt().libraries.data();
}

}  // namespace
}  // namespace fake

using fake::Table;

extern "C" {

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  static const Table interface = [] {
    Table out;
    out.set(1, &fake::destroy_runtime);
    return out;
  }();
  static const Table implementation = [] {
    using Deserialize = nvinfer1::ICudaEngine* (fake::VRuntime::*)(const void*, size_t) noexcept;
    Table out;
    out.set(fake::slot(static_cast<Deserialize>(&fake::VRuntime::deserializeCudaEngine)), &fake::deserialize);
    return out;
  }();
  if (version / 10000 != NV_TENSORRT_MAJOR) return nullptr;
  fake::logger = static_cast<fake::Logger*>(logger);
  auto* const runtime = new fake::FakeRuntime;
  fake::join(*runtime, interface, implementation);
  ++fake::tensorrt().runtimes;
  return &runtime->interface;
}

nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  static const Table functions = [] {
    Table out;
    out.set(fake::slot(&nvinfer1::IPluginRegistry::loadLibrary), &fake::load_library);
    return out;
  }();
  static fake::Object registry{functions.functions.data(), nullptr, nullptr};
  return reinterpret_cast<nvinfer1::IPluginRegistry*>(&registry);
}

int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
int32_t getInferLibPatchVersion() noexcept { return 1; }
int32_t getInferLibBuildVersion() noexcept { return 48; }

}  // extern "C"
