// SPDX-License-Identifier: Apache-2.0
#include "lynx/engine.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "file.h"
#include "gpu.h"
#include "host_code.h"
#include "manifest.h"
#include "sha256.h"
#include "tensor.h"
#include "tensorrt.h"
#include "weights.h"

namespace lynx {
namespace {

constexpr uintptr_t kAlignment = 256;
constexpr const char* kFiles = "Copy the engine's files again, all of them, or compile it again.";

// As files/outputs.py names it: beside the engine, by its whole name but for ".engine".
std::string manifest_path(const std::string& engine) {
  const std::string suffix = ".engine";
  const size_t name = engine.rfind('/') + 1;
  if (engine.size() <= name + suffix.size()) return engine + ".json";
  const size_t base = engine.size() - suffix.size();
  return (engine.compare(base, suffix.size(), suffix) == 0 ? engine.substr(0, base) : engine) + ".json";
}

// TensorRT runs only engines of its very own version.
void check_version(const Manifest& manifest, const std::string& path) {
  const tensorrt::Library library = tensorrt::library();
  if (manifest.backend == library.backend && manifest.backend_version == library.version) return;
  throw Error(path + " was built by " + manifest.backend + " " + manifest.backend_version +
                  ", and this program runs with " + library.backend + " " + library.version + ".",
              "Link with the first, or compile the engine again with the second.");
}

void check_gpu(const Manifest& manifest, const std::string& path) {
  const std::string here = gpu_architecture();
  if (runs_on(manifest, here)) return;
  std::string built;
  for (const std::string& gpu : manifest.gpus) built += (built.empty() ? "" : ", ") + gpu;
  throw Error(path + " was built by " + manifest.backend + " for " + built + ", and the GPU here is " + here +
                  ", which cannot run that.",
              "Compile it again for " + here + " (engine.gpus in the recipe, or backend: tensorrt here).");
}

void check_plan(const Manifest& manifest, const FileBytes& plan, const std::string& path) {
  if (plan.bytes != manifest.engine_bytes) {
    const char* const what =
        plan.bytes < manifest.engine_bytes ? " is cut off: it has " : " is too long: it has ";
    throw Error(
        path + what + std::to_string(plan.bytes) + " of " + std::to_string(manifest.engine_bytes) + " bytes.",
        kFiles);
  }
  if (sha256(plan.data.get(), plan.bytes) != manifest.engine_sha256)
    throw Error(path + " is damaged, or of another manifest (SHA-256).", kFiles);
}

// The library to load; empty where the engine's own copy, of which there are `copies`, will do.
std::string plugin_library(const Manifest& manifest, const std::string& path, const Options& options,
                           int copies) {
  const std::string beside_it = beside(path, manifest.plugin_library);
  const std::string library = options.plugin_library.empty() ? beside_it : options.plugin_library;
  if (options.plugin_library.empty() && !is_file(beside_it)) {
    if (copies > 0) return "";
    throw Error(path + " needs " + manifest.plugin_library + ", which is neither beside it nor inside it.",
                "Put the one that it was built with there, or name it in Options::plugin_library.");
  }
  const FileBytes file = read_file(library, "plugin library");
  const std::string found = sha256(file.data.get(), file.bytes);
  if (found == manifest.plugin_sha256) return library;
  throw Error(path + " was built with a " + manifest.plugin_library + " of SHA-256 " +
                  manifest.plugin_sha256.substr(0, 12) + "..., and " + library + " has " +
                  found.substr(0, 12) + "....",
              "Use the one that it was built with, or compile the engine again.");
}

// TensorRT's registry keeps a library for good, and one of each plugin: also the copy inside an engine, which
// TensorRT loads itself, so that its digest counts as much as a file's.
void load_plugin(const std::string& library, const std::string& digest, const std::string& path) {
  static std::mutex mutex;
  static std::string loaded;
  const std::lock_guard lock(mutex);
  if (loaded == digest) return;
  if (!loaded.empty()) {
    throw Error("This process has loaded a plugin library of SHA-256 " + loaded.substr(0, 12) + "..., and " +
                    path + " needs one of " + digest.substr(0, 12) + "....",
                "Use one library per process.");
  }
  if (!library.empty()) tensorrt::load_plugin_library(library);
  loaded = digest;
}

bool same(const Tensor& a, const Tensor& b) {
  return a.name == b.name && a.dtype == b.dtype && a.shape == b.shape;
}

// The engine's own inputs and outputs are the manifest's.
void check_tensors(const Manifest& manifest, const tensorrt::Interface& engine, const std::string& path) {
  std::vector<tensorrt::NamedTensor> due;
  for (const auto* inputs : {&manifest.inputs, &manifest.weights}) {
    for (const Tensor& tensor : *inputs) due.push_back({tensor, true});
  }
  for (const Tensor& tensor : manifest.outputs) due.push_back({tensor, false});
  const std::vector<tensorrt::NamedTensor> found = tensorrt::tensors(engine);
  const auto refuse_missing = [&](const auto& wanted, const auto& there, const char* verb) {
    for (const tensorrt::NamedTensor& one : wanted) {
      const bool has = std::any_of(there.begin(), there.end(), [&](const tensorrt::NamedTensor& other) {
        return other.is_input == one.is_input && same(other.tensor, one.tensor);
      });
      if (has) continue;
      throw Error(path + verb + (one.is_input ? "input '" : "output '") + one.tensor.name + "', " +
                      said(one.tensor) + ", unlike its manifest says.",
                  kFiles);
    }
  };
  refuse_missing(due, found, " has no ");
  refuse_missing(found, due, " has an ");
}

}  // namespace

struct Engine::Impl {
  Manifest manifest;
  tensorrt::Interface runtime;  // outlives the engine
  tensorrt::Interface engine;
  Weights weights;

