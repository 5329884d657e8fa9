// SPDX-License-Identifier: Apache-2.0
// What our own nodes of a wgmma GEMM's epilogue have in common.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"

namespace lynx {

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
