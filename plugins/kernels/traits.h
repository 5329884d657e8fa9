// SPDX-License-Identifier: Apache-2.0
// The element types and the instruction sets that multiply them: a row each. What a new one takes besides its
// row: its files of instantiations (sparse_gemm_*.cu, prune_*.cu), which CMakeLists.txt lists by their names;
// a type also its arithmetic in sparse24.h and its CUTLASS type in cutlass_element.h, an instruction set its
// tiles in tile_config.h.
#pragma once

#include <climits>

namespace lynx {

enum class DType { kBf16, kFp16 };

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

constexpr const DTypeTraits& traits_of(DType dtype) { return kDTypes[int(dtype)]; }
constexpr const InstructionSetTraits& traits_of(InstructionSet set) { return kInstructionSets[int(set)]; }

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
  return true;
}
static_assert(rows_are_in_order(), "an enumerator is the index of its row");

}  // namespace lynx
