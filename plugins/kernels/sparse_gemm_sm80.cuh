// SPDX-License-Identifier: Apache-2.0
// CUTLASS's mma.sp GEMM with the epilogue y = s[m] * acc + bias[n], for one tile configuration.
// Included by the small instantiation files sparse_gemm_sm80_*.cu, which compile in parallel.
#pragma once

#include <atomic>

#include "cutlass/gemm/device/gemm_sparse_with_visitor.h"

// CUTLASS's visitors do not stand alone: they come after the GEMM.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"

#include "sparse24.h"
#include "sparse_gemm.h"

namespace lynx {

// VisitorAuxStore whose bound is the true number of rows: the GEMM's M is padded, y is not.
template <class ThreadMap, class Element, class Stride>
struct BoundedStore
    : cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Element,
                                                      cutlass::FloatRoundStyle::round_to_nearest, Stride> {
  using Base =
      cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Element,
                                                      cutlass::FloatRoundStyle::round_to_nearest, Stride>;

  struct Arguments {
    typename Base::Arguments store;
    int rows = 0;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }

  CUTLASS_HOST_DEVICE BoundedStore() {}
  CUTLASS_HOST_DEVICE BoundedStore(const Params& params, const typename Base::SharedStorage& shared)
      : Base(params.store, shared), rows(params.rows) {}

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    return Base::get_callbacks(tile, thread,
                               cute::make_shape(rows, cute::get<1>(shape), cute::get<2>(shape)));
  }

  int rows;
};

template <class Element, TileIndex kIndex>
struct SparseGemmSm80 {
  static constexpr TileConfig kTile = kTiles[kIndex];
  using TileShape = cutlass::gemm::GemmShape<kTile.m, kTile.n, kTile.k>;
  using WarpShape = cutlass::gemm::GemmShape<kTile.warp_m, kTile.warp_n, kTile.k>;
  using InstructionShape = cutlass::gemm::GemmShape<16, 8, 32>;
  static constexpr int kAlignment = 8;  // 16 bytes

  // Epilogue tree: store(multiply_add(scale[m], accumulator, bias[n])), in float32 until the store.
  using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<TileShape, WarpShape, Element,
                                                                           kAlignment, /*Stages=*/1>;
  using Scale = cutlass::epilogue::threadblock::VisitorColBroadcast<
      ThreadMap, float, cute::Stride<cute::_1, cute::_0, cute::_0>, /*EnableNullptr=*/false>;
  using Bias = cutlass::epilogue::threadblock::VisitorRowBroadcast<
      ThreadMap, Element, cute::Stride<cute::_0, cute::_1, cute::_0>, /*EnableNullptr=*/false>;
  using MultiplyAdd =
      cutlass::epilogue::threadblock::VisitorCompute<cutlass::homogeneous_multiply_add, float, float,
                                                     cutlass::FloatRoundStyle::round_to_nearest>;
  using Affine =
      cutlass::epilogue::threadblock::Sm80EVT<MultiplyAdd, Scale,
                                              cutlass::epilogue::threadblock::VisitorAccFetch, Bias>;
  using Store = BoundedStore<ThreadMap, Element, cute::Stride<int64_t, cute::_1, cute::_0>>;
  using Epilogue = cutlass::epilogue::threadblock::Sm80EVT<Store, Affine>;

  // Neighbouring thread blocks share a strip of 8 tiles, so that both operands stay in L2.
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

  using Gemm = cutlass::gemm::device::SparseGemmWithVisitor<
      Element, cutlass::layout::RowMajor, Element, cutlass::layout::ColumnMajor, Element,
      cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, TileShape,
      WarpShape, InstructionShape, Epilogue, Swizzle, kTile.stages, kAlignment, kAlignment,
      cutlass::arch::OpMultiplyAdd, /*EpilogueStages=*/1>;
  using Kernel = typename Gemm::GemmKernel;
  static constexpr int kSharedBytes = int(sizeof(typename Kernel::SharedStorage));
  static_assert(kSharedBytes == kTile.shared_bytes(), "tile_config.h states the shared memory a tile needs");

  static cudaError_t launch(const SparseLinearParams& params, const CompressedOperand& a, int device,
                            cudaStream_t stream) {
    const typename Gemm::Arguments args = arguments(params, a);
    if (Gemm::can_implement(args) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
    if (const cudaError_t error = allow_shared_memory(device); error != cudaSuccess) return error;
    const cutlass::gemm::GemmCoord grid =
        Swizzle().get_tiled_shape(args.problem_size, {kTile.m, kTile.n, kTile.k}, /*split_k=*/1);
    const typename Kernel::Params kernel_params(args.problem_size, grid, args.ref_A.non_const_ref(),
                                                args.ref_B.non_const_ref(), args.ref_E.non_const_ref(),
                                                args.epilogue);
    cutlass::Kernel<Kernel>
        <<<Swizzle().get_grid_shape(grid), Kernel::kThreadCount, kSharedBytes, stream>>>(kernel_params);
    return cudaGetLastError();
  }

 private:
  static typename Gemm::Arguments arguments(const SparseLinearParams& params, const CompressedOperand& a) {
    const int rows = int(padded_rows(params.rows));
    const int width = int(padded_width(params.channels, params.rank));
    const cutlass::gemm::GemmCoord problem(rows, params.out_channels, width);
    const typename Scale::Arguments scale{a.scale, 0.0f, {}};
    const typename Bias::Arguments bias{static_cast<const Element*>(params.bias), Element(0), {}};
    const typename Store::Arguments store{
        {static_cast<Element*>(params.y), {params.out_channels, cute::_1{}, cute::_0{}}}, int(params.rows)};
    const typename Epilogue::Arguments epilogue{{scale, {}, bias, {}}, store};
    using LayoutE = typename Gemm::LayoutE;
    return {problem,
            {static_cast<Element*>(a.values), width / 2},
            {static_cast<const Element*>(params.weight), width},
            {reinterpret_cast<typename Gemm::ElementE*>(a.metadata), LayoutE::packed({rows, width / kBlock})},
            epilogue};
  }

  // Raises the kernel's shared memory limit, once per device. Two threads at once do the same harmless thing
  // twice.
  static cudaError_t allow_shared_memory(int device) {
    static std::atomic<uint64_t> done{0};
    const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
    if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(cutlass::Kernel<Kernel>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
    return error;
  }
};

}  // namespace lynx
