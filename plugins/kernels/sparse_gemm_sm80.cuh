// SPDX-License-Identifier: Apache-2.0
// CUTLASS's mma.sp GEMM with our epilogues, for one tile configuration. Included by the small instantiation
// files sparse_gemm_sm80_*.cu, which compile in parallel.
#pragma once

#include <atomic>
#include <type_traits>

#include "cutlass/gemm/device/gemm_sparse_with_visitor.h"

// CUTLASS's visitors do not stand alone: they come after the GEMM.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"

#include "activation.h"
#include "cutlass_element.h"
#include "movmatrix.cuh"
#include "sparse_gemm.h"

namespace lynx {

// ---- Sparse activations: CUTLASS's epilogue, D row-major
// ------------------------------------------------------

// VisitorAuxStore whose bound is the true number of rows (the GEMM's M is padded, y is not), and that applies
// an activation on the way. A thread stores 8 neighbouring columns, so its first one speaks for all.
template <class ThreadMap, class Element, class Stride>
struct ActivatedStore
    : cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Element,
                                                      cutlass::FloatRoundStyle::round_to_nearest, Stride> {
  using Base =
      cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Element,
                                                      cutlass::FloatRoundStyle::round_to_nearest, Stride>;

  struct Arguments {
    typename Base::Arguments store;
    int rows = 0;
    Activation activation = Activation::kNone;
    int activation_from = 0;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }

  CUTLASS_HOST_DEVICE ActivatedStore() {}
  CUTLASS_HOST_DEVICE ActivatedStore(const Params& params, const typename Base::SharedStorage& shared)
      : Base(params.store, shared), params(params) {}

  template <class BaseCallbacks>
  struct Callbacks : BaseCallbacks {
    CUTLASS_DEVICE Callbacks(const BaseCallbacks& base, const Params& params)
        : BaseCallbacks(base), activation(params.activation), activation_from(params.activation_from) {}

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE auto visit(int iteration, int row, int column, int fragment,
                              const cutlass::Array<Accumulator, kCount>& accumulator,
                              const cutlass::Array<float, kCount>& input) {
      cutlass::Array<float, kCount> value = input;
      const auto at = cute::filter(this->tC_cAux(cute::_, cute::_, cute::_, iteration));
      if (cute::get<1>(at(fragment)) >= activation_from) {
        with_activation(activation, [&](auto activate) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kCount; ++i) value[i] = activate(input[i]);
        });
      }
      return BaseCallbacks::visit(iteration, row, column, fragment, accumulator, value);
    }

    Activation activation;
    int activation_from;
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto base = Base::get_callbacks(
        tile, thread, cute::make_shape(params.rows, cute::get<1>(shape), cute::get<2>(shape)));
    return Callbacks<std::remove_const_t<decltype(base)>>(base, params);
  }

  Params params;
};

template <class Element, TileIndex kIndex>
struct ActivationGemmSm80 {
  static constexpr TileConfig kTile = kTiles[kIndex];
  using TileShape = cutlass::gemm::GemmShape<kTile.m, kTile.n, kTile.k>;
  using WarpShape = cutlass::gemm::GemmShape<kTile.warp_m, kTile.warp_n, kTile.k>;
  using InstructionShape = cutlass::gemm::GemmShape<16, 8, 32>;
  static constexpr int kAlignment = 8;  // 16 bytes

  // Epilogue tree: store(activation(multiply_add(scale[m], accumulator, bias[n]))), in float32 until the
  // store.
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
  using Store = ActivatedStore<ThreadMap, Element, cute::Stride<int64_t, cute::_1, cute::_0>>;
  using Tree = cutlass::epilogue::threadblock::Sm80EVT<Store, Affine>;

  // Neighbouring thread blocks share a strip of 8 tiles, so that both operands stay in L2.
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

  using Kernel = typename cutlass::gemm::device::SparseGemmWithVisitor<
      Element, cutlass::layout::RowMajor, Element, cutlass::layout::ColumnMajor, Element,
      cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, TileShape,
      WarpShape, InstructionShape, Tree, Swizzle, kTile.stages, kAlignment, kAlignment,
      cutlass::arch::OpMultiplyAdd, /*EpilogueStages=*/1>::GemmKernel;

