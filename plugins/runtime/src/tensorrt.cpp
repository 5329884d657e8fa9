// SPDX-License-Identifier: Apache-2.0
#include "tensorrt.h"

#include "log.h"
#include "tensor.h"

// Exported by libnvinfer, libnvinfer_lean and libtensorrt_rtx alike.
extern "C" {
void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept;
void* getPluginRegistry() noexcept;
int32_t getInferLibVersion() noexcept;
int32_t getInferLibMajorVersion() noexcept;
int32_t getInferLibMinorVersion() noexcept;
int32_t getInferLibPatchVersion() noexcept;
int32_t getInferLibBuildVersion() noexcept;
}

namespace lynx::tensorrt {
namespace {

constexpr int32_t kMostDimensions = 8;
constexpr int32_t kDestructor = 1;    // the one that also frees; in the table of the interface itself
constexpr int32_t kInputMode = 1;     // TensorIOMode::kINPUT
constexpr int32_t kStaticMemory = 0;  // ExecutionContextAllocationStrategy::kSTATIC

struct Dims {  // nvinfer1::Dims64
  int32_t count;
  int64_t extent[kMostDimensions];
};

// TensorRT's classes hold a table of functions and, but for the registry, a pointer to the object whose table
// has the functions that count.
struct Object {
  void** functions;
  void* implementation;
};

// Calls function `slot` of the object's table. The platform's C++ ABI passes `this` as a first argument.
template <class Result, class... Arguments>
Result call(void* object, int32_t slot, Arguments... arguments) {
  using Function = Result(void*, Arguments...);
  return reinterpret_cast<Function*>(static_cast<Object*>(object)->functions[slot])(object, arguments...);
}

template <class Result, class... Arguments>
Result call(const Interface& interface, int32_t slot, Arguments... arguments) {
  return call<Result>(static_cast<Object*>(interface.get())->implementation, slot, arguments...);
}

// nvinfer1::ILogger of TensorRT 10.
struct PlainLogger {
  virtual void log(int32_t severity, const char* message) noexcept { log_message(severity, message); }
  virtual ~PlainLogger() = default;
};

// nvinfer1::ILogger since TensorRT 11: an IVersionedInterface.
struct VersionedLogger {
  struct Info {
    const char* kind;
    int32_t major, minor;
  };
  virtual int32_t language() const noexcept { return 0; }  // C++
  virtual Info info() const noexcept { return {"ILogger", 1, 0}; }
  virtual ~VersionedLogger() = default;
  virtual void log(int32_t severity, const char* message) noexcept { log_message(severity, message); }
};

// Never destroyed: TensorRT keeps the process's first logger.
void* logger(const Layout& layout) {
  static void* const made =
      layout.versioned_logger ? static_cast<void*>(new VersionedLogger) : static_cast<void*>(new PlainLogger);
  return made;
}

const Layout& layout() {
  static const Layout& found = *library().layout;
  return found;
}

[[noreturn]] void fail(const CallErrors& errors, const std::string& cause, const std::string& remedy) {
  throw Error(cause + errors.said(), remedy);
}

Dims dims_of(const std::vector<int64_t>& shape) {
  if (shape.size() > size_t(kMostDimensions))
    throw Error("A tensor has at most 8 extents.", "Give the engine's.");
  Dims out{};
  out.count = int32_t(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) out.extent[i] = shape[i];
  return out;
}

std::vector<int64_t> extents_of(const Dims& dims) {
  if (dims.count < 0 || dims.count > kMostDimensions) return {};  // TensorRT's word for an unknown name
  return {dims.extent, dims.extent + dims.count};
}

}  // namespace

Library library() {
  const int32_t major = getInferLibMajorVersion(), minor = getInferLibMinorVersion();
  Library out;
  out.backend = major < 8 ? "tensorrt_rtx" : "tensorrt";
  out.version = std::to_string(major) + "." + std::to_string(minor) + "." +
                std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
  out.layout = layout_of(major, minor);
  if (out.layout == nullptr) {
    throw Error(
        "This program was not tested with " + out.backend + " " + out.version + ".",
        "Use TensorRT 10.13 to 10.16 or 11.0 to 11.4, TensorRT for RTX 1.7, or a newer lynx-compile.");
  }
  return out;
}

const Layout* layout_of(int32_t major, int32_t minor) {
  if (major == 10 && minor >= 13 && minor <= 16) return &kTensorRT10;
  if (major == 11 && minor >= 0 && minor <= 4) return &kTensorRT11;
  if (major == 1 && minor == 7) return &kTensorRT11;  // TensorRT for RTX
  return nullptr;
}

void Destroy::operator()(void* interface) const noexcept { call<void>(interface, kDestructor); }

void load_plugin_library(const std::string& path) {
  const CallErrors errors;
  logger(layout());
  void* const registry = getPluginRegistry();
  if (registry == nullptr || call<void*>(registry, layout().load_library, path.c_str()) == nullptr) {
    fail(errors, "TensorRT cannot load the plugin library " + path + ".", "Build it again on this machine.");
  }
}

Interface create_runtime() {
  const CallErrors errors;
  Interface runtime(createInferRuntime_INTERNAL(logger(layout()), getInferLibVersion()));
  if (runtime == nullptr) fail(errors, "TensorRT cannot start.", "Check the GPU's driver with nvidia-smi.");
  return runtime;
}

Interface deserialize(const Interface& runtime, const std::byte* plan, size_t bytes,
                      const std::string& path) {
  const CallErrors errors;
  Interface engine(call<void*>(runtime, layout().deserialize, static_cast<const void*>(plan), bytes));
  if (engine == nullptr) {
    fail(errors, "TensorRT cannot load " + path + ".",
         "Free memory on the GPU if it says so; else compile the engine again here.");
  }
  return engine;
}

std::vector<NamedTensor> tensors(const Interface& engine) {
  std::vector<NamedTensor> out;
  const auto count = call<int32_t>(engine, layout().tensor_count);
  for (int32_t i = 0; i < count; ++i) {
    const auto* const name = call<const char*>(engine, layout().tensor_name, i);
    const auto type = call<int32_t>(engine, layout().tensor_dtype, name);
    const auto dims = call<Dims>(engine, layout().tensor_shape, name);
    const auto mode = call<int32_t>(engine, layout().tensor_mode, name);
    out.push_back({{name, tensorrt_dtype(type), extents_of(dims)}, mode == kInputMode});
  }
  return out;
}

Interface create_context(const Interface& engine) {
  const CallErrors errors;
  Interface context(call<void*>(engine, layout().create_context, kStaticMemory));
  if (context == nullptr)
    fail(errors, "TensorRT cannot create an execution context.", "Free memory on the GPU.");
  return context;
}

void set_address(const Interface& context, const std::string& name, void* address) {
  const CallErrors errors;
  if (!call<bool>(context, layout().set_tensor_address, name.c_str(), address)) {
    fail(errors, "TensorRT refuses the address of '" + name + "'.",
         "Give device memory of the engine's GPU.");
  }
}

void set_shape(const Interface& context, const std::string& input, const std::vector<int64_t>& shape) {
  const CallErrors errors;
  const Dims dims = dims_of(shape);
  if (!call<bool>(context, layout().set_input_shape, input.c_str(), &dims)) {
    fail(errors, "TensorRT refuses the shape of '" + input + "'.",
         "Give one within the engine's profile, or compile again with others.");
  }
}

std::vector<int64_t> shape(const Interface& context, const std::string& name) {
  return extents_of(call<Dims>(context, layout().context_tensor_shape, name.c_str()));
}

void enqueue(const Interface& context, cudaStream_t stream) {
  const CallErrors errors;
  if (!call<bool>(context, layout().enqueue, stream)) {
    fail(errors, "TensorRT refuses to run the engine.",
         "Bind all inputs and outputs, and see TensorRT's messages.");
  }
}

}  // namespace lynx::tensorrt
