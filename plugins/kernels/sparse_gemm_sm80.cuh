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
#include "sparse_gemm.h"

namespace lynx {

// ---- Sparse activations: CUTLASS's epilogue, D row-major
// ------------------------------------------------------

// VisitorAuxStore whose bound is the true number of rows (the GEMM's M is padded, y is not), and that applies
// GELU on the way. A thread stores 8 neighbouring columns, so its first one speaks for all.
template <class ThreadMap, class Element, class Stride>
struct GeluStore
    : cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Element,
                                                      cutlass::FloatRoundStyle::round_to_nearest, Stride> {
  using Base =
      cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Element,
                                                      cutlass::FloatRoundStyle::round_to_nearest, Stride>;

  struct Arguments {
    typename Base::Arguments store;
    int rows = 0;
    int gelu_from = 0;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }

  CUTLASS_HOST_DEVICE GeluStore() {}
  CUTLASS_HOST_DEVICE GeluStore(const Params& params, const typename Base::SharedStorage& shared)
      : Base(params.store, shared), rows(params.rows), gelu_from(params.gelu_from) {}

  template <class BaseCallbacks>
  struct Callbacks : BaseCallbacks {
    CUTLASS_DEVICE Callbacks(const BaseCallbacks& base, int gelu_from)
        : BaseCallbacks(base), gelu_from(gelu_from) {}

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE auto visit(int iteration, int row, int column, int fragment,
                              const cutlass::Array<Accumulator, kCount>& accumulator,
                              const cutlass::Array<float, kCount>& input) {
      cutlass::Array<float, kCount> value = input;
      const auto at = cute::filter(this->tC_cAux(cute::_, cute::_, cute::_, iteration));
      if (cute::get<1>(at(fragment)) >= gelu_from) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i) value[i] = gelu_tanh(input[i]);
      }
      return BaseCallbacks::visit(iteration, row, column, fragment, accumulator, value);
    }

    int gelu_from;
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto base =
        Base::get_callbacks(tile, thread, cute::make_shape(rows, cute::get<1>(shape), cute::get<2>(shape)));
    return Callbacks<std::remove_const_t<decltype(base)>>(base, gelu_from);
  }

  int rows, gelu_from;
};

template <class Element, TileIndex kIndex>
struct ActivationGemmSm80 {
  static constexpr TileConfig kTile = kTiles[kIndex];
  using TileShape = cutlass::gemm::GemmShape<kTile.m, kTile.n, kTile.k>;
  using WarpShape = cutlass::gemm::GemmShape<kTile.warp_m, kTile.warp_n, kTile.k>;
  using InstructionShape = cutlass::gemm::GemmShape<16, 8, 32>;
  static constexpr int kAlignment = 8;  // 16 bytes

  // Epilogue tree: store(gelu(multiply_add(scale[m], accumulator, bias[n]))), in float32 until the store.
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
  using Store = GeluStore<ThreadMap, Element, cute::Stride<int64_t, cute::_1, cute::_0>>;
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
    const typename Store::Arguments store{
        {static_cast<Element*>(call.y), {call.n, cute::_1{}, cute::_0{}}}, call.m, call.gelu_from};
    return {{scale, {}, bias, {}}, store};
  }
};

// ---- Sparse weights: an epilogue of our own, D column-major
// ---------------------------------------------------

// y[token, channel] = gelu(D[channel, token] + bias[channel]), straight from the accumulators: CUTLASS has no
// column-major store for this GEMM. movmatrix turns an 8 x 8 block so that a lane holds two neighbouring
// channels.
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
      int channels, tokens, gelu_from;
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
      const bool gelu = channel >= params_.gelu_from;
      CUTLASS_PRAGMA_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const float* const d = &accumulators[(row + column * kRows) * 4];
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          store(d + 2 * half, bias[half], gelu, channel + 8 * half, first_token + column * 8);
        }
      }
    }
  }

 private:
  CUTLASS_DEVICE float bias_at(int channel) const {
    return channel < params_.channels ? float(params_.bias[channel]) : 0.0f;
  }

  // One 8 x 8 block of D: this lane's two values lie in row lane / 4, columns 2 (lane % 4) and the next.
  CUTLASS_DEVICE void store(const float* d, float bias, bool gelu, int channel, int token) const {
    cutlass::Array<float, 2> value;
    value[0] = d[0] + bias, value[1] = d[1] + bias;
    if (gelu) value[0] = gelu_tanh(value[0]), value[1] = gelu_tanh(value[1]);
    const cutlass::Array<Element, 2> pair = cutlass::NumericArrayConverter<Element, float, 2>{}(value);
    uint32_t turned;
    // Volatile: all lanes must be there, and the compiler may otherwise move it under the condition of the
    // store.
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                 : "=r"(turned)
                 : "r"(reinterpret_cast<const uint32_t&>(pair)));
    token += lane_ / 4, channel += lane_ % 4 * 2;
    if (channel < params_.channels && token < params_.tokens) {
      *reinterpret_cast<uint32_t*>(params_.y + int64_t(token) * params_.channels + channel) = turned;
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
    return {static_cast<const Element*>(call.bias), static_cast<Element*>(call.y), call.m, call.n,
            call.gelu_from};
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
