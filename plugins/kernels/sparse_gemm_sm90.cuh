// SPDX-License-Identifier: Apache-2.0
// CUTLASS's wgmma.sp GEMM for sm_90a with the epilogue y = s[m] * acc + bias[n], for one tile configuration.
// Included by the small instantiation files sparse_gemm_sm90_*.cu, which compile in parallel.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"
#include "sparse24.h"
#include "sparse_gemm.h"

namespace lynx {

template <class Element, TileIndexSm90 kIndex>
struct SparseGemmSm90 {
  static constexpr TileConfigSm90 kTile = kTilesSm90[kIndex];
  using TileShape = cute::Shape<cute::Int<kTile.m>, cute::Int<kTile.n>, cute::Int<kTile.k>>;
  using ClusterShape = cute::Shape<cute::Int<kTile.cluster_m>, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  static constexpr int kAlignment = 8;  // 16 bytes, what TMA wants
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  // Epilogue tree: store(multiply_add(scale[m], accumulator, bias[n])), in float32 until the store.
  using Scale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, TileShape, float>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, Element, float>;
  using Affine = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Element, float, kRound>,
      Scale, cutlass::epilogue::fusion::Sm90AccFetch, Bias>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor,
      kAlignment, Element, cutlass::layout::RowMajor, kAlignment,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Affine>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      2 * kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  static_assert(Mainloop::DispatchPolicy::Stages == kTile.stages, "tile_config.h states the stages that fit");
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using SparseConfig = typename Mainloop::SparseConfig;
  static_assert(SparseConfig::TensorEAtomK::value == kAtomWidthSm90 &&
                    SparseConfig::TensorEAtomM::value == kRowMultiple,
                "the pruning pass writes the metadata layout that this GEMM reads");

  static cudaError_t launch(const SparseLinearParams& params, const CompressedOperand& a, int device,
                            cudaStream_t stream) {
    const typename Gemm::Arguments args = arguments(params, a, device);
    if (Gemm::can_implement(args) != cutlass::Status::kSuccess || Gemm::get_workspace_size(args) != 0) {
      return cudaErrorInvalidValue;
    }
    Gemm gemm;
    if (gemm.initialize(args, nullptr, stream) != cutlass::Status::kSuccess ||
        gemm.run(stream) != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? cudaErrorLaunchFailure : error;
    }
    return cudaSuccess;
  }

 private:
  static typename Gemm::Arguments arguments(const SparseLinearParams& params, const CompressedOperand& a,
                                            int device) {
    const int rows = int(params.rows), columns = params.out_channels;
    const int width = int(padded_width(params.channels, params.rank));
    const auto shape = cute::make_shape(rows, columns, width, 1);
    typename Gemm::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = shape;
    args.mainloop.ptr_A = static_cast<const Element*>(a.values);
    args.mainloop.layout_a = SparseConfig::fill_layoutA(shape);
    args.mainloop.ptr_B = static_cast<const Element*>(params.weight);
    args.mainloop.dB =
        cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(columns, width, 1));
    args.mainloop.ptr_E = reinterpret_cast<const typename Mainloop::ElementE*>(a.metadata);
    args.mainloop.layout_e = SparseConfig::fill_layoutE(shape);
    args.epilogue.thread = {
        {a.scale, 0.0f, {}}, {}, {static_cast<const Element*>(params.bias), Element(0), {}}, {}};
    args.epilogue.ptr_D = static_cast<Element*>(params.y);
    args.epilogue.dD =
        cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(rows, columns, 1));
    args.hw_info.device_id = device;
    args.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
    return args;
  }
};

}  // namespace lynx
