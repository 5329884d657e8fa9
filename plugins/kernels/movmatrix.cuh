// SPDX-License-Identifier: Apache-2.0
// How gated epilogues bring output channels beside each other: the tensor cores leave tokens so.
#pragma once

#include "cutlass/array.h"
#include "cutlass/numeric_conversion.h"

namespace lynx {

// Of an 8 x 8 block, of which a lane holds two neighbouring tokens of a row: two neighbouring rows of a
// token, as Elements.
template <class Element>
CUTLASS_DEVICE uint32_t turned(const cutlass::Array<float, 2>& value) {
  const cutlass::Array<Element, 2> pair = cutlass::NumericArrayConverter<Element, float, 2>{}(value);
  uint32_t out;
  // Volatile: all lanes must be there, and the compiler may otherwise move it under the condition of a store.
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
               : "=r"(out)
               : "r"(reinterpret_cast<const uint32_t&>(pair)));
  return out;
}

}  // namespace lynx
