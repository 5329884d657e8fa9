// SPDX-License-Identifier: Apache-2.0
// Runs an engine that lynx-compile made. Link with LynxCompile::runtime (find_package(LynxCompile)).
//
//   lynx::Engine engine = lynx::Engine::open("flux.engine");
//   for (const lynx::Tensor& input : engine.inputs()) engine.bind(input.name, device_memory_for(input));
//   for (const lynx::Tensor& output : engine.outputs()) engine.bind(output.name, device_memory_for(output));
//   engine.enqueue(stream);
//
// Every failure is a lynx::Error that says what happened and what to do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

typedef struct CUstream_st* cudaStream_t;  // as in CUDA's own headers, which are not needed here

namespace lynx {

class Error : public std::runtime_error {
 public:
  Error(const std::string& cause,
        const std::string& remedy);  // on one line: control characters become spaces
  const std::string& cause() const noexcept { return cause_; }    // what happened, a sentence
  const std::string& remedy() const noexcept { return remedy_; }  // what to do, a sentence

 private:
  std::string cause_, remedy_;
};

// An input or output: dense and row-major. An extent of -1 is decided by each run.
struct Tensor {
  std::string name;
  std::string dtype;  // bf16, fp16, fp32, int32, int64, bool ...
  std::vector<int64_t> shape;

  // Bytes of all elements; an Error for a dtype that this version does not know or an open extent.
  size_t bytes() const;
};

// What TensorRT has to say: severity 0 (internal error), 1 (error), 2 (warning), 3 (info), 4 (verbose).
using Log = std::function<void(int severity, const char* message)>;

// Where TensorRT's messages go: one log for the process, called from any thread. None at first; errors are
// part of what is thrown in any case.
void set_log(Log log);

struct Options {
  // The plugin library. Empty: the one beside the engine, if it is there; else the copy inside the engine.
  std::string plugin_library;
};

// One execution at a time of an engine: addresses and activations of its own, the engine's weights. Keeps the
// engine alive. Calls of one context must not overlap; contexts are independent of each other.
class Context {
 public:
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;
  ~Context();  // all that was enqueued must be done

  // Gives an input or output its device memory, for this and later calls of enqueue. The memory must be
  // 256-byte aligned and outlive them. A weight's name (one of the engine's external weights, such as a
  // LoRA's) takes another tensor of the same shape.
  void bind(const std::string& name, void* device_memory);

  // The extents of an input where the engine leaves some open.
  void set_shape(const std::string& input, const std::vector<int64_t>& shape);

  // A tensor's extents as they are now.
  std::vector<int64_t> shape(const std::string& name) const;

  // Queues one run. May be captured into a CUDA graph, after a first run.
  void enqueue(cudaStream_t stream);

 private:
  friend class Engine;
  struct Impl;
  explicit Context(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// An engine in the memory of the current GPU, with a first context. Frees everything when it and the last of
// its contexts are gone.
class Engine {
 public:
  // Loads OUT.engine with what lies beside it: the manifest OUT.json and, if the weights are external, their
  // safetensors file. Sizes, digests, the versions of TensorRT and the GPU are checked before TensorRT sees
  // anything, and no code is run but the plugin library that the manifest names.
  static Engine open(const std::string& path, const Options& options = {});

  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  const std::vector<Tensor>& inputs() const noexcept;  // without the external weights
  const std::vector<Tensor>& outputs() const noexcept;
  const std::vector<Tensor>& weights() const noexcept;  // the external ones; bound already

  // The first context's.
  void bind(const std::string& name, void* device_memory);
  void set_shape(const std::string& input, const std::vector<int64_t>& shape);
  std::vector<int64_t> shape(const std::string& name) const;
  void enqueue(cudaStream_t stream);

  // A further context, for another stream.
  Context create_context();

 private:
  friend class Context;
  struct Impl;
  Engine(std::shared_ptr<Impl> impl, Context context);
  std::shared_ptr<Impl> impl_;
  Context context_;
};

}  // namespace lynx
