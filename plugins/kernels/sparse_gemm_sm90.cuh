// SPDX-License-Identifier: Apache-2.0
// CUTLASS's wgmma.sp GEMM for sm_90a with our epilogues, for one tile configuration. Included by the small
// instantiation files sparse_gemm_sm90_*.cu, which compile in parallel.
#pragma once

#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

#include "cutlass_element.h"
#include "gated_epilogue_sm90.cuh"
#include "gelu_epilogue_sm90.cuh"
#include "sparse_gemm.h"

namespace lynx {

// What a GEMM makes. kGated: of a sparse weight whose rows come in pairs.
enum class Form { kActivation, kWeight, kGated };

template <class Element, TileIndexSm90 kIndex, Form kForm>
struct SparseGemmSm90 {
  static constexpr TileConfigSm90 kTile = kTilesSm90[kIndex];
  static constexpr bool kSparseWeight = kForm != Form::kActivation;
  static constexpr bool kGated = kForm == Form::kGated;
  using TileShape = cute::Shape<cute::Int<kTile.m>, cute::Int<kTile.n>, cute::Int<kTile.k>>;
  using ClusterShape = cute::Shape<cute::Int<kTile.cluster_m>, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  // y is row-major: of a sparse weight's D, [output channels, tokens], that is column-major.
  using LayoutD = std::conditional_t<kSparseWeight, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignment = 8;  // 16 bytes, what TMA wants
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  // Epilogue trees, in float32 until the store: activation(scale[m] * accumulator + bias[n]), or with
  // a sparse weight activation(accumulator + bias[m]).
  template <template <class> class Function, class... Children>
  using Compute = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Function, float, float, kRound>, Children...>;
  using Accumulator = cutlass::epilogue::fusion::Sm90AccFetch;
  using Scale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, TileShape, float>;
  using RowBias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, Element, float>;
  using ColumnBias = cutlass::epilogue::fusion::Sm90ColBroadcast<0, TileShape, Element, float>;
  using Affine = std::conditional_t<kSparseWeight, Compute<cutlass::plus, Accumulator, ColumnBias>,
                                    Compute<cutlass::homogeneous_multiply_add, Scale, Accumulator, RowBias>>;
  using Last =
      std::conditional_t<kGated, GatedStore<Element>, GeluFrom<Element, kSparseWeight ? 0 : 1, true>>;
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Last, Affine>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutD, kAlignment,
      std::conditional_t<kGated, void, Element>, LayoutD, kAlignment,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      2 * kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCount<kTile.stages>, Schedule>::CollectiveOp;
  using Scheduler =
      std::conditional_t<kTile.stream_k, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using SparseConfig = typename Mainloop::SparseConfig;
  static_assert(SparseConfig::TensorEAtomK::value == kAtomWidthSm90 &&
                    SparseConfig::TensorEAtomM::value == kRowMultiple,
                "the pruning pass writes the metadata layout that this GEMM reads");

  static cudaError_t launch(const SparseGemmCall& call, int device, cudaStream_t stream) {
    const typename Gemm::Arguments args = arguments(call, device);
    if (Gemm::can_implement(args) != cutlass::Status::kSuccess ||
        Gemm::get_workspace_size(args) > call.workspace_bytes) {
      return cudaErrorInvalidValue;
    }
    Gemm gemm;
    if (gemm.initialize(args, call.workspace, stream) != cutlass::Status::kSuccess ||
        gemm.run(stream) != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? cudaErrorLaunchFailure : error;
    }
    return cudaSuccess;
  }

 private:
  static typename Gemm::Arguments arguments(const SparseGemmCall& call, int device) {
    const auto shape = cute::make_shape(call.m, call.n, call.width, 1);
    typename Gemm::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = shape;
    args.mainloop.ptr_A = static_cast<const Element*>(call.values);
    args.mainloop.layout_a = SparseConfig::fill_layoutA(shape);
    args.mainloop.ptr_B = static_cast<const Element*>(call.dense);
    args.mainloop.dB =
        cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(call.n, call.width, 1));
    args.mainloop.ptr_E = reinterpret_cast<const typename Mainloop::ElementE*>(call.metadata);
    args.mainloop.layout_e = SparseConfig::fill_layoutE(shape);
    args.epilogue.thread = tree_arguments(call);
    if constexpr (!kGated) args.epilogue.ptr_D = static_cast<Element*>(call.y);
    args.epilogue.dD =
        cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(call.m, call.n, 1));
    args.hw_info.device_id = device;
    args.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
    if constexpr (kTile.stream_k) {
      using Mode = decltype(args.scheduler.decomposition_mode);
      const int64_t tiles = tiles_of(kTile, call.m, call.n);
      const bool divide = divides_tiles(kTile, tiles, call.width, args.hw_info.sm_count);
      args.scheduler.decomposition_mode = divide ? Mode::Heuristic : Mode::DataParallel;
    }
    return args;
  }

  static typename Tree::Arguments tree_arguments(const SparseGemmCall& call) {
    const Element* const bias = static_cast<const Element*>(call.bias);
    if constexpr (kGated) {
      return {
          {{}, {bias, Element(0), {}}, {}},
          {call.activation, call.activation_from, static_cast<Element*>(call.y), y_channels(call), call.n}};
    } else if constexpr (kSparseWeight) {
      return {{{}, {bias, Element(0), {}}, {}}, {call.activation_from, call.activation}};
    } else {
      return {{{call.scale, 0.0f, {}}, {}, {bias, Element(0), {}}, {}},
              {call.activation_from, call.activation}};
    }
  }
};

template <class Type, Form kForm>
cudaError_t launch_form(const SparseGemmCall& call, int tile, int device, cudaStream_t stream) {
  switch (tile) {
    case kWide:
      return SparseGemmSm90<Type, kWide, kForm>::launch(call, device, stream);
#if !defined(LYNX_SM90_ONE_TILE)
    case kTall:
      return SparseGemmSm90<Type, kTall, kForm>::launch(call, device, stream);
    case kNarrow:
      return SparseGemmSm90<Type, kNarrow, kForm>::launch(call, device, stream);
#endif
  }
  return cudaErrorInvalidValue;
}

// In a file of its own.
template <class Element>
cudaError_t launch_gated_gemm(const SparseGemmCall& call, int tile, int device, cudaStream_t stream);

template <InstructionSet kSet, class Element, Operand kOperand>
cudaError_t launch_gemm(const SparseGemmCall& call, int tile, int device, cudaStream_t stream) {
  static_assert(kSet == InstructionSet::kWgmmaSp);
  constexpr Form kForm = kOperand == Operand::kWeight ? Form::kWeight : Form::kActivation;
  if (call.gated) return launch_gated_gemm<Element>(call, tile, device, stream);
  return launch_form<CutlassElement<Element>, kForm>(call, tile, device, stream);
}

}  // namespace lynx
