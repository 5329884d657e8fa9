// SPDX-License-Identifier: Apache-2.0
// Runs an engine once, on zeros, with TensorRT and nothing of ours but the plugin library:
//
//   plain_tensorrt flux.engine liblynx_plugin.so
//
// An engine of `weights: external` has its weights among its inputs; bind them from OUT.safetensors.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

int fail(const std::string& what) { return std::fprintf(stderr, "error: %s\n", what.c_str()), 3; }

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: plain_tensorrt ENGINE LIBRARY\n"), 2;
  if (getInferLibMajorVersion() != NV_TENSORRT_MAJOR) {  // other headers name other functions
    return fail("built with the headers of TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                ", linked with version " + std::to_string(getInferLibMajorVersion()) +
                ". Give the headers of the library's own SDK.");
  }
  Logger logger;
  if (getPluginRegistry()->loadLibrary(argv[2]) == nullptr)
    return fail(std::string(argv[2]) + " was refused");
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> plan(std::istreambuf_iterator<char>(file), {});
  if (!file || plan.empty()) return fail(std::string(argv[1]) + " cannot be read");
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (runtime == nullptr) return fail("TensorRT does not start");
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (engine == nullptr) return fail(std::string(argv[1]) + " cannot be loaded");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  if (context == nullptr) return fail("no execution context");

  std::vector<std::unique_ptr<void, cudaError_t (*)(void*)>> memory;
  for (int32_t i = 0; i < engine->getNbIOTensors(); ++i) {
    const char* const name = engine->getIOTensorName(i);
    const nvinfer1::Dims shape = engine->getTensorShape(name);
    size_t bytes = 8;  // of the largest element
    std::string line = engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? "input " : "output ";
    line += name;
    for (int32_t j = 0; j < shape.nbDims; ++j)
      bytes *= size_t(shape.d[j]), line += " " + std::to_string(shape.d[j]);
    std::printf("%s\n", line.c_str());
    void* address = nullptr;
    if (cudaMalloc(&address, bytes) != cudaSuccess) return fail("no memory on the GPU");
    memory.emplace_back(address, &cudaFree);
    if (cudaMemset(address, 0, bytes) != cudaSuccess) return fail("CUDA does not work");
    if (!context->setTensorAddress(name, address)) return fail(std::string(name) + " cannot be bound");
  }
  if (!context->enqueueV3(nullptr) || cudaDeviceSynchronize() != cudaSuccess) return fail("the run failed");
  std::printf("ran\n");
  return 0;
}
