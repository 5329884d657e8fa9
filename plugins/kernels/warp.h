// SPDX-License-Identifier: Apache-2.0
// What the kernels take from the GPU and g++ has no word for: shared memory, tensor cores, the hardware's
// tanh. With LYNX_EMULATED, plugins/tests/emulation supplies all of it.
#pragma once

#include "sparse24.h"

namespace lynx {

#if defined(LYNX_EMULATED)

template <class T>
T& block_shared();
template <class T>
T* dynamic_shared();
template <class Element>
void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1);
float tanh_approx(float x);

#else

// A T in the shared memory of a thread block, uninitialised; one per T and kernel.
template <class T>
__device__ __forceinline__ T& block_shared() {
  __shared__ T memory;
  return memory;
}

// The shared memory that the launch asked for.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
}

// d += a b of a warp, in float32; the fragments are those of PTX's mma.m16n8k16. Volatile, as all lanes must
// be there: without, the compiler may move it into a branch that some of them do not take.
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Fp16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float tanh_approx(float x) {
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(x));
  return tanh;
}

#endif

}  // namespace lynx