  const Tensor* find(const std::string& name) const {
    for (const auto* tensors : {&manifest.inputs, &manifest.outputs, &manifest.weights}) {
      for (const Tensor& tensor : *tensors) {
        if (tensor.name == name) return &tensor;
      }
    }
    return nullptr;
  }
};

struct Context::Impl {
  std::shared_ptr<Engine::Impl> engine;  // outlives the context
  tensorrt::Interface context;

  explicit Impl(std::shared_ptr<Engine::Impl> of)
      : engine(std::move(of)), context(tensorrt::create_context(engine->engine)) {
    for (const auto& [name, address] : engine->weights.addresses)
      tensorrt::set_address(context, name, address);
  }

  void check_name(const std::string& name) const {
    if (engine->find(name) != nullptr) return;
    std::string names;
    for (const auto* tensors : {&engine->manifest.inputs, &engine->manifest.outputs}) {
      for (const Tensor& tensor : *tensors) names += (names.empty() ? "" : ", ") + tensor.name;
    }
    throw Error("The engine has no tensor '" + name + "'.", "It has " + names + ".");
  }
};

Context::Context(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

void Context::bind(const std::string& name, void* device_memory) {
  impl_->check_name(name);
  if (device_memory == nullptr || reinterpret_cast<uintptr_t>(device_memory) % kAlignment != 0) {
    throw Error("The memory for '" + name + "' does not begin at a multiple of 256 bytes.",
                "Give what cudaMalloc returns.");
  }
  tensorrt::set_address(impl_->context, name, device_memory);
}

void Context::set_shape(const std::string& input, const std::vector<int64_t>& shape) {
  impl_->check_name(input);
  tensorrt::set_shape(impl_->context, input, shape);
}

std::vector<int64_t> Context::shape(const std::string& name) const {
  impl_->check_name(name);
  return tensorrt::shape(impl_->context, name);
}

void Context::enqueue(cudaStream_t stream) { tensorrt::enqueue(impl_->context, stream); }

Engine::Engine(std::shared_ptr<Impl> impl, Context context)
    : impl_(std::move(impl)), context_(std::move(context)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Engine Engine::open(const std::string& path, const Options& options) {
  auto impl = std::make_shared<Impl>();
  const FileBytes plan = read_file(path, "engine");
  const Manifest& manifest = impl->manifest = read_manifest(manifest_path(path));
  check_version(manifest, path);
  check_gpu(manifest, path);
  check_plan(manifest, plan, path);
  const bool external = !manifest.weights_file.empty();
  const std::unique_ptr<WeightsFile> weights =
      open_weights(external ? beside(path, manifest.weights_file) : "", manifest.weights);
  const int copies = check_host_code(path, plan.data.get(), plan.bytes, manifest.plugin_sha256);
  load_plugin(plugin_library(manifest, path, options, copies), manifest.plugin_sha256, path);
  impl->runtime = tensorrt::create_runtime();
  impl->engine = tensorrt::deserialize(impl->runtime, plan.data.get(), plan.bytes, path);
  check_tensors(manifest, impl->engine, path);
  if (weights != nullptr) impl->weights = load_weights(*weights, manifest.weights_sha256, manifest.weights);
  Context first(std::make_unique<Context::Impl>(impl));
  return Engine(std::move(impl), std::move(first));
}

const std::vector<Tensor>& Engine::inputs() const noexcept { return impl_->manifest.inputs; }
const std::vector<Tensor>& Engine::outputs() const noexcept { return impl_->manifest.outputs; }
const std::vector<Tensor>& Engine::weights() const noexcept { return impl_->manifest.weights; }

void Engine::bind(const std::string& name, void* device_memory) { context_.bind(name, device_memory); }
void Engine::set_shape(const std::string& input, const std::vector<int64_t>& shape) {
  context_.set_shape(input, shape);
}
std::vector<int64_t> Engine::shape(const std::string& name) const { return context_.shape(name); }
void Engine::enqueue(cudaStream_t stream) { context_.enqueue(stream); }

Context Engine::create_context() { return Context(std::make_unique<Context::Impl>(impl_)); }

}  // namespace lynx
