// SPDX-License-Identifier: Apache-2.0
// The current device, and a launch without <<<>>>, which is no C++: plugins/tests/emulation compiles the
// kernels with g++.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace lynx {

// An attribute of the current device, whose number is stored too.
inline cudaError_t current_attribute(cudaDeviceAttr attribute, int* device, int* value) {
  const cudaError_t error = cudaGetDevice(device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, *device) : error;
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
