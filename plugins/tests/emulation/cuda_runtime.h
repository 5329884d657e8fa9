// SPDX-License-Identifier: Apache-2.0
// The part of CUDA C++ that the pruning kernels use, for g++: kernels run as fibres (emulation.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulation.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) int4 {
  int x, y, z, w;
};

extern uint3 threadIdx, blockIdx;  // of the running fibre

using std::min;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool good = emulation::run(
      config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
      [&] { kernel(Parameters(arguments)...); },
      emulation::most_shared(reinterpret_cast<const void*>(kernel)));
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

inline void __syncthreads() { emulation::barrier(); }

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float value) { return float(std::exp(double(value))); }

// Documented: 0 for divisors above 2^126, where the hardware's reciprocal is subnormal.
inline float __fdividef(float a, float b) {
  if (std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY) return std::isinf(a) ? NAN : 0.0f;
  return a / b;
}

// Four bytes of `high` and `low`, picked by the nibbles of `selector`. The sign mode (bit 3) is not needed.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint8_t bytes[8];
  std::memcpy(bytes, &low, 4);
  std::memcpy(bytes + 4, &high, 4);
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(bytes[selector >> (4 * i) & 7u]) << (8 * i);
  return out;
}

struct EmulatedShuffle {
  float value, result;
  int lane_mask;
};

inline float __shfl_xor_sync(uint32_t mask, float value, int lane_mask) {
  EmulatedShuffle mine{value, 0.0f, mask == ~0u ? lane_mask : -1};
  emulation::collective(
      [](void* const(&lanes)[32]) {
        for (int i = 0; i < 32; ++i) {
          auto& lane = *static_cast<EmulatedShuffle*>(lanes[i]);
          const int from = i ^ lane.lane_mask;
          lane.result = from >= 0 && from < 32 ? static_cast<EmulatedShuffle*>(lanes[from])->value : NAN;
        }
      },
      &mine);
  return mine.result;
}
