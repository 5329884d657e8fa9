// SPDX-License-Identifier: Apache-2.0
// The pruning pass: one read of x gives the compressed operand of the sparse GEMM.
//
// A thread block owns a tile of 16 rows, its warps share the channels in steps of 64. In a step a lane owns
// one block of 16 channels in rows g and g + 8 (g = lane / 4): two 16-byte loads and one 16-byte store a row,
// one metadata word, and, because a sum over channels has no order, just the fragment that mma.m16n8k16 wants
// for T = z A^T when the lane reads the same 16 channels of A. Norms and T are summed over the warps at the
// end, when the row scale is known and U = T / s can be written behind the kept values. A warp has registers
// for 64 ranks: of 128, two warps sum one half each over the same channels, and prune one half each.
//
// Tiles that would leave most of the GPU idle, of few tokens or behind the last full wave, are shared by
// several thread blocks (prune_grid.h), each of which takes a part of the channels; a second kernel adds
// their sums up.
//
// What x is made into before it is pruned (Producer) happens on the way in. For a norm the thread block reads
// its rows twice before: for the mean and for the variance; they stay in the L1 cache.
#include <type_traits>

#include "activation.h"
#include "launch.h"
#include "prune_grid.h"
#include "sparse24.h"
#include "sparse_linear.h"
#include "tile_config.h"
#include "warp.h"

