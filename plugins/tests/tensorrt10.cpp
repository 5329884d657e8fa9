// SPDX-License-Identifier: Apache-2.0
// Stands in for TensorRT 10 towards the plugin library: its version, its loggers by the layout of its
// headers, and the steps by which its registry loads a library. TensorRT 11 and TensorRT-RTX can be had
// without a GPU and are tested themselves; TensorRT 10 cannot. Built as a shared library, driven by
// tests/plugins/test_registry.py.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

static_assert(NV_TENSORRT_MAJOR == 10, "the layouts under test are those of TensorRT 10's headers");

namespace {

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity == Severity::kERROR) messages += std::string(message) + "\n";
  }
  std::string messages;
};

Logger builder_logger, engine_logger;

struct Finder : nvinfer1::ILoggerFinder {
  nvinfer1::ILogger* findLogger() override { return in_engine ? &engine_logger : nullptr; }
  bool in_engine = false;
};

}  // namespace

extern "C" {

int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
nvinfer1::ILogger* getLogger() noexcept { return &builder_logger; }

// Loads the library, asks for a plugin of a bad rank, and returns what was logged: to the builder's logger,
// or, when `in_engine`, to the engine's. "created" when a plugin came, "no library" when it does not load.
const char* probe(const char* library, int in_engine) {
  static Finder finder;
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return "no library";
  using SetFinder = void(nvinfer1::ILoggerFinder*);
  using GetCreators = nvinfer1::IPluginCreatorInterface* const*(int32_t&);
  reinterpret_cast<SetFinder*>(dlsym(handle, "setLoggerFinder"))(&finder);
  int32_t count = 0;
  auto* const* creators = reinterpret_cast<GetCreators*>(dlsym(handle, "getCreators"))(count);
  if (count < 1) return "no creator";
  auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
  const int32_t rank = 24;
  const nvinfer1::PluginField field("rank", &rank, nvinfer1::PluginFieldType::kINT32, 1);
  const nvinfer1::PluginFieldCollection fields{1, &field};
  finder.in_engine = in_engine != 0;
  builder_logger.messages.clear(), engine_logger.messages.clear();
  if (creator->createPlugin("linear", &fields, nvinfer1::TensorRTPhase::kBUILD) != nullptr) return "created";
  return (in_engine ? engine_logger : builder_logger).messages.c_str();
}

}  // extern "C"
