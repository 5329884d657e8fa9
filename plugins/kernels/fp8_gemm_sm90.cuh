// SPDX-License-Identifier: Apache-2.0
// CUTLASS's wgmma and wgmma.sp GEMMs of e4m3 for sm_90a with our epilogue, for one tile configuration.
// Included by the small instantiation files fp8_gemm_sm90_*.cu, which compile in parallel.
//
// The tensor cores add with fewer bits than float32 has. FastAccum leaves the sums there, other schedules
// promote them to float32 (Fp8Sums).
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM90            // begins while the rounding pass ends
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // else a tile 224 wide is made of instructions 32 wide

#include <algorithm>
#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

#include "cutlass_element.h"
#include "fp8_epilogue_sm90.cuh"
#include "fp8_gemm.h"
#include "gelu_epilogue_sm90.cuh"

namespace lynx {

// CUTLASS's stream-K scheduler, whose is_last_tile does not compile. It only says when the next kernel may
// begin: without it, when this one ends.
struct StreamK {};

}  // namespace lynx

namespace cutlass::gemm::kernel::detail {

template <class TileShape, class ClusterShape, uint32_t kStages>
struct TileSchedulerSelector<lynx::StreamK, arch::Sm90, TileShape, ClusterShape, kStages> {
  struct Scheduler : PersistentTileSchedulerSm90StreamK<TileShape, ClusterShape> {
    using Base = PersistentTileSchedulerSm90StreamK<TileShape, ClusterShape>;
    using Base::Base;

    CUTLASS_DEVICE bool is_last_tile(const typename Base::WorkTileInfo&, uint32_t = 1) const { return false; }
  };
};

}  // namespace cutlass::gemm::kernel::detail

namespace lynx {

// kGated: whether the epilogue knows gates, and every activation. It serves all calls, but 3.5 % slower than
// the one with the tanh GELU alone (plugins/TUNING.md, section 8).
template <class Element, Fp8Operand kOperand, int kIndex, bool kGated, Fp8Sums kSums = Fp8Sums::kFast>
struct Fp8GemmSm90 {
  static constexpr Fp8Tile kTile = fp8_tiles(kOperand, kSums)[kIndex];
  static constexpr bool kSparse = kOperand != Fp8Operand::kDense;
  // D is y transposed, [output channels, tokens], unless the tokens are the sparse operand, which is A.
  static constexpr bool kTransposed = kOperand != Fp8Operand::kSparseActivation;
  using Fp8 = cutlass::float_e4m3_t;
  using TileShape = cute::Shape<cute::Int<kTile.m>, cute::Int<kTile.n>, cute::Int<kTile.k>>;
  using ClusterShape = cute::Shape<cute::Int<kTile.cluster_m>, cute::_1, cute::_1>;
  using Class =
      std::conditional_t<kSparse, cutlass::arch::OpClassSparseTensorOp, cutlass::arch::OpClassTensorOp>;
  using FastSchedule =
      std::conditional_t<kTile.ping_pong, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                         cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum>;
  using Schedule = std::conditional_t<kSums == Fp8Sums::kPromoted,
                                      cutlass::gemm::KernelTmaWarpSpecializedCooperative, FastSchedule>;
  using EpilogueSchedule = std::conditional_t<kTile.ping_pong, cutlass::epilogue::TmaWarpSpecialized,
                                              cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using LayoutD = std::conditional_t<kTransposed, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignment = 16;  // bytes, what TMA wants
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  // The epilogue, in float32 until the store: act(s_w (s_x accumulator) + bias).
  template <template <class> class Function, class... Children>
  using Compute = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Function, float, float, kRound>, Children...>;
  template <class Value>
  using OfRow =
      cutlass::epilogue::fusion::Sm90ColBroadcast<0, TileShape, Value, float>;  // a value a row of D
  template <class Value>
  using OfColumn = cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, Value, float>;
  template <class Value>
  using OfChannel = std::conditional_t<kTransposed, OfRow<Value>, OfColumn<Value>>;
  template <class Value>
  using OfToken = std::conditional_t<kTransposed, OfColumn<Value>, OfRow<Value>>;
  using Scaled = Compute<cutlass::multiplies, OfToken<float>, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Affine = Compute<cutlass::homogeneous_multiply_add, OfChannel<float>, Scaled, OfChannel<Element>>;
  static constexpr int kChannelMode = kTransposed ? 0 : 1;  // of D
  using Last =
      std::conditional_t<kGated, Fp8Finish<Element, kChannelMode>, GeluFrom<Element, kChannelMode, false>>;
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Last, Affine>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, Class, TileShape, ClusterShape, cutlass::epilogue::collective::EpilogueTileAuto,
      float, float, void, LayoutD, kAlignment / 2, Element, LayoutD, kAlignment / 2, EpilogueSchedule,
      Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, Class, Fp8, cutlass::layout::RowMajor, kSparse ? 2 * kAlignment : kAlignment, Fp8,
      cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Scheduler = std::conditional_t<kTile.stream_k, StreamK, cutlass::gemm::PersistentScheduler>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static cudaError_t launch(const Fp8GemmCall& call, int device, cudaStream_t stream) {
    const typename Gemm::Arguments args = arguments(call, device);
    if (Gemm::can_implement(args) != cutlass::Status::kSuccess ||
        Gemm::get_workspace_size(args) > call.workspace_bytes) {
      return cudaErrorInvalidValue;
    }
    Gemm gemm;
    cutlass::Status status = gemm.initialize(args, call.workspace, stream);
    if (status == cutlass::Status::kSuccess) {
      typename Gemm::Params params = gemm.params();
      if constexpr (kGated) {
        if (call.gated) leave_out_pairs(call, args.epilogue, &params);
      }
      status = Gemm::run(params, stream, nullptr, call.follows_pass);
    }
    if (status != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? cudaErrorLaunchFailure : error;
    }
    return cudaSuccess;
  }

