// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA runtime, as far as the C++ runtime and its example call it. Copies are done at once.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "fakes.h"

namespace fake {

Cuda& cuda() {
  static Cuda state;
  return state;
}

namespace {

cudaError_t allocate(void** address, size_t bytes) {
  if (cuda().fail_allocation == 0) return cudaErrorMemoryAllocation;
  if (cuda().fail_allocation > 0) --cuda().fail_allocation;
  *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  ++cuda().allocations;
  return cudaSuccess;
}

cudaError_t release(void* address) {
  std::free(address);
  if (address != nullptr) --cuda().allocations;
  return cudaSuccess;
}

// A handle that is freed, so that a sanitizer finds what is kept or used too long.
template <class Handle>
Handle make_handle(int& alive) {
  ++alive;
  return reinterpret_cast<Handle>(std::malloc(1));
}

template <class Handle>
cudaError_t destroy_handle(Handle handle, int& alive) {
  --alive;
  std::free(handle);
  return cudaSuccess;
}

}  // namespace
}  // namespace fake

using fake::cuda;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = cuda().devices;
  return cuda().devices > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int architecture = cuda().architecture;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? architecture / 10 : architecture % 10;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "out of memory";
}
cudaError_t cudaMalloc(void** address, size_t bytes) { return fake::allocate(address, bytes); }
cudaError_t cudaFree(void* address) { return fake::release(address); }
cudaError_t cudaMallocHost(void** address, size_t bytes) { return fake::allocate(address, bytes); }
cudaError_t cudaFreeHost(void* address) { return fake::release(address); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  if (const auto on_copy = cuda().on_copy) on_copy();
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return std::memset(to, value, bytes), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = fake::make_handle<cudaStream_t>(cuda().streams);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return fake::destroy_handle(stream, cuda().streams); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = fake::make_handle<cudaEvent_t>(cuda().events);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return fake::destroy_handle(event, cuda().events); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

}  // extern "C"
