// SPDX-License-Identifier: Apache-2.0
// The current device, and a launch without <<<>>>, which is no C++: plugins/tests/emulation compiles the
// kernels with g++.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace lynx {

// An attribute of the current device, whose number is stored too.
inline cudaError_t current_attribute(cudaDeviceAttr attribute, int* device, int* value) {
  const cudaError_t error = cudaGetDevice(device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, *device) : error;
}

// Of the current device: 90 is sm_90.
inline cudaError_t compute_capability(int* capability) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = current_attribute(cudaDevAttrComputeCapabilityMajor, &device, &major);
  if (error == cudaSuccess) error = current_attribute(cudaDevAttrComputeCapabilityMinor, &device, &minor);
  *capability = 10 * major + minor;
  return error;
}

// Raises a kernel's limit of dynamic shared memory, once per device. Two threads at once do the same harmless
// thing twice.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes, int device) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return error;
}

// Queues `kernel` on `stream`; `shared_bytes` is what `dynamic_shared` hands out. Returns the launch's error.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return cudaGetLastError();  // the launch's, and forgotten by the runtime
}

}  // namespace lynx