namespace lynx {
namespace {

constexpr int kStep = 64;          // channels a warp takes at once: 4 lanes of 16
constexpr int kRows = kPruneRows;  // of a thread block

// What a kernel is compiled for.
enum class Variant {
  kPlain,    // x as it is, selected by magnitude
  kGeneral,  // with a centre, a saliency or both
  kNorm,     // kPlain of norm(x) * gain + shift
  kAct,      // kPlain of gelu(x) or silu(x) * gate
};

// The warps of a thread block that prunes with up to `kRankCap` ranks.
template <int kRankCap, Variant kVariant>
struct Warps {
  static constexpr bool kPlain = kVariant == Variant::kPlain;
  static constexpr bool kProduces = kVariant == Variant::kNorm || kVariant == Variant::kAct;
  static constexpr int kCap = kRankCap;
  static constexpr int kRanks = kRankCap < 64 ? kRankCap : 64;             // that a warp sums
  static constexpr int kTeam = kRankCap > kRanks ? kRankCap / kRanks : 1;  // warps at the same channels
  static constexpr int kTeams = 8;
  static constexpr int kCount = kTeam * kTeams;
  static constexpr int kThreads = 32 * kCount;
  // Thread blocks that share an SM, from the registers they need: 16 warps of 128 with 64 ranks each or a
  // producer, else 24 of 80.
  static constexpr int kBlocksPerSm = kTeam > 1 ? 1 : kRanks == 64 || kProduces ? 2 : 3;
};

struct PruneArgs {
  const uint16_t* x;      // [rows, channels], in order
  const uint16_t* gate;   // [rows, channels] or null: gelu(x) instead of silu(x) * gate
  const uint16_t* gain;   // [rows / rows_per_gain, channels]
  const uint16_t* shift;  // the same
  int64_t rows_per_gain;
  float epsilon;
  bool rms;
  const uint16_t* lora_down;  // [rank, channels]
  const uint16_t* centre;     // [channels] or null
  const uint16_t* saliency;   // [channels] or null
  uint16_t* values;           // [rows_padded, width / 2]
  uint32_t* metadata;         // layout `Metadata`
  float* scale;               // [rows_padded]
  float* parts;               // of each part of a shared tile: |z|^2 and |z~|^2 of its rows, T [kRows, rank]
  PruneGrid grid;
  int part_channels;  // of a part of a shared tile
  int inverse_parts;  // 2^16 / grid.parts, rounded up: a thread block's part divides by it exactly
  int64_t rows, rows_padded;
  int channels, width, rank;
  bool norm_scale;
};

// Where a thread stands in its warp's step.
struct Lane {
  int warp = threadIdx.x / 32;
  int row = threadIdx.x % 32 / 4;  // g: rows g and g + 8 of a tile
  int quad = threadIdx.x % 4;      // which 16 of the 64 channels
};

using Block = uint32_t[kBlock / 2];  // 16 channels, two per word

// What a thread block prunes: a tile, or a part of a shared one. Pointers and numbers that all its threads
// share, offsets of 32 bits and no division: everything else takes registers that the sums of T need.
struct Tile {
  int first_row;
  int rows;                  // that are not padding; none or less: all are
  const uint16_t *x, *gate;  // [kRows, channels]
  uint16_t* values;          // [kRows, width / 2]
  int begin, end;            // channels, in steps
  int part;                  // of all parts of the shared tiles; negative: a whole tile
};

__device__ __forceinline__ Tile tile_of(const PruneArgs& args, int block) {
  const PruneGrid& grid = args.grid;
  Tile tile;
  tile.part = block - grid.whole;
  const bool whole = tile.part < 0;
  const int shared = whole ? tile.part : tile.part * args.inverse_parts >> 16;
  tile.begin = whole ? 0 : (tile.part - shared * grid.parts) * args.part_channels;
  // fault: channels of a part
  tile.end = min(whole ? args.channels : tile.begin + args.part_channels, args.channels);
  tile.first_row = (grid.whole + shared) * kRows;  // fault: shared tile
  tile.rows = int(min(int64_t(kRows), args.rows - tile.first_row));
  tile.x = args.x + int64_t(tile.first_row) * args.channels;  // fault: address of a tile
  tile.gate = args.gate == nullptr ? nullptr : args.gate + int64_t(tile.first_row) * args.channels;
  tile.values = args.values + int64_t(tile.first_row) * (args.width / 2);
  return tile;
}

// Eight channels of a block, the lower or the upper.
__device__ __forceinline__ uint4 load_half(const uint16_t* from, int half) {
  return __ldg(reinterpret_cast<const uint4*>(from) + half);
}

__device__ __forceinline__ void load_block(Block& out, const uint16_t* from) {
  const uint4 low = __ldg(reinterpret_cast<const uint4*>(from));
  const uint4 high = __ldg(reinterpret_cast<const uint4*>(from) + 1);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

__device__ __forceinline__ void clear_block(Block& out) {
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) out[i] = 0;
}

// Mean and reciprocal deviation of a row, and its row of gain and shift.
struct RowStatistics {
  float mean, scale;
  int gain_row;
};
struct BlockStatistics {
  RowStatistics row[kRows];
};

template <class Element>
__device__ __forceinline__ float low_of(uint32_t pair) {
  return Element::to_float(uint16_t(pair));
}
template <class Element>
__device__ __forceinline__ float high_of(uint32_t pair) {
  return Element::to_float(uint16_t(pair >> 16));
}
template <class Element>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return uint32_t(Element::from_float(low)) | uint32_t(Element::from_float(high)) << 16;
}

// Sum over the channels of (x - centre)^power of a row, by one warp; every lane gets it.
template <class Element, int kPower>
__device__ __forceinline__ float warp_sum(const PruneArgs& args, const Tile& tile, int row, float centre) {
  float sum = 0.0f;
  for (int channel = int(threadIdx.x % 32) * kBlock; channel < args.channels; channel += 32 * kBlock) {
    Block x;
    load_block(x, tile.x + unsigned(row * args.channels + channel));
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      const float low = low_of<Element>(x[i]) - centre, high = high_of<Element>(x[i]) - centre;
      sum += kPower == 2 ? low * low + high * high : low + high;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Statistics of the thread block's rows, which its warps share.
template <class Element, int kWarps>
__device__ __forceinline__ void row_statistics(BlockStatistics& statistics, const PruneArgs& args,
                                               const Tile& tile, const Lane& lane) {
  for (int row = lane.warp; row < kRows; row += kWarps) {
    RowStatistics of_row = {0.0f, 0.0f, 0};
    if (row < tile.rows) {
      const float count = float(args.channels);
      if (!args.rms) of_row.mean = warp_sum<Element, 1>(args, tile, row, 0.0f) / count;
      const float variance = warp_sum<Element, 2>(args, tile, row, of_row.mean) / count;
      of_row.scale = __fdiv_rn(1.0f, __fsqrt_rn(variance + args.epsilon));
      // fault: row of the gain
      of_row.gain_row = int((tile.first_row + row) / args.rows_per_gain);
    }
    if (threadIdx.x % 32 == 0) statistics.row[row] = of_row;
  }
  __syncthreads();
}

template <class Element>
__device__ __forceinline__ void apply_norm(Block& z, const PruneArgs& args, int channel,
                                           const RowStatistics& of_row) {
  const int64_t at = int64_t(of_row.gain_row) * args.channels + channel;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the block: a thread has no registers to spare
    const uint4 gain = load_half(args.gain + at, half), shift = load_half(args.shift + at, half);
    const uint32_t gains[] = {gain.x, gain.y, gain.z, gain.w},
                   shifts[] = {shift.x, shift.y, shift.z, shift.w};
#pragma unroll
    for (int i = 0; i < kBlock / 4; ++i) {
      uint32_t& pair = z[half * (kBlock / 4) + i];
      const float low = (low_of<Element>(pair) - of_row.mean) * of_row.scale;
      const float high = (high_of<Element>(pair) - of_row.mean) * of_row.scale;
      pair = pair_of<Element>(low * low_of<Element>(gains[i]) + low_of<Element>(shifts[i]),
                              high * high_of<Element>(gains[i]) + high_of<Element>(shifts[i]));
    }
  }
}

template <class Element>
__device__ __forceinline__ void apply_activation(Block& z, const Tile& tile, unsigned at) {
  if (tile.gate == nullptr) {
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      z[i] = pair_of<Element>(gelu_tanh(low_of<Element>(z[i])), gelu_tanh(high_of<Element>(z[i])));
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 gate = load_half(tile.gate + at, half);
    const uint32_t gates[] = {gate.x, gate.y, gate.z, gate.w};
#pragma unroll
    for (int i = 0; i < kBlock / 4; ++i) {
      uint32_t& pair = z[half * (kBlock / 4) + i];
      pair = pair_of<Element>(silu(low_of<Element>(pair)) * low_of<Element>(gates[i]),
                              silu(high_of<Element>(pair)) * high_of<Element>(gates[i]));
    }
  }
}

// z of one block: rows beyond M and channels beyond K are zero.
template <class Element, Variant kVariant>
__device__ __forceinline__ void load_z(Block& z, const PruneArgs& args, const Tile& tile, int row,
                                       int channel, const BlockStatistics* statistics) {
  // fault: last row
  if (row >= tile.rows || channel >= args.channels) return clear_block(z);
  const unsigned at = unsigned(row * args.channels + channel);
  load_block(z, tile.x + at);
  if constexpr (kVariant == Variant::kNorm) apply_norm<Element>(z, args, channel, statistics->row[row]);
  if constexpr (kVariant == Variant::kAct) apply_activation<Element>(z, tile, at);
  if (kVariant == Variant::kGeneral && args.centre != nullptr) {
    Block centre;
    load_block(centre, args.centre + channel);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) z[i] = subtract_pair<Element>(z[i], centre[i]);
  }
}

// Compresses one block and stores its values; returns its 16 bits of metadata.
template <class Element, Variant kVariant>
__device__ __forceinline__ uint32_t prune_block(const Block& z, const Block& saliency, const PruneArgs& args,
                                                const Tile& tile, int row, int channel, RowNorm& norm) {
  const bool scored = kVariant == Variant::kGeneral && args.saliency != nullptr;
  const CompressedBlock block =
      scored ? compress_block<Element>(z, saliency, &norm) : compress_block<Element>(z, nullptr, &norm);
  const uint4 values = {block.values[0], block.values[1], block.values[2], block.values[3]};
  *reinterpret_cast<uint4*>(tile.values + unsigned(row * (args.width / 2) + channel / 2)) = values;
  return block.metadata;
}

// A warp's part of T for 16 rows and its ranks: [n tile of 8 ranks][mma accumulator].
template <class W>
struct PartialT {
  float sum[W::kRanks / 8 + (W::kRanks == 0)][4] = {};
};

// T += z A^T over one step. Every lane of the warp takes part; channels beyond K are zero on both sides. The
// loads of A come from L2 and must run ahead of the products, hence no branch; but of all of them at a time
// only where there is nothing else to do with the registers.
template <class Element, class W>
__device__ __forceinline__ void accumulate_t(PartialT<W>& t, const Block (&z)[2], const PruneArgs& args,
                                             const Lane& lane, int channel) {
  const int first_rank = lane.warp % W::kTeam * W::kRanks;  // fault: ranks of a team
#pragma unroll
  for (int n = 0; n < W::kRanks / 8; ++n) {
    Block down;
    const int rank = first_rank + 8 * n;
    if (!W::kPlain && n == W::kRanks / 16 && rank >= args.rank) break;
    // fault: last rank
    if (rank < args.rank && channel < args.channels) {
      // fault: rank of T
      load_block(down, args.lora_down + unsigned((rank + lane.row) * args.channels + channel));
    } else {
      clear_block(down);
    }
#pragma unroll
    for (int q = 0; q < kBlock / 2; q += 2) {
      // fault: fragments
      mma_m16n8k16<Element>(t.sum[n], z[0][q], z[1][q], z[0][q + 1], z[1][q + 1], down[q], down[q + 1]);
    }
  }
}

// What the warps of a thread block exchange.
template <class W>
struct Exchange {
  static constexpr int kSums = W::kCount / 2 * kRows * W::kRanks;
  RowNorm norm[W::kCount][kRows];
  float scale[kRows];
  float t[kSums > 0 ? kSums : 1];  // by accumulator, of half the warps; at the end T [kRows][kCap]
};

// Sums the norms over lanes and warps in a fixed order; the first kRows threads get those of a row each.
template <class W>
__device__ __forceinline__ RowNorm reduce_norm(Exchange<W>& shared, RowNorm (&norm)[2], const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    RowNorm& sum = norm[i];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum.all += __shfl_xor_sync(~0u, sum.all, step);
      sum.kept += __shfl_xor_sync(~0u, sum.kept, step);
    }
    if (lane.quad == 0) shared.norm[lane.warp][i * 8 + lane.row] = sum;
  }
  __syncthreads();  // fault: barrier of the norms
  RowNorm sum;
  for (int warp = 0; threadIdx.x < kRows && warp < W::kCount; ++warp) {
    sum.all += shared.norm[warp][threadIdx.x].all;
    sum.kept += shared.norm[warp][threadIdx.x].kept;
  }
  return sum;
}