 private:
  static typename Gemm::Arguments arguments(const Fp8GemmCall& call, int device) {
    const Fp8Shape d = fp8_shape(kOperand, call.tokens, call.channels);
    const int m = int(d.m), n = int(d.n);
    const auto shape = cute::make_shape(m, n, call.width, 1);
    typename Gemm::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = shape;
    args.mainloop.ptr_A = static_cast<const Fp8*>(kTransposed ? call.weight : call.x);
    args.mainloop.ptr_B = static_cast<const Fp8*>(kTransposed ? call.x : call.weight);
    args.mainloop.dB =
        cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(n, call.width, 1));
    if constexpr (kSparse) {
      using SparseConfig = typename Mainloop::SparseConfig;
      static_assert(
          SparseConfig::TensorEAtomK::value == kFp8Step && SparseConfig::TensorEAtomM::value == kRowMultiple,
          "Fp8Metadata is the layout that this GEMM reads");
      args.mainloop.layout_a = SparseConfig::fill_layoutA(shape);
      args.mainloop.ptr_E = reinterpret_cast<const typename Mainloop::ElementE*>(call.metadata);
      args.mainloop.layout_e = SparseConfig::fill_layoutE(shape);
    } else {
      args.mainloop.dA =
          cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, cute::make_shape(m, call.width, 1));
    }
    if constexpr (kSums == Fp8Sums::kPromoted) {
      args.mainloop.mma_promotion_interval = kPromotedChannels / (kSparse ? 64 : 32);  // instructions
    }
    args.epilogue.thread = {{{call.weight_scale, 0.0f, {}},
                             {{call.x_scale, 0.0f, {}}, {}, {}},
                             {static_cast<const Element*>(call.bias), Element(0), {}},
                             {}},
                            last_arguments(call)};
    args.epilogue.ptr_D = static_cast<Element*>(call.y);
    args.epilogue.dD =
        cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(m, n, 1));
    args.hw_info.device_id = device;
    args.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
    if constexpr (kTile.stream_k) {
      using Mode = decltype(args.scheduler.decomposition_mode);
      args.scheduler.decomposition_mode =
          divides_tiles(kTile, d, call.width, args.hw_info.sm_count) ? Mode::Heuristic : Mode::DataParallel;
    }
    return args;
  }

  static typename Last::Arguments last_arguments(const Fp8GemmCall& call) {
    if constexpr (kGated) {
      return {call.activation,  call.activation_from, call.gated, static_cast<Element*>(call.y),
              y_channels(call), call.tokens};
    } else {
      return {call.activation_from, call.activation};
    }
  }

  // Lets CUTLASS store into y what comes before the gated channels, which the epilogue itself stores: what
  // TMA would write behind the end of D it leaves out. There is no empty D; of one without channels before,
  // the first 8 are stored twice.
  static void leave_out_pairs(const Fp8GemmCall& call, typename Epilogue::Arguments epilogue,
                              typename Gemm::Params* params) {
    const auto shape = [&](int channels) {
      const Fp8Shape d = fp8_shape(kOperand, call.tokens, channels);
      return cute::make_shape(int(d.m), int(d.n), 1);
    };
    epilogue.dD = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, shape(y_channels(call)));
    const auto [m, n, l] = shape(std::max(call.activation_from, kGatedMultiple / 2));
    params->epilogue.tma_store_d =
        Epilogue::to_underlying_arguments(cute::make_shape(m, n, call.width, l), epilogue, nullptr)
            .tma_store_d;
  }
};

// Of calls with a gate, or another activation than the tanh GELU: fp8_gemm_gated_sm90.cuh.
template <class Element, Fp8Operand kOperand, int kIndex>
cudaError_t launch_gated_fp8_gemm(const Fp8GemmCall& call, int device, cudaStream_t stream);

// Of other calls with long K: fp8_gemm_promoted_sm90.cuh.
template <class Element, Fp8Operand kOperand, int kIndex>
cudaError_t launch_promoted_fp8_gemm(const Fp8GemmCall& call, int device, cudaStream_t stream);

template <Fp8Set kSet, class Element, Fp8Operand kOperand, int kIndex>
cudaError_t launch_fp8_gemm(const Fp8GemmCall& call, int device, cudaStream_t stream) {
  static_assert(kSet == Fp8Set::kWgmma);
#if defined(LYNX_FP8_ONE_TILE)  // half as much to compile
  return launch_gated_fp8_gemm<Element, kOperand, kIndex>(call, device, stream);
#else
  if (!is_plain(call)) return launch_gated_fp8_gemm<Element, kOperand, kIndex>(call, device, stream);
  if (promotes_sums(call)) {
    return launch_promoted_fp8_gemm<Element, kOperand, kIndex>(call, device, stream);
  }
  return Fp8GemmSm90<CutlassElement<Element>, kOperand, kIndex, false>::launch(call, device, stream);
#endif
}

// Instantiates a tile of one operand and element type.
#define LYNX_INSTANTIATE_FP8(Element, kOperand, kIndex)                                                    \
  template cudaError_t launch_fp8_gemm<Fp8Set::kWgmma, Element, kOperand, kIndex>(const Fp8GemmCall&, int, \
                                                                                  cudaStream_t)

}  // namespace lynx
