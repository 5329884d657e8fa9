// SPDX-License-Identifier: Apache-2.0
// Included ahead of a .cu file, makes g++ compile its device code: sparse24.h takes its branches for the GPU,
// and what warp.h leaves to the GPU comes from here.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#define LYNX_EMULATED
#define __CUDACC__
#define __CUDA_ARCH__ 900  // which has the kernels for both metadata layouts

#include "kernels/fp8_convert.h"
#include "kernels/warp.h"
#include "tests/reference.h"

namespace emulation {

struct MmaLane {
  float* d;             // 4
  uint32_t a[4], b[2];  // two values each, the first in the lower half
};

// mma.sync.aligned.m16n8k16.row.col with float32 accumulation, fragments as the PTX manual lays them out. The
// 16 products and the addend are summed exactly but for a double's rounding, then rounded to float32 once:
// hardware may do no better.
template <class Element>
void multiply(void* const (&lanes)[32]) {
  const reference::Rounding& value =
      std::is_same_v<Element, lynx::Bf16> ? reference::bf16() : reference::fp16();
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaLane*>(lanes[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = value[uint16_t(mine.a[i / 2] >> (16 * (i & 1)))];
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      b[row][group] = value[uint16_t(mine.b[i / 2] >> (16 * (i & 1)))];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MmaLane*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[i] = float(double(d[i]) + sum);
    }
  }
}

template <class T>
constexpr char kSharedKey = 0;

}  // namespace emulation

namespace lynx {

template <class T>
T& block_shared() {
  return *static_cast<T*>(emulation::block_shared(&emulation::kSharedKey<T>, sizeof(T)));
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared());
}

template <class Element>
void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1) {
  emulation::MmaLane mine{d, {a0, a1, a2, a3}, {b0, b1}};
  emulation::collective(emulation::multiply<Element>, &mine);
}

// Two values to e4m3, the first in the lower byte.
inline uint16_t e4m3_pair(float low, float high) {
  return uint16_t(reference::nearest_e4m3(low) | reference::nearest_e4m3(high) << 8);
}

inline void let_next_kernel_begin() {}

inline uint32_t max_of_halves(uint32_t a, uint32_t b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffffu, b & 0xffffu);
}

// Exact but for rounding, where the hardware's is off by up to 2^-11 of itself: the kernels' own arithmetic
// is under test.
inline float tanh_approx(float x) { return float(std::tanh(double(x))); }

}  // namespace lynx