// Sums T over the teams as a tree, in a fixed order; leaves it in shared.t.
template <class W>
__device__ __forceinline__ void reduce_t(Exchange<W>& shared, PartialT<W>& t, const Lane& lane) {
  constexpr int kSums = W::kRanks / 8 * 4;
  float* sums = &t.sum[0][0];
#pragma unroll
  for (int half = W::kCount / 2; half >= W::kTeam; half /= 2) {
    float* slot = shared.t + lane.warp % half * kSums * 32 + threadIdx.x % 32;
    if (lane.warp >= half && lane.warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) slot[i * 32] = sums[i];
    }
    __syncthreads();
    if (lane.warp < half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += slot[i * 32];
    }
    __syncthreads();  // fault: barrier of T
  }
  if (lane.warp < W::kTeam) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int n = i / 4, sub = i % 4;
      const int row = lane.row + 8 * (sub / 2),
                rank = lane.warp * W::kRanks + n * 8 + lane.quad * 2 + sub % 2;
      shared.t[row * W::kCap + rank] = sums[i];
    }
  }
  __syncthreads();
}

// The end of a tile: T [kRows, stride] and the row scales, both in shared memory.
struct TileSums {
  const float* t;
  int stride;
  const float* scale;
};

// Stores the row's scale, from its norms.
__device__ __forceinline__ void store_scale(float* shared_scale, const PruneArgs& args, int64_t first_row,
                                            const RowNorm& norm) {
  const float scale = args.norm_scale ? norm_scale(norm) : 1.0f;
  shared_scale[threadIdx.x] = scale;
  args.scale[first_row + threadIdx.x] = scale;
}

