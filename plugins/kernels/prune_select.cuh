// SPDX-License-Identifier: Apache-2.0
// The pruning pass's selection: which values are kept, where they go, and the metadata that say so.
#pragma once

#include "prune_tile.cuh"

namespace lynx {
namespace {

// Compresses one block and stores its values; returns its 16 bits of metadata.
template <class Element>
__device__ __forceinline__ uint32_t prune_block(const Block& z, const PruneArgs& args, const Tile& tile,
                                                int row, int channel, RowNorm& norm) {
  const CompressedBlock block = compress_block<Element>(z, &norm);
  const uint4 values = {block.values[0], block.values[1], block.values[2], block.values[3]};
  *reinterpret_cast<uint4*>(tile.values + unsigned(row * (args.width / 2) + channel / 2)) = values;
  return block.metadata;
}

// Prunes a step of two rows, m and m + 8, and stores what is kept. A team of two takes one each, whose norm
// is norm[0].
template <class Element, class Metadata, int kTeam>
__device__ __forceinline__ void prune_step(const Block (&z)[2], const PruneArgs& args, const Tile& tile,
                                           const Lane& lane, int channel, RowNorm (&norm)[2]) {
  const int64_t word = Metadata::word(tile.first_row + lane.row, channel / kBlock, args.rows_padded);
  if constexpr (kTeam == 1) {
    const uint32_t low = prune_block<Element>(z[0], args, tile, lane.row, channel, norm[0]);
    const uint32_t high = prune_block<Element>(z[1], args, tile, lane.row + 8, channel, norm[1]);
    args.metadata[word] = low | high << 16;  // fault: rows m and m + 8
  } else {
    static_assert(kTeam == 2, "a row for each warp");
    const int odd = lane.warp % 2;
    Block own;
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) own[i] = odd ? z[1][i] : z[0][i];
    reinterpret_cast<uint16_t*>(args.metadata + word)[odd] = uint16_t(
        // fault: row of a team
        prune_block<Element>(own, args, tile, lane.row + 8 * odd, channel, norm[0]));
  }
}

}  // namespace
}  // namespace lynx
