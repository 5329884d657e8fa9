// SPDX-License-Identifier: Apache-2.0
// The end of the wgmma GEMMs in FP8 that gelu_epilogue_sm90.cuh does not serve: any activation, or a gated
// one of which y has one channel for two of D.
#pragma once

#include "activation.h"
#include "epilogue_node_sm90.cuh"
#include "movmatrix.cuh"

namespace lynx {

// Channels are those of D, which lie on its mode kMode (m: 0, n: 1), but for y_channels.
template <class Element>
struct Fp8FinishArguments {
  Activation activation;
  int from;    // first channel that is activated
  bool gated;  // whether from there on channels come in pairs, activated and gate
  Element* y;
  int y_channels, tokens;
};

// Epilogue node: the conversion to the output's type, and from a channel on an activation before. CUTLASS
// stores what it returns through shared memory and TMA. Gated channels leave here, straight from the
// registers: a thread holds both values of a pair. CUTLASS's store, which knows whole tiles of D only, is
// told of a D that ends before them (fp8_gemm_sm90.cuh). The channels of a fragment lie in one run of
// kGeluMultiple, so that all of a warp take one branch.
template <class Element, int kMode>
struct Fp8Finish : EpilogueNode<Fp8FinishArguments<Element>> {
  using Base = EpilogueNode<Fp8FinishArguments<Element>>;
  using Base::Base;
  using Base::params;
  using typename Base::Params;

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Coordinates& at, int row, int column, const Params& params)
        : at(at), row(row), column(column), params(params) {}

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE cutlass::Array<Element, kCount> visit(const cutlass::Array<Accumulator, kCount>&,
                                                         int epi_v, int epi_m, int epi_n,
                                                         const cutlass::Array<float, kCount>& input) {
      static_assert(comes_in_blocks<Coordinates, kCount>());
      const auto here = at(cute::_, cute::_, cute::_, epi_m, epi_n)(epi_v * kCount);
      const int lane = int(threadIdx.x) % 32;
      // Of the block of 8 x 8 that a warp holds: the same for all of it.
      const int block_row = row + int(cute::get<0>(here)) - lane / 4;
      const int block_column = column + int(cute::get<1>(here)) - lane % 4 * 2;
      const int channel = kMode == 0 ? block_row : block_column;
      cutlass::Array<float, kCount> value = input;
      if (channel >= params.from) {
        CUTLASS_PRAGMA_UNROLL
        for (int first = 0; first < kCount; first += 2 * kToGate) activate_run<kCount>(value, first);
      }
      __syncwarp();  // no branch above may take the turning of blocks into it
      if (params.gated && channel >= params.from) {
        const int y_channel = params.from + (channel - params.from) / 2 + lane % 4 * 2;
        store_pairs(value, y_channel, (kMode == 0 ? block_column : block_row) + lane / 4);
      }
      return cutlass::NumericArrayConverter<Element, float, kCount>{}(value);
    }

   private:
    // Elements come in fours: two columns of a row and of the row 8 below; behind them, the next 8 columns.
    // A value's gate is so many elements behind it.
    static constexpr int kToGate = kMode == 0 ? 2 : 4;

    // Activates as many elements as hold pairs, from `first` on.
    template <int kCount>
    CUTLASS_DEVICE void activate_run(cutlass::Array<float, kCount>& value, int first) const {
      with_activation_apart(params.activation, [&](auto activate) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = first; i < first + kToGate; ++i) {
          value[i] = activate(value[i]);
          if (params.gated) {
            value[i] *= value[i + kToGate];
          } else {
            value[i + kToGate] = activate(value[i + kToGate]);
          }
        }
      });
    }

    // Two channels of a token each, from these on; where the channels are columns, of the token 8 below too.
    template <int kCount>
    CUTLASS_DEVICE void store_pairs(const cutlass::Array<float, kCount>& value, int channel,
                                    int token) const {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; i += 4) {
        if constexpr (kMode == 0) {
          store(turned<Element>({value[i], value[i + 1]}), channel, token + i * 2);
        } else if (i % 8 == 0) {
          store(packed({value[i], value[i + 1]}), channel + i, token);
          store(packed({value[i + 2], value[i + 3]}), channel + i, token + 8);
        }
      }
    }

    static CUTLASS_DEVICE uint32_t packed(const cutlass::Array<float, 2>& value) {
      const auto pair = cutlass::NumericArrayConverter<Element, float, 2>{}(value);
      return reinterpret_cast<const uint32_t&>(pair);
    }

    CUTLASS_DEVICE void store(uint32_t pair, int channel, int token) const {
      if (token < params.tokens && channel < params.y_channels) {
        *reinterpret_cast<uint32_t*>(params.y + int64_t(token) * params.y_channels + channel) = pair;
      }
    }

    Coordinates at;   // of the thread's elements, relative to its first
    int row, column;  // of its first
    const Params& params;
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    return callbacks_at<Callbacks>(args, params);
  }
};

}  // namespace lynx