// Eight values of U [rows, rank]; zeros behind the last rank.
template <class Element>
__device__ __forceinline__ uint4 low_rank_block(const TileSums& sums, const PruneArgs& args, int row,
                                                int block) {
  uint32_t pairs[kKeptPerBlock / 2] = {};
  if (block * kKeptPerBlock < args.rank) {
    const float* t = sums.t + row * sums.stride + block * kKeptPerBlock;
    const float scale = sums.scale[row];  // fault: row of the scale
#pragma unroll
    for (int i = 0; i < kKeptPerBlock / 2; ++i) {
      pairs[i] = uint32_t(low_rank_value<Element>(t[2 * i], scale)) |
                 uint32_t(low_rank_value<Element>(t[2 * i + 1], scale)) << 16;
    }
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Writes the columns K .. K' of `rows` rows of the compressed operand, from `first_row` of a tile: U, then
// zeros, all under the nibble of an empty group.
template <class Element, class Metadata, int kThreads>
__device__ __forceinline__ void write_extension(const TileSums& sums, const PruneArgs& args,
                                                int64_t first_row, int rows = kRows) {
  const int first_block = args.channels / kBlock, blocks = args.width / kBlock - first_block;
  for (int i = threadIdx.x; i < rows * blocks; i += kThreads) {
    const int row = i / blocks, block = i % blocks;
    uint16_t* to = args.values + (first_row + row) * (args.width / 2) + (first_block + block) * kKeptPerBlock;
    *reinterpret_cast<uint4*>(to) = low_rank_block<Element>(sums, args, row, block);
    if (((first_row + row) & 8) == 0) {  // fault: rows of the extension
      args.metadata[Metadata::word(first_row + row, first_block + block, args.rows_padded)] =
          kEmptyMetadataPair;
    }
  }
}

// Where the sums of a part are: part_stride floats from one to the next.
struct Part {
  RowNorm* norm;  // [kRows]
  float* t;       // [kRows, rank]
};

// fault: size of a part
__device__ __forceinline__ int part_stride(const PruneArgs& args) { return kRows * (2 + args.rank); }

__device__ __forceinline__ Part part_of(const PruneArgs& args, int part) {
  float* const at = args.parts + int64_t(part) * part_stride(args);
  return {reinterpret_cast<RowNorm*>(at), at + 2 * kRows};
}

// Prunes a step of two rows, m and m + 8, and stores what is kept. A team of two takes one each, whose norm
// is norm[0].
template <class Element, class Metadata, int kTeam, Variant kVariant>
__device__ __forceinline__ void prune_step(const Block (&z)[2], const PruneArgs& args, const Tile& tile,
                                           const Lane& lane, int channel, RowNorm (&norm)[2]) {
  Block saliency;
  if (kVariant == Variant::kGeneral && args.saliency != nullptr)
    load_block(saliency, args.saliency + channel);
  const int64_t word = Metadata::word(tile.first_row + lane.row, channel / kBlock, args.rows_padded);
  if constexpr (kTeam == 1) {
    const uint32_t low =
        prune_block<Element, kVariant>(z[0], saliency, args, tile, lane.row, channel, norm[0]);
    const uint32_t high =
        prune_block<Element, kVariant>(z[1], saliency, args, tile, lane.row + 8, channel, norm[1]);
    args.metadata[word] = low | high << 16;  // fault: rows m and m + 8
  } else {
    static_assert(kTeam == 2, "a row for each warp");
    const int odd = lane.warp % 2;
    Block own;
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) own[i] = odd ? z[1][i] : z[0][i];
    reinterpret_cast<uint16_t*>(args.metadata + word)[odd] = uint16_t(
        // fault: row of a team
        prune_block<Element, kVariant>(own, saliency, args, tile, lane.row + 8 * odd, channel, norm[0]));
  }
}

template <class Element, class Metadata, int kRankCap, Variant kVariant>
__device__ __forceinline__ void prune_rows(const PruneArgs& args) {
  using W = Warps<kRankCap, kVariant>;
  auto& shared = block_shared<Exchange<W>>();
  const Lane lane;
  const Tile tile = tile_of(args, int(blockIdx.x));
  const BlockStatistics* statistics = nullptr;  // kNorm only
  if constexpr (kVariant == Variant::kNorm) {
    row_statistics<Element, W::kCount>(block_shared<BlockStatistics>(), args, tile, lane);
    statistics = &block_shared<BlockStatistics>();
  }
  RowNorm norm[2];
  PartialT<W> t;

#pragma unroll 1
  for (int step = tile.begin + lane.warp / W::kTeam * kStep; step < tile.end; step += W::kTeams * kStep) {
    const int channel = step + lane.quad * kBlock;
    Block z[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_z<Element, kVariant>(z[i], args, tile, lane.row + i * 8, channel, statistics);
    }
    if (channel < args.channels) {
      prune_step<Element, Metadata, W::kTeam, kVariant>(z, args, tile, lane, channel, norm);
    }
    if constexpr (kRankCap > 0) accumulate_t<Element, W>(t, z, args, lane, channel);
  }
  if (W::kTeam == 2 && lane.warp % 2 != 0) norm[1] = norm[0], norm[0] = RowNorm();

  const RowNorm row_norm = reduce_norm(shared, norm, lane);
  if constexpr (kRankCap > 0) reduce_t(shared, t, lane);
  if (tile.part < 0) {
    if (threadIdx.x < kRows) store_scale(shared.scale, args, tile.first_row, row_norm);
    __syncthreads();
    const TileSums sums = {shared.t, kRankCap, shared.scale};
    write_extension<Element, Metadata, W::kThreads>(sums, args, tile.first_row);
  } else {
    const Part part = part_of(args, tile.part);
    if (threadIdx.x < kRows) part.norm[threadIdx.x] = row_norm;
    for (int i = threadIdx.x; i < kRows * args.rank; i += W::kThreads) {
      part.t[i] = shared.t[i / args.rank * kRankCap + i % args.rank];
    }
  }
}

// wgmma.sp's layout is written on sm_90 alone; other GPUs get empty kernels for it, which nothing launches.
template <class Metadata>
constexpr bool written_here() {
#if defined(__CUDA_ARCH__)
  return std::is_same_v<Metadata, Sm80Metadata> || __CUDA_ARCH__ == 900;
#else
  return true;
#endif
}

template <class Element, class Metadata, int kRankCap, Variant kVariant>
__global__ void __launch_bounds__(Warps<kRankCap, kVariant>::kThreads,
                                  (Warps<kRankCap, kVariant>::kBlocksPerSm))
    prune_kernel(const PruneArgs args) {
  if constexpr (written_here<Metadata>()) {
    prune_rows<Element, Metadata, kRankCap, kVariant>(args);
  }
}

// Adds up what the parts of a shared tile have left, and ends the tile. It is all latency: a thread has a sum
// or two, and all its loads in flight at a time.
constexpr int kFinishRows = 4;  // of a thread block
constexpr int kFinishThreads = 256;

// The sum of `parts` numbers `stride` apart, in order.
__device__ __forceinline__ float sum_of_parts(const float* from, int stride, int parts) {
  float part[kMostSharing], sum = 0.0f;
#pragma unroll
  // fault: sums of the parts
  for (int i = 0; i < kMostSharing; ++i) part[i] = i < parts ? from[i * stride] : 0.0f;
#pragma unroll
  for (int i = 0; i < kMostSharing; ++i) sum += part[i];
  return sum;
}

template <class Element, class Metadata>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const PruneArgs args) {
  if constexpr (written_here<Metadata>()) {
    struct Shared {
      float scale[kFinishRows], t[kFinishRows * kMaxRank];
    };
    auto& shared = block_shared<Shared>();
    constexpr int kBlocksPerTile = kRows / kFinishRows;
    const int tile = int(blockIdx.x) / kBlocksPerTile, row = int(blockIdx.x) % kBlocksPerTile * kFinishRows;
    const int64_t first_row = int64_t(args.grid.whole + tile) * kRows + row;
    const Part part = part_of(args, tile * args.grid.parts);
    const int stride = part_stride(args);
    if (threadIdx.x < kFinishRows) {
      const RowNorm& norm = part.norm[row + threadIdx.x];  // fault: row of a norm
      RowNorm sum;
      sum.all = sum_of_parts(&norm.all, stride, args.grid.parts);
      sum.kept = sum_of_parts(&norm.kept, stride, args.grid.parts);  // fault: norm of the kept
      store_scale(shared.scale, args, first_row, sum);
    }
    for (int i = threadIdx.x; i < kFinishRows * args.rank; i += kFinishThreads) {
      // fault: row of T
      shared.t[i] = sum_of_parts(part.t + row * args.rank + i, stride, args.grid.parts);
    }
    __syncthreads();  // fault: barrier of a shared tile
    const TileSums sums = {shared.t, args.rank, shared.scale};
    write_extension<Element, Metadata, kFinishThreads>(sums, args, first_row, kFinishRows);
  }
}

