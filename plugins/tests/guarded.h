// SPDX-License-Identifier: Apache-2.0
// Memory of a GPU for tests, of which every byte around it is watched. (emulation.h has the like for the
// emulator, which catches a stray access in the act.)
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace lynx::test {

// Ends the program at a CUDA error outside the calls under test: the run is worthless after it.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory between two strips of canary bytes, filled with a pattern that is a NaN in every format.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&base_, bytes + 2 * kStrip), "cudaMalloc");
    check(cudaMemset(base_, kCanary, bytes + 2 * kStrip), "cudaMemset");
    poison();
  }
  ~Guarded() { cudaFree(base_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() const { return static_cast<char*>(base_) + kStrip; }
  void poison() { check(cudaMemset(data(), 0xff, bytes_), "cudaMemset"); }

  template <class T>
  void set(const std::vector<T>& values) {
    check(cudaMemcpy(data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  template <class T>
  std::vector<T> copy() const {
    std::vector<T> out(bytes_ / sizeof(T));
    check(cudaMemcpy(out.data(), data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return out;
  }

  bool intact() const {
    std::vector<unsigned char> strips(2 * kStrip);
    check(cudaMemcpy(strips.data(), base_, kStrip, cudaMemcpyDeviceToHost), "cudaMemcpy");
    check(cudaMemcpy(strips.data() + kStrip, data() + bytes_, kStrip, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return std::all_of(strips.begin(), strips.end(), [](unsigned char byte) { return byte == kCanary; });
  }

 private:
  static constexpr size_t kStrip = 4096;
  static constexpr int kCanary = 0xa5;
  size_t bytes_;
  void* base_ = nullptr;
};

}  // namespace lynx::test
