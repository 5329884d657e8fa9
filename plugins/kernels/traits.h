// SPDX-License-Identifier: Apache-2.0
// The element types and the instruction sets that multiply them, a row each, and the activations. What a new
// one takes besides its row: its files of instantiations (sparse_gemm_*.cu, prune_*.cu), which CMakeLists.txt
// lists by their names; a type also its arithmetic in sparse24.h and its CUTLASS type in cutlass_element.h,
// an instruction set its tiles in tile_config.h.
#pragma once

#include <climits>

namespace lynx {

enum class DType { kBf16, kFp16 };

// Numbered as nodes and the C functions call them.
enum class Activation { kNone, kGeluTanh, kGeluErf, kSilu };

// Sparse tensor-core instructions; the pruning pass writes the order of metadata that they read.
enum class InstructionSet { kMmaSp, kWgmmaSp };

struct DTypeTraits {
  DType dtype;
  const char* name;
};
constexpr DTypeTraits kDTypes[] = {{DType::kBf16, "bf16"}, {DType::kFp16, "fp16"}};

struct InstructionSetTraits {
  InstructionSet set;
  const char* name;
  int metadata_layout;  // how nodes and the C functions call the order of its metadata
  int first, last;      // of the compute capabilities that run it: 80 is sm_80
};
// The slowest first.
constexpr InstructionSetTraits kInstructionSets[] = {
    {InstructionSet::kMmaSp, "mma.sp", 80, 80, INT_MAX},
    {InstructionSet::kWgmmaSp, "wgmma.sp", 90, 90, 90},
};

// The instructions of the FP8 GEMMs. All read the same operands: packed 2:4 weights serve either.
enum class Fp8Set { kMma, kWgmma };

struct Fp8SetTraits {
  Fp8Set set;
  const char* name;
  int first, last;            // of the compute capabilities that run it
  int slow_first, slow_last;  // those among them that do so by 16-bit products: they get it only if asked
};
// The slowest first. sm_90, 100 and 103 have no mma of e4m3 in their machine code.
constexpr Fp8SetTraits kFp8Sets[] = {
    {Fp8Set::kMma, "mma", 89, INT_MAX, 90, 119},
    {Fp8Set::kWgmma, "wgmma", 90, 90, 0, 0},
};

constexpr const DTypeTraits& traits_of(DType dtype) { return kDTypes[int(dtype)]; }
constexpr const InstructionSetTraits& traits_of(InstructionSet set) { return kInstructionSets[int(set)]; }
constexpr const Fp8SetTraits& traits_of(Fp8Set set) { return kFp8Sets[int(set)]; }

// Whether GPUs of a compute capability run an instruction set, and whether fast.
template <class Traits>
constexpr bool runs_on(const Traits& traits, int capability) {
  return traits.first <= capability && capability <= traits.last;
}
constexpr bool suits(const Fp8SetTraits& traits, int capability) {
  const bool slow = traits.slow_first <= capability && capability <= traits.slow_last;
  return runs_on(traits, capability) && !slow;
}

// The instruction set that reads a metadata layout; null where none does.
constexpr const InstructionSetTraits* reader_of(int metadata_layout) {
  for (const InstructionSetTraits& each : kInstructionSets) {
    if (each.metadata_layout == metadata_layout) return &each;
  }
  return nullptr;
}

constexpr bool rows_are_in_order() {
  for (const DTypeTraits& each : kDTypes) {
    if (&traits_of(each.dtype) != &each) return false;
  }
  for (const InstructionSetTraits& each : kInstructionSets) {
    if (&traits_of(each.set) != &each) return false;
  }
  for (const Fp8SetTraits& each : kFp8Sets) {
    if (&traits_of(each.set) != &each) return false;
  }
  return true;
}
static_assert(rows_are_in_order(), "an enumerator is the index of its row");

}  // namespace lynx