  static typename Tree::Arguments epilogue(const SparseGemmCall& call) {
    const typename Scale::Arguments scale{call.scale, 0.0f, {}};
    const typename Bias::Arguments bias{static_cast<const Element*>(call.bias), Element(0), {}};
    const typename Store::Arguments store{{static_cast<Element*>(call.y), {call.n, cute::_1{}, cute::_0{}}},
                                          call.m,
                                          call.activation,
                                          call.activation_from};
    return {{scale, {}, bias, {}}, store};
  }
};

// ---- Sparse weights: an epilogue of our own, D column-major
// ---------------------------------------------------

// y[token, channel] = activation(D[channel, token] + bias[channel]), straight from the accumulators: CUTLASS
// has no column-major store for this GEMM. movmatrix turns an 8 x 8 block so that a lane holds two
// neighbouring channels. Where gated, y has one channel for rows 8 apart of D, whose accumulators a lane
// holds both.
template <class Mma, class Element>
class TransposedEpilogue {
 public:
  using OutputOp = void;  // this and the iterator are asked for by CUTLASS's kernel, not used
  struct OutputTileIterator {
    static constexpr int kElementsPerAccess = 1;
    using TensorRef = cutlass::TensorRef<Element, cutlass::layout::ColumnMajor>;
  };
  struct SharedStorage {};

  struct FusionCallbacks {
    struct Arguments {
      const Element* bias;
      Element* y;
      int channels, y_channels, tokens;  // rows of D, channels of y
      Activation activation;
      int activation_from;
      bool gated;
    };
    using Params = Arguments;

    template <class ProblemSize>
    CUTLASS_HOST_DEVICE static Params to_underlying_arguments(const ProblemSize&, const Arguments& args,
                                                              void*) {
      return args;
    }
  };
  using Params = typename FusionCallbacks::Params;

  CUTLASS_DEVICE TransposedEpilogue(const Params& params, SharedStorage&, int, int warp, int lane)
      : params_(params), warp_(warp), lane_(lane) {}

  template <class Shape>
  CUTLASS_DEVICE void operator()(const typename Mma::FragmentC& accumulators,
                                 const cutlass::gemm::GemmCoord& tile, const Shape&, int) const {
    using Operator = typename Mma::Operator;
    constexpr int kRows = Operator::MmaIterations::kRow, kColumns = Operator::MmaIterations::kColumn;
    const int warp_m = warp_ % Mma::WarpCount::kM, warp_n = warp_ / Mma::WarpCount::kM;
    const int first_channel = tile.m() * Mma::Shape::kM + warp_m * Operator::Shape::kM;
    const int first_token = tile.n() * Mma::Shape::kN + warp_n * Operator::Shape::kN;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const int channel = first_channel + row * 16;
      const float bias[2] = {bias_at(channel + lane_ / 4), bias_at(channel + 8 + lane_ / 4)};
      CUTLASS_PRAGMA_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const float* const d = &accumulators[(row + column * kRows) * 4];
        Pair low, high;  // of rows lane / 4 and the one 8 below
        low[0] = d[0] + bias[0], low[1] = d[1] + bias[0], high[0] = d[2] + bias[1], high[1] = d[3] + bias[1];
        finish(low, high, channel, first_token + column * 8);
      }
    }
  }

 private:
  using Pair = cutlass::Array<float, 2>;  // this lane's of an 8 x 8 block: columns 2 (lane % 4) and the next

  CUTLASS_DEVICE float bias_at(int channel) const {
    return channel < params_.channels ? float(params_.bias[channel]) : 0.0f;
  }

  // 16 rows of D from `channel` on. All lanes turn both blocks, and store what there is.
  CUTLASS_DEVICE void finish(Pair low, Pair high, int channel, int token) const {
    const int from = params_.activation_from;
    const bool behind = channel >= from, gated = behind && params_.gated;
    if (behind) {
      with_activation(params_.activation, [&](auto activate) {
        low[0] = activate(low[0]), low[1] = activate(low[1]);
        if (!gated) high[0] = activate(high[0]), high[1] = activate(high[1]);
      });
    }
    if (gated) low[0] *= high[0], low[1] *= high[1];
    __syncwarp();  // no branch above may take the turning of blocks into it
    const uint32_t first = turned<Element>(low), second = turned<Element>(high);
    store(first, gated ? from + (channel - from) / 2 : channel, token);
    if (!gated) store(second, channel + 8, token);
  }

  // Into y, of channels from `channel` on.
  CUTLASS_DEVICE void store(uint32_t pair, int channel, int token) const {
    token += lane_ / 4, channel += lane_ % 4 * 2;
    if (channel < params_.y_channels && token < params_.tokens) {
      *reinterpret_cast<uint32_t*>(params_.y + int64_t(token) * params_.y_channels + channel) = pair;
    }
  }

  const Params& params_;
  int warp_, lane_;
};

