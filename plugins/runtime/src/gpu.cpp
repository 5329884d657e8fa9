// SPDX-License-Identifier: Apache-2.0
#include "gpu.h"

#include "lynx/engine.h"

namespace lynx {

void check(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  throw Error("CUDA failed while " + doing + " (" + cudaGetErrorString(error) + ").",
              "Check the GPU with nvidia-smi, and earlier work of this program with compute-sanitizer.");
}

std::string gpu_architecture() {
  int devices = 0, device = 0, major = 0, minor = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    const std::string why = error == cudaSuccess ? "" : std::string(" (") + cudaGetErrorString(error) + ")";
    throw Error("No CUDA device was found" + why + ".",
                "Run it on a machine with an NVIDIA GPU, and check its driver with nvidia-smi.");
  }
  check(cudaGetDevice(&device), "asking for the current GPU");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "asking for its architecture");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "asking for its architecture");
  return "sm" + std::to_string(major) + std::to_string(minor);
}

DeviceMemory device_memory(size_t bytes, const std::string& what) {
  void* address = nullptr;
  if (bytes > 0 && cudaMalloc(&address, bytes) != cudaSuccess) {
    throw Error("The GPU's memory does not hold " + what + " (" + std::to_string(bytes) + " bytes).",
                "Free memory on the GPU, or use a smaller engine.");
  }
  return DeviceMemory(address);
}

PinnedMemory pinned_memory(size_t bytes) {
  void* address = nullptr;
  check(cudaMallocHost(&address, bytes), "allocating pinned memory");
  return PinnedMemory(address);
}

Stream make_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  return Stream(stream);
}

Event make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  return Event(event);
}

}  // namespace lynx
