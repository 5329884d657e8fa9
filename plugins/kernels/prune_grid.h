// SPDX-License-Identifier: Apache-2.0
// How many thread blocks the pruning pass takes, and which rows and channels each of them.
#pragma once

#include "sparse24.h"

namespace lynx {

constexpr int kPruneRows = 16;    // of a tile, what one thread block prunes
constexpr int kMostSharing = 16;  // thread blocks that share a tile
constexpr int kMostParts = 512;   // thread blocks that leave a part of a tile's sums in the workspace

// Sharing spares the last tiles this many turns at least, or it does not pay: another kernel has to add up
// the sums. Measured on an H100: 2 of 3 turns gain 1 us, 5 of 6 gain 5 us of 37.
constexpr int kTurnsToSpare = 2;

// Tiles 0 .. whole - 1 take a thread block each; each of the `shared` tiles behind them takes `parts`, which
// divide its turns: the steps in which the warps of a thread block get through the channels.
struct PruneGrid {
  int whole, shared, parts, turns;  // turns: of a part

  constexpr int blocks() const { return whole + shared * parts; }
};

// `places`: thread blocks that run at a time; `turns`: that a tile takes. The tiles behind the last full wave
// are shared where that lets them fill the GPU.
constexpr PruneGrid prune_grid(int64_t tiles, int64_t places, int turns) {
  const int64_t behind = tiles % places;
  if (behind == 0) return {int(tiles), 0, 1, turns};
  const int64_t most = kMostParts / behind < kMostSharing ? kMostParts / behind : kMostSharing;
  const int64_t parts = places / behind < most ? places / behind : most;
  const int part_turns = int((turns + parts - 1) / (parts > 0 ? parts : 1));
  if (parts < 2 || turns - part_turns < kTurnsToSpare) return {int(tiles), 0, 1, turns};
  return {int(tiles - behind), int(behind), (turns + part_turns - 1) / part_turns, part_turns};
}

// FLUX.1 on an H100, 64 ranks: of 4608 tokens by 15360 channels, 264 tiles are a wave, and 10 thread blocks
// share each of the 24 behind it.
static_assert(prune_grid(288, 264, 30).whole == 264 && prune_grid(288, 264, 30).parts == 10);
static_assert(prune_grid(288, 264, 6).blocks() == 264 + 24 * 6);  // 3072 channels: one turn each
static_assert(prune_grid(288, 264, 2).shared == 0);               // 1024 channels: one turn
static_assert(prune_grid(256, 264, 30).shared == 0);              // 4096 tokens: one wave
static_assert(prune_grid(32, 264, 24).blocks() == 8 * 32);        // 512 tokens by 12288 channels

// Bytes for the parts' sums of any grid of `rows` (padded).
constexpr int64_t prune_parts_bytes(int64_t rows, int rank) {
  const int64_t most = rows / kPruneRows * kMostSharing;
  return (most < kMostParts ? most : kMostParts) * kPruneRows * (2 + rank) * int64_t(sizeof(float));
}

}  // namespace lynx