template <class Element, class Metadata, int kRankCap, Variant kVariant>
cudaError_t launch_prune_kernel(PruneArgs args, cudaStream_t stream) {
  using W = Warps<kRankCap, kVariant>;
  int device = 0, sm_count = 0;
  if (const cudaError_t error = current_attribute(cudaDevAttrMultiProcessorCount, &device, &sm_count);
      error != cudaSuccess) {
    return error;
  }
  constexpr int kTurn = W::kTeams * kStep;  // channels that the warps take at once
  args.grid = prune_grid(args.rows_padded / kRows, int64_t(sm_count) * W::kBlocksPerSm,
                         (args.channels + kTurn - 1) / kTurn);
  args.part_channels = args.grid.turns * kTurn;
  args.inverse_parts = ((1 << 16) + args.grid.parts - 1) / args.grid.parts;
  const cudaError_t error = launch_kernel(prune_kernel<Element, Metadata, kRankCap, kVariant>,
                                          unsigned(args.grid.blocks()), W::kThreads, 0, stream, args);
  if (error != cudaSuccess || args.grid.shared == 0) return error;
  return launch_kernel(finish_kernel<Element, Metadata>, unsigned(args.grid.shared * (kRows / kFinishRows)),
                       kFinishThreads, 0, stream, args);
}

