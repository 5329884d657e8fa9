// SPDX-License-Identifier: Apache-2.0
// What the mma GEMMs of e4m3 take from the GPU and g++ has no word for: copies that go on in the background,
// fragments, products. With LYNX_EMULATED, plugins/tests/emulation supplies all of it.
//
// A fragment of a warp is as PTX lays out 8-bit types, in every lane g = lane / 4, t = lane % 4. Of D [16, 8]
// it has rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1, 2 t, 2 t + 1. Of A [16, 32 bytes] bytes 4 t .. of
// rows g, g + 8, g, g + 8, the latter two 16 bytes further on; of a row of B (8 x K bytes) bytes 4 t .. of
// each 16.
#pragma once

#include <cstdint>

namespace lynx {

#if !defined(LYNX_EMULATED)

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// Begins a copy of kBytes to shared memory, where it is after the wait for its group: everything between two
// commits. 16 bytes pass by L1; fewer go through it, as their neighbours are about to be asked for.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last kPending groups of this thread's copies are there.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows by 16 bytes: lane 8 i + j points to row j of matrix i; out[i] is bytes 4 t .. of
// row g.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// d += a b: 16 x 8 x 32, or with a 2:4 A 16 x 8 x 64. The latter's 32 bits of metadata are the nibbles of 32
// channels, 32 (t / 2) .., of row g + 8 (t % 2), each with the lower position first ("ordered"; without this
// word PTX allows newer GPUs to be slow).
__device__ __forceinline__ void multiply_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_sparse_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b,
                                                     uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata));
}

#endif

}  // namespace lynx
