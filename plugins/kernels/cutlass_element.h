// SPDX-License-Identifier: Apache-2.0
// CUTLASS's name of an element type.
#pragma once

#include "cutlass/numeric_types.h"
#include "sparse24.h"

namespace lynx {

template <class Element>
struct CutlassElementOf;
template <>
struct CutlassElementOf<Bf16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct CutlassElementOf<Fp16> {
  using Type = cutlass::half_t;
};

template <class Element>
using CutlassElement = typename CutlassElementOf<Element>::Type;

}  // namespace lynx