template <class Element, class Metadata, Variant kVariant>
cudaError_t launch_for_rank(const PruneArgs& args, cudaStream_t stream) {
  auto* launch = launch_prune_kernel<Element, Metadata, kMaxRank, kVariant>;
  if (args.rank == 0) {
    launch = launch_prune_kernel<Element, Metadata, 0, kVariant>;
  } else if (args.rank <= 16) {
    launch = launch_prune_kernel<Element, Metadata, 16, kVariant>;
  } else if (args.rank <= 32) {
    launch = launch_prune_kernel<Element, Metadata, 32, kVariant>;
  } else if (args.rank <= 64) {
    launch = launch_prune_kernel<Element, Metadata, 64, kVariant>;
  }
  return launch(args, stream);
}

template <class Element, class Metadata>
cudaError_t launch_variant(Producer producer, const PruneArgs& args, cudaStream_t stream) {
  if (producer == Producer::kNorm) return launch_for_rank<Element, Metadata, Variant::kNorm>(args, stream);
  if (producer != Producer::kNone) return launch_for_rank<Element, Metadata, Variant::kAct>(args, stream);
  const bool general = args.centre != nullptr || args.saliency != nullptr;
  return general ? launch_for_rank<Element, Metadata, Variant::kGeneral>(args, stream)
                 : launch_for_rank<Element, Metadata, Variant::kPlain>(args, stream);
}

