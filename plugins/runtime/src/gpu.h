// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime's objects, freed by their owners; errors as Error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace lynx {

// Throws an Error unless `error` is cudaSuccess; `doing`: what failed, as in "copying the weights".
void check(cudaError_t error, const std::string& doing);

// The current GPU's architecture, such as "sm89". An Error where there is none.
std::string gpu_architecture();

// A handle or address and the function that frees it.
template <class T, cudaError_t (*kFree)(T)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(T value) : value_(value) {}
  ~Owned() {
    if (value_ != nullptr) kFree(value_);
  }
  Owned(Owned&& other) noexcept : value_(other.value_) { other.value_ = nullptr; }
  Owned& operator=(Owned&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  T get() const { return value_; }

 private:
  T value_ = nullptr;
};
using DeviceMemory = Owned<void*, cudaFree>;
using PinnedMemory = Owned<void*, cudaFreeHost>;
using Stream = Owned<cudaStream_t, cudaStreamDestroy>;
using Event = Owned<cudaEvent_t, cudaEventDestroy>;

DeviceMemory device_memory(size_t bytes, const std::string& what);
PinnedMemory pinned_memory(size_t bytes);
Stream make_stream();
Event make_event();

}  // namespace lynx