template <class Element, TileIndex kIndex>
struct WeightGemmSm80 {
  static constexpr TileConfig kTile = kTiles[kIndex];
  using TileShape = cutlass::gemm::GemmShape<kTile.m, kTile.n, kTile.k>;
  using WarpShape = cutlass::gemm::GemmShape<kTile.warp_m, kTile.warp_n, kTile.k>;
  using InstructionShape = cutlass::gemm::GemmShape<16, 8, 32>;
  static constexpr int kAlignment = 8;  // 16 bytes

  using Mma = typename cutlass::gemm::threadblock::DefaultSparseMma<
      Element, cutlass::layout::RowMajor, kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment,
      float, cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, TileShape,
      WarpShape, InstructionShape, kTile.stages, cutlass::arch::OpMultiplyAdd>::ThreadblockMma;
  using Epilogue = TransposedEpilogue<Mma, Element>;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;
  using Kernel = cutlass::gemm::kernel::SparseGemmWithEpilogueVisitor<Mma, Epilogue, Swizzle>;

  static typename Epilogue::Params epilogue(const SparseGemmCall& call) {
    return {static_cast<const Element*>(call.bias),
            static_cast<Element*>(call.y),
            call.m,
            y_channels(call),
            call.n,
            call.activation,
            call.activation_from,
            call.gated};
  }
};

// ---- Launch
// ---------------------------------------------------------------------------------------------------

template <class Element, TileIndex kIndex, Operand kOperand>
struct SparseGemmSm80 {
  static constexpr TileConfig kTile = kTiles[kIndex];
  using Gemm = std::conditional_t<kOperand == Operand::kWeight, WeightGemmSm80<Element, kIndex>,
                                  ActivationGemmSm80<Element, kIndex>>;
  using Kernel = typename Gemm::Kernel;
  using Swizzle = typename Gemm::Swizzle;
  static constexpr int kSharedBytes = int(sizeof(typename Kernel::SharedStorage));
  static_assert(kSharedBytes == kTile.shared_bytes(), "tile_config.h states the shared memory a tile needs");

  static cudaError_t launch(const SparseGemmCall& call, int device, cudaStream_t stream) {
    if (const cudaError_t error = allow_shared_memory(device); error != cudaSuccess) return error;
    using ElementE = typename Kernel::Mma::ElementE;
    using LayoutE = typename Kernel::Mma::LayoutE;
    const int rows = int(padded_rows(call.m));  // the metadata's rows; the epilogue knows the true number
    const cutlass::gemm::GemmCoord problem(rows, call.n, call.width);
    const cutlass::gemm::GemmCoord grid =
        Swizzle().get_tiled_shape(problem, {kTile.m, kTile.n, kTile.k}, /*split_k=*/1);
    const auto values = const_cast<Element*>(static_cast<const Element*>(call.values));
    const auto dense = const_cast<Element*>(static_cast<const Element*>(call.dense));
    const auto metadata = const_cast<ElementE*>(reinterpret_cast<const ElementE*>(call.metadata));
    const typename Kernel::Params params(problem, grid, {values, call.width / 2}, {dense, call.width},
                                         {metadata, LayoutE::packed({rows, call.width / kBlock})},
                                         Gemm::epilogue(call));
    cutlass::Kernel<Kernel>
        <<<Swizzle().get_grid_shape(grid), Kernel::kThreadCount, kSharedBytes, stream>>>(params);
    return cudaGetLastError();
  }

 private:
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

template <InstructionSet kSet, class Element, Operand kOperand>
cudaError_t launch_gemm(const SparseGemmCall& call, int tile, int device, cudaStream_t stream) {
  static_assert(kSet == InstructionSet::kMmaSp);
  using Type = CutlassElement<Element>;
  switch (tile) {
    case kMedium:
      return SparseGemmSm80<Type, kMedium, kOperand>::launch(call, device, stream);
    case kSmall:
      return SparseGemmSm80<Type, kSmall, kOperand>::launch(call, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lynx