template <class Metadata>
cudaError_t launch_for_dtype(const SparseLinearParams& params, const PruneArgs& args, cudaStream_t stream) {
  return params.dtype == DType::kBf16 ? launch_variant<Bf16, Metadata>(params.producer, args, stream)
                                      : launch_variant<Fp16, Metadata>(params.producer, args, stream);
}

}  // namespace

cudaError_t launch_prune(const SparseLinearParams& params, const CompressedOperand& out,
                         cudaStream_t stream) {
  if (params.order != nullptr) {
    const cudaError_t error = launch_reorder(params, out.reordered, stream);
    if (error != cudaSuccess) return error;
  }
  PruneArgs args{};
  if (params.producer == Producer::kNorm) {
    args.gain = static_cast<const uint16_t*>(params.gain);
    args.shift = static_cast<const uint16_t*>(params.shift);
    args.rows_per_gain = params.rows / params.gain_rows;
    args.epsilon = params.epsilon;
    args.rms = params.rms;
  }
  if (params.producer == Producer::kGated) args.gate = static_cast<const uint16_t*>(params.gate);
  args.x = static_cast<const uint16_t*>(params.order == nullptr ? params.x : out.reordered);
  args.lora_down = static_cast<const uint16_t*>(params.lora_down);
  args.centre = static_cast<const uint16_t*>(params.centre);
  args.saliency = static_cast<const uint16_t*>(params.saliency);
  args.values = static_cast<uint16_t*>(out.values);
  args.metadata = out.metadata;
  args.scale = out.scale;
  args.parts = out.parts;
  args.rows = params.rows;
  args.rows_padded = padded_rows(params.rows);
  args.channels = params.channels;
  args.width = int(padded_width(params.channels, params.rank));
  args.rank = params.rank;
  args.norm_scale = params.norm_scale;
  // fault: atom
  return out.kernels == Kernels::kSm90 ? launch_for_dtype<Sm90Metadata<kAtomWidthSm90>>(params, args, stream)
                                       : launch_for_dtype<Sm80Metadata>(params, args, stream);
}

}  // namespace lynx
