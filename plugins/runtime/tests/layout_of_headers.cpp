// SPDX-License-Identifier: Apache-2.0
// Prints the layout (src/tensorrt.h) of TensorRT's headers, as runtime_probe prints that of the runtime: to
// be compiled with the headers of a new release, which NVIDIA publishes, before its minor version is
// admitted.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>

namespace {

using nvinfer1::apiv::VCudaEngine;
using nvinfer1::apiv::VExecutionContext;
using nvinfer1::apiv::VRuntime;

// Where a virtual function stands in its class's table: what the platform's C++ ABI keeps in a member
// pointer.
template <class Function>
void print(const char* name, Function function) {
  static_assert(sizeof function == 2 * sizeof(size_t));
  size_t words[2];
  std::memcpy(words, &function, sizeof words);
#if defined(__aarch64__)
  std::printf("%s %zu\n", name, words[0] / sizeof(void*));
#else
  std::printf("%s %zu\n", name, (words[0] - 1) / sizeof(void*));
#endif
}

}  // namespace

int main() {
  using Deserialize = nvinfer1::ICudaEngine* (VRuntime::*)(const void*, size_t) noexcept;
  using Create =
      nvinfer1::IExecutionContext* (VCudaEngine::*)(nvinfer1::ExecutionContextAllocationStrategy) noexcept;
  print("deserialize", static_cast<Deserialize>(&VRuntime::deserializeCudaEngine));
  print("tensor_count", &VCudaEngine::getNbIOTensors);
  print("tensor_name", &VCudaEngine::getIOTensorName);
  print("tensor_mode", &VCudaEngine::getTensorIOMode);
  print("tensor_shape", &VCudaEngine::getTensorShape);
  print("tensor_dtype", &VCudaEngine::getTensorDataType);
  print("create_context", static_cast<Create>(&VCudaEngine::createExecutionContext));
  print("set_tensor_address", &VExecutionContext::setTensorAddress);
  print("set_input_shape", &VExecutionContext::setInputShape);
  print("context_tensor_shape", &VExecutionContext::getTensorShape);
  print("enqueue", &VExecutionContext::enqueueV3);
  print("load_library", &nvinfer1::IPluginRegistry::loadLibrary);
  return 0;
}
