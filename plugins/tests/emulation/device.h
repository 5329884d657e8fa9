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
#include "kernels/fp8_mma.h"
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

// ldmatrix of four 8 x 8 matrices of 16 bits, from the rows that the lanes point to.
struct MatricesLane {
  const void* row;
  uint32_t* out;  // 4
};

inline void load_matrices(void* const (&lanes)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto& row = *static_cast<MatricesLane*>(lanes[matrix * 8 + lane / 4]);
      std::memcpy(static_cast<MatricesLane*>(lanes[lane])->out + matrix,
                  static_cast<const char*>(row.row) + lane % 4 * 4, 4);
    }
  }
}

// reference::e4m3_value as a table: there are a thousand in a product.
inline double e4m3_value(uint8_t bits) {
  static const std::vector<double> values = [] {
    std::vector<double> all(256);
    for (size_t i = 0; i < 256; ++i) all[i] = reference::e4m3_value(uint8_t(i));
    return all;
  }();
  return values[bits];
}

inline void nothing(void* const (&)[32]) {}

struct MmaE4m3Lane {
  float* d;           // 4
  const uint32_t* a;  // 4
  const uint32_t* b;  // 2, or with metadata 4
  uint32_t metadata;
};

// mma.m16n8k32 of e4m3, and mma.sp.m16n8k64, fragments and metadata as the PTX manual lays them out: the
// products and the addend summed exactly but for a double's rounding, where hardware keeps fewer bits.
template <bool kSparse>
void multiply_e4m3(void* const (&lanes)[32]) {
  constexpr int kK = kSparse ? 64 : 32;
  const auto byte = [](const uint32_t* words, int i) { return uint8_t(words[i / 4] >> (8 * (i % 4))); };
  double a[16][kK] = {}, b[kK][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaE4m3Lane*>(lanes[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 16; ++i) {
      const int row = group + (i / 4 % 2 == 1 ? 8 : 0), at = in_group * 4 + i % 4 + (i >= 8 ? 16 : 0);
      const double value = e4m3_value(byte(mine.a, i));
      if (!kSparse) {
        a[row][at] = value;
        continue;
      }
      // Two values of a group's four channels. Thread 0 of a quad has the metadata of channels 0 to 31 of row
      // g, thread 1 of row g + 8, threads 2 and 3 those of channels 32 to 63.
      const int holder = group * 4 + (row >= 8 ? 1 : 0) + (at >= 16 ? 2 : 0);
      const uint32_t nibble = static_cast<MmaE4m3Lane*>(lanes[holder])->metadata >> (at % 16 / 2 * 4) & 15;
      const uint32_t low = nibble & 3, high = nibble >> 2;
      a[row][at / 2 * 4 + int(at % 2 == 0 ? low : high)] = low < high ? value : std::nan("");
    }
    for (int i = 0; i < kK / 8 * 2; ++i)
      b[i / 4 * 16 + in_group * 4 + i % 4][group] = e4m3_value(byte(mine.b, i));
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MmaE4m3Lane*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      double sum = 0.0;
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[k][column];
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

template <int kBytes>
void copy_async(void* to, const void* from) {
  emulation::copy_async(to, from, kBytes);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) __builtin_trap();  // misaligned
  emulation::MatricesLane mine{row, out};
  emulation::collective(emulation::load_matrices, &mine);
}

// Lanes are one after the other, up to here.
inline void sync_warp() { emulation::collective(emulation::nothing, nullptr); }

inline void multiply_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulation::MmaE4m3Lane mine{d, a, b, 0};
  emulation::collective(emulation::multiply_e4m3<false>, &mine);
}

inline void multiply_sparse_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b,
                                 uint32_t metadata) {
  emulation::MmaE4m3Lane mine{d, a, b, metadata};
  emulation::collective(emulation::multiply_e4m3<true>, &mine);
}

inline uint32_t max_of_halves(uint32_t a, uint32_t b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffffu, b & 0xffffu);
}

// Exact but for rounding, where the hardware's is off by up to 2^-11 of itself: the kernels' own arithmetic
// is under test.
inline float tanh_approx(float x) { return float(std::tanh(double(x))); }

}  // namespace lynx
