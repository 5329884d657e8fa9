// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>

namespace lynx {

// TensorRT 11 and TensorRT-RTX 1.7 made ILogger and ILoggerFinder versioned interfaces, which moved their
// functions in the virtual table, while the plugin interfaces stayed as they were. So one library serves
// both, except that these two must be called by the layout of the TensorRT that loads it and not by that of
// the headers it was built with. (They have external linkage: of a class in an unnamed namespace the compiler
// knows that nobody implements it.)
struct PlainLogger {  // TensorRT 10
  virtual void log(int32_t severity, const char* message) noexcept = 0;
};
struct PlainLoggerFinder {
  virtual void* findLogger() = 0;
};
struct VersionedLogger : nvinfer1::IVersionedInterface {
  virtual void log(int32_t severity, const char* message) noexcept = 0;
};
struct VersionedLoggerFinder : nvinfer1::IVersionedInterface {
  virtual void* findLogger() = 0;
};

namespace {

constexpr int32_t kErrorSeverity = 1;

std::atomic<void*> logger_finder{nullptr};

// The TensorRT that loaded us: whichever library made the finder. We link with none, as several may load us.
class TensorRT {
 public:
  explicit TensorRT(const void* finder) {
    const void* virtual_table = *static_cast<const void* const*>(finder);
    Dl_info info;
    if (dladdr(virtual_table, &info) != 0) handle_ = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }
  ~TensorRT() {
    if (handle_ != nullptr) dlclose(handle_);
  }
  TensorRT(const TensorRT&) = delete;
  TensorRT& operator=(const TensorRT&) = delete;

  // The version as one number, 1104 for 11.4; 0 when it cannot be told.
  int32_t version() const {
    const auto major = function<int32_t()>("getInferLibMajorVersion");
    const auto minor = function<int32_t()>("getInferLibMinorVersion");
    return major && minor ? 100 * major() + minor() : 0;
  }

  // The logger of the builder or runtime: the finder knows none while a network is parsed and built.
  void* global_logger() const {
    const auto get_logger = function<void*()>("getLogger");
    return get_logger ? get_logger() : nullptr;
  }

 private:
  template <class Function>
  Function* function(const char* name) const {
    return handle_ == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(handle_, name));
  }

  void* handle_ = nullptr;
};

bool is_versioned(int32_t version) {
  return version >= 1100 || (version >= 107 && version < 800);
}  // 1.x: RTX
bool is_plain(int32_t version) { return version >= 1000 && version < 1100; }

// Returns whether a logger took the message.
template <class Logger, class LoggerFinder>
bool log_by(void* finder, const TensorRT& tensorrt, const char* message) {
  void* logger = static_cast<LoggerFinder*>(finder)->findLogger();
  if (logger == nullptr) logger = tensorrt.global_logger();
  if (logger == nullptr) return false;
  static_cast<Logger*>(logger)->log(kErrorSeverity, message);
  return true;
}

bool log_to_tensorrt(const char* message) {
  void* finder = logger_finder.load();
  if (finder == nullptr) return false;
  const TensorRT tensorrt(finder);
  const int32_t version = tensorrt.version();
  if (is_versioned(version)) return log_by<VersionedLogger, VersionedLoggerFinder>(finder, tensorrt, message);
  if (is_plain(version)) return log_by<PlainLogger, PlainLoggerFinder>(finder, tensorrt, message);
  return false;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder.store(finder); }

void log_error(const char* message) noexcept {
  if (!log_to_tensorrt(message)) std::fprintf(stderr, "%s\n", message);
}

}  // namespace lynx
