// SPDX-License-Identifier: Apache-2.0
// What the runtime uses of TensorRT, called by the binary interface of the library that was linked and not by
// that of some headers: TensorRT 11 and TensorRT for RTX 1.7 removed functions from the tables of TensorRT
// 10, so that code built with TensorRT 10's headers calls other functions than it names, and RTX's own
// headers come with its SDK alone. tests/runtime_cpp/test_layout.py compares the tables with those of
// NVIDIA's Python bindings and headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lynx/engine.h"

namespace lynx::tensorrt {

// Where functions stand in the tables of nvinfer1::apiv::VRuntime, VCudaEngine and VExecutionContext, and of
// IPluginRegistry.
struct Layout {
  int32_t deserialize;
  int32_t tensor_count, tensor_name, tensor_mode, tensor_shape, tensor_dtype, create_context;
  int32_t set_tensor_address, set_input_shape, context_tensor_shape, enqueue;
  int32_t load_library;
  bool versioned_logger;  // ILogger is an IVersionedInterface
};
inline constexpr Layout kTensorRT10 = {3, 30, 31, 23, 19, 20, 5, 24, 21, 22, 37, 10, false};
inline constexpr Layout kTensorRT11 = {3,  26, 27, 19, 15, 16,  5,
                                       23, 20, 21, 36, 6,  true};  // and RTX from 1.7 on

// Of the library that was linked.
struct Library {
  std::string backend;  // as in manifests: "tensorrt" or "tensorrt_rtx"
  std::string version;  // "1.7.1.116"
  const Layout* layout;
};
// An Error for a version whose layout is not known.
Library library();

// The layout of a version; null for one that was not tested. Functions have moved from one version to another
// before, and a call of the wrong one is no error but a crash or worse, so a future minor waits until its
// headers or bindings have passed tests/runtime_cpp/test_layout.py (or tests/layout_of_headers.cpp): 10.13
// to 11.1 did by headers, 11.4 and RTX's 1.7 by bindings.
const Layout* layout_of(int32_t major, int32_t minor);

// An interface of TensorRT's, destroyed with it.
struct Destroy {
  void operator()(void* interface) const noexcept;
};
using Interface = std::unique_ptr<void, Destroy>;

// Loads a plugin library into TensorRT's registry, for good. An Error when TensorRT refuses it.
void load_plugin_library(const std::string& path);

// All of these throw an Error with what TensorRT logged.
Interface create_runtime();
Interface deserialize(const Interface& runtime, const std::byte* plan, size_t bytes, const std::string& path);

struct NamedTensor {
  Tensor tensor;
  bool is_input;
};
std::vector<NamedTensor> tensors(const Interface& engine);
Interface create_context(const Interface& engine);

void set_address(const Interface& context, const std::string& name, void* address);
void set_shape(const Interface& context, const std::string& input, const std::vector<int64_t>& shape);
std::vector<int64_t> shape(const Interface& context, const std::string& name);
void enqueue(const Interface& context, cudaStream_t stream);

}  // namespace lynx::tensorrt
