// SPDX-License-Identifier: Apache-2.0
// What our own nodes of a wgmma GEMM's epilogue have in common.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"

namespace lynx {

// Whether a thread's elements, `Coordinates` of them, come in fours of 8 x 8 blocks: i .. i + 3 are those of
// (row, column), (row, column + 1), (row + 8, column) and (row + 8, column + 1), the next ones those 8
// columns on.
template <class Coordinates, int kCount>
constexpr bool comes_in_blocks() {
  using Layout = decltype(Coordinates{}.layout());
  const auto is = [](auto element, auto before, int rows, int columns) {
    const auto here = Layout{}(element);
    const auto there = Layout{}(before);
    return int(cute::get<0>(here)) - int(cute::get<0>(there)) == rows &&
           int(cute::get<1>(here)) - int(cute::get<1>(there)) == columns;
  };
  return kCount % 8 == 0 && is(cute::Int<1>{}, cute::Int<0>{}, 0, 1) &&
         is(cute::Int<2>{}, cute::Int<0>{}, 8, 0) && is(cute::Int<3>{}, cute::Int<0>{}, 8, 1) &&
         is(cute::Int<5>{}, cute::Int<4>{}, 0, 1) && is(cute::Int<6>{}, cute::Int<4>{}, 8, 0) &&
         is(cute::Int<4>{}, cute::Int<0>{}, 0, 8) &&
         is(cute::Int<kCount - 4>{}, cute::Int<0>{}, 0, 2 * (kCount - 4));
}

// A node's callbacks, made of a thread's elements' coordinates, relative to its first, the row and the column
// of D of its first, and the node's parameters.
template <template <class> class Callbacks, class Params, class... Args>
CUTLASS_DEVICE auto callbacks_at(const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args,
                                 const Params& params) {
  const int row = cute::get<0>(args.problem_shape_mnkl) - int(cute::get<0>(args.residue_tCcD));
  const int column = cute::get<1>(args.problem_shape_mnkl) - int(cute::get<1>(args.residue_tCcD));
  return Callbacks<decltype(args.tCcD)>(args.tCcD, row, column, params);
}

// An epilogue node that takes its arguments as they are, and neither shared memory nor workspace.
template <class NodeArguments>
struct EpilogueNode : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  struct SharedStorage {};
  using Arguments = NodeArguments;
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE EpilogueNode() {}
  CUTLASS_HOST_DEVICE EpilogueNode(const Params& params, const SharedStorage&) : params(params) {}

  Params params;
};

}  // namespace lynx
