// SPDX-License-Identifier: Apache-2.0
// What the epilogues of the wgmma GEMMs without a gate share: an activation on the way out.
#pragma once

#include "activation.h"
#include "epilogue_node_sm90.cuh"

namespace lynx {

struct GeluFromArguments {
  int from;
  Activation activation;
};

// Epilogue node: an activation on the output channels from `from` on, and the conversion to the output's
// type. kMode is the mode of D (m: 0, n: 1) that output channels lie on. The elements of a fragment lie in
// one run of kGeluMultiple channels, so that its first one speaks for all and the branch is a warp's.
// kAny: whether it may be another activation than the tanh GELU, which those in FP8 have alone: the others
// would take registers that they lack.
template <class Element, int kMode, bool kAny>
struct GeluFrom : EpilogueNode<GeluFromArguments> {
  using EpilogueNode::EpilogueNode;

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Coordinates& at, int from, Activation activation)
        : at(at), from(from), activation(activation) {}

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE cutlass::Array<Element, kCount> visit(const cutlass::Array<Accumulator, kCount>&,
                                                         int epi_v, int epi_m, int epi_n,
                                                         const cutlass::Array<float, kCount>& input) {
      cutlass::Array<float, kCount> value = input;
      if (cute::get<kMode>(at(cute::_, cute::_, cute::_, epi_m, epi_n)(epi_v * kCount)) >= from) {
        const auto apply = [&](auto activate) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kCount; ++i) value[i] = activate(input[i]);
        };
        if constexpr (kAny) {
          with_activation(activation, apply);
        } else {
          apply(GeluTanh());
        }
      }
      return cutlass::NumericArrayConverter<Element, float, kCount>{}(value);
    }

    Coordinates at;  // of the thread's elements, relative to its first
    int from;        // relative to the thread's first element
    Activation activation;
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    const int first = cute::get<kMode>(args.problem_shape_mnkl) - int(cute::get<kMode>(args.residue_tCcD));
    return Callbacks<decltype(args.tCcD)>(args.tCcD, params.from - first, params.activation);
  }
};

}  // namespace lynx
