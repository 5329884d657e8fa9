// SPDX-License-Identifier: Apache-2.0
// The end of a wgmma GEMM with a gated sparse weight: y has one channel for two rows of D.
#pragma once

#include "activation.h"
#include "epilogue_node_sm90.cuh"
#include "movmatrix.cuh"

namespace lynx {

template <class Element>
struct GatedStoreArguments {
  Activation activation;
  int from;  // first row of D that is activated
  Element* y;
  int channels, tokens;  // of y
};

// Epilogue node: y[token, channel] straight from the registers, where CUTLASS's store through shared memory
// and TMA knows only tiles of D itself; the GEMM has no D (void). A thread holds rows 8 apart of the same
// tokens. movmatrix turns an 8 x 8 block so that a lane has two neighbouring channels; a warp writes 16 bytes
// of a token at a time.
template <class Element>
struct GatedStore : EpilogueNode<GatedStoreArguments<Element>> {
  using Base = EpilogueNode<GatedStoreArguments<Element>>;
  using Base::Base;
  using Base::params;
  using typename Base::Params;
  using ElementAux = Element;  // CUTLASS asks for the type of a D that it does not write

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Coordinates& at, int row, int token, const Params& params)
        : at(at), row(row), token(token), params(params) {}

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE cutlass::Array<Element, kCount> visit(const cutlass::Array<Accumulator, kCount>&,
                                                         int epi_v, int epi_m, int epi_n,
                                                         const cutlass::Array<float, kCount>& d) {
      static_assert(comes_in_blocks<Coordinates, kCount>());
      const auto here = at(cute::_, cute::_, cute::_, epi_m, epi_n)(epi_v * kCount);
      const int lane = int(threadIdx.x) % 32;
      const int block_row = row + int(cute::get<0>(here)) - lane / 4;  // the same for all of the warp
      const bool gated = block_row >= params.from;
      cutlass::Array<float, kCount> value = d;
      if (gated) {
        with_activation(params.activation, [&](auto activate) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kCount; i += 4) {
            value[i] = activate(d[i]) * d[i + 2], value[i + 1] = activate(d[i + 1]) * d[i + 3];
          }
        });
      }
      const int channel = (gated ? params.from + (block_row - params.from) / 2 : block_row) + lane % 4 * 2;
      int to = token + int(cute::get<1>(here)) - lane % 4 * 2 + lane / 4;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; i += 4, to += 8) {
        __syncwarp();  // no branch above may take the turning of blocks into it
        const uint32_t first = turned<Element>({value[i], value[i + 1]});
        const uint32_t second = turned<Element>({value[i + 2], value[i + 3]});
        Element* const y = params.y + int64_t(to) * params.channels + channel;
        if (to < params.tokens && channel < params.channels) *reinterpret_cast<uint32_t*>(y) = first;
        if (to < params.tokens && !gated && channel + 8 < params.channels) {
          *reinterpret_cast<uint32_t*>(y + 8) = second;
        }
      }
      return {};
    }

   private:
    Coordinates at;  // of the thread's elements, relative to its first
    int row, token;  // of its first
    const Params& params;
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    return callbacks_at<Callbacks>(args, params);
  }
};

}  // namespace lynx
