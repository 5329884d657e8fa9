// SPDX-License-Identifier: Apache-2.0
// The GEMMs of e4m3 by mma and mma.sp, for sm_89 and later GPUs without wgmma, for one tile configuration.
// Included by the small instantiation files fp8_gemm_sm89_*.cu.
//
// D [m, n] = A B^T, with A the 2:4 operand, or of two dense ones the weight; D is y transposed unless the
// tokens are A. Stages of 64 channels go to shared memory by cp.async, the fragments of the next products to
// registers by ldmatrix while those of the last are multiplied. The metadata of the file serve as they are:
// the 32 channels of a row that a word has nibbles for are those of one lane (fp8_mma.h).
#pragma once

#include "activation.h"
#include "fp8.h"
#include "fp8_gemm.h"
#include "fp8_mma.h"
#include "fp8_tiles_sm89.h"
#include "launch.h"
#include "warp.h"

namespace lynx {
namespace {

constexpr int kChunk = 16;  // bytes of a copy, and of a row of a matrix that ldmatrix takes
constexpr int kStrip = 8;   // tiles along m whose blocks run side by side, so that both operands stay in L2

// What a configuration is compiled for.
template <Fp8Operand kOperand, int kIndex>
struct Fp8MmaShape {
  static constexpr Fp8MmaTile kTile = fp8_mma_tiles(kOperand)[kIndex];
  static constexpr bool kSparse = kOperand != Fp8Operand::kDense;
  static constexpr bool kTransposed = kOperand != Fp8Operand::kSparseActivation;
  static constexpr int kThreads = kTile.threads(), kWarpsM = kTile.m / kTile.warp_m;
  static constexpr int kRowBlocks = kTile.warp_m / 16, kColumnBlocks = kTile.warp_n / 8;
  static constexpr int kPairs = kColumnBlocks / 2;  // columns come in 16: as many as the smallest load takes

  // Steps of one product's channels: of a stage, and of K's whole steps, which a turn of the loop takes.
  static constexpr int kStepsOfStage = kSparse ? 1 : 2;
  static constexpr int kSteps = kFp8Step / kFp8MmaStage * kStepsOfStage;
  static constexpr int kWordsB = kSparse ? 4 : 2;  // of a product's B

  // A stage: rows of A, of B, and of metadata.
  static constexpr int kRowA = kSparse ? kFp8MmaStage / 2 : kFp8MmaStage, kRowB = kFp8MmaStage;
  static constexpr int kRowMetadata = kFp8MmaStage / 8;
  static constexpr int kB = kTile.m * kRowA, kMetadata = kB + kTile.n * kRowB;
  static constexpr int kStageBytes = kTile.stage_bytes(kSparse), kSharedBytes = kTile.shared_bytes(kSparse);

  // y leaves through shared memory, 16 tokens of a warp at a time; padding keeps banks apart.
  static constexpr int kTokens = 16, kChannels = kTransposed ? kTile.warp_m : kTile.warp_n;
  static constexpr int kStagedRow = kChannels * 2 + kChunk;
  static constexpr int kStagedBytes = kTokens * kStagedRow;

  static_assert(kTile.warp_m % 16 == 0 && kTile.warp_n % 32 == 0 && kTile.stages >= 2);
  static_assert(kB % (kThreads * kChunk) == 0 && kTile.n * kRowB % (kThreads * kChunk) == 0);
  static_assert(kTile.m <= kThreads, "a thread copies the metadata of a row at most");
  static_assert(kThreads / 32 * kStagedBytes <= kSharedBytes);
  static_assert(kGeluMultiple % kChannels == 0, "the channels of a warp are activated, or none of them");
};

struct Fp8MmaArgs {
  const char *a, *b;     // e4m3 [m, K'] or its kept values [m, K' / 2]; [n, K']
  const char* metadata;  // of A, Fp8Metadata of metadata_rows rows
  int m, n, width;
  int64_t metadata_rows;
  const float *weight_scale, *x_scale;
  const uint16_t* bias;
  int tokens, channels, y_channels;  // channels: of W
  Activation activation;
  int activation_from;
  bool gated;
  uint16_t* y;
};

// Bytes from the start of an operand's stage to a chunk of a row: the chunks of 8 rows that ldmatrix takes at
// once lie in different banks.
template <int kRow>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  constexpr int kChunks = kRow / kChunk, kRowsOfLine = 128 / kRow;
  return row * kRow + (chunk ^ (row / kRowsOfLine % kChunks)) * kChunk;
}

// First row and column of the thread block's tile.
struct Fp8MmaPlace {
  int m, n;
};
template <class Shape>
__device__ __forceinline__ Fp8MmaPlace place_of_block(const Fp8MmaArgs& args) {
  const int tiles_m = (args.m + Shape::kTile.m - 1) / Shape::kTile.m;
  const int tiles_n = (args.n + Shape::kTile.n - 1) / Shape::kTile.n;
  const int strip = int(blockIdx.x) / (kStrip * tiles_n), in_strip = int(blockIdx.x) % (kStrip * tiles_n);
  const int behind = tiles_m - strip * kStrip, wide = behind < kStrip ? behind : kStrip;
  // fault: place of a block
  return {(strip * kStrip + in_strip % wide) * Shape::kTile.m, in_strip / wide * Shape::kTile.n};
}

// ---- Copies to shared memory

// What a thread copies of every stage. Rows behind the operand's last are copies of that: no one looks at
// their products, and metadata must be valid.
template <class Shape>
class Fp8MmaCopies {
 public:
  __device__ __forceinline__ Fp8MmaCopies(const Fp8MmaArgs& args, Fp8MmaPlace place)
      : metadata_step_(args.metadata_rows * kFp8Step / 8), stages_(args.width / kFp8MmaStage) {
    const int64_t pitch_a = Shape::kSparse ? args.width / 2 : args.width;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) a_[i] = source<Shape::kRowA>(args.a, i, place.m, args.m, pitch_a);
#pragma unroll
    for (int i = 0; i < kCopiesB; ++i) b_[i] = source<Shape::kRowB>(args.b, i, place.n, args.n, args.width);
    metadata_ = args.metadata + int64_t(clamped(place.m + int(threadIdx.x), args.m)) * (kFp8Step / 8);
  }

  // Begins the copies of the next stage; a group of none behind the last.
  __device__ __forceinline__ void begin(char* stage) {
    if (next_ < stages_) {
#pragma unroll
      for (int i = 0; i < kCopiesA; ++i) {
        copy_async<kChunk>(stage + target<Shape::kRowA>(i), a_[i]);
        a_[i] += Shape::kRowA;
      }
#pragma unroll
      for (int i = 0; i < kCopiesB; ++i) {
        copy_async<kChunk>(stage + Shape::kB + target<Shape::kRowB>(i), b_[i]);
        b_[i] += Shape::kRowB;
      }
      if (Shape::kSparse && int(threadIdx.x) < Shape::kTile.m) begin_metadata(stage + Shape::kMetadata);
      ++next_;
    }
    commit_copies();
  }

 private:
  static constexpr int kCopiesA = Shape::kB / (Shape::kThreads * kChunk);
  static constexpr int kCopiesB = Shape::kTile.n * Shape::kRowB / (Shape::kThreads * kChunk);

  // fault: last row of an operand
  static __device__ __forceinline__ int clamped(int row, int rows) { return row < rows ? row : rows - 1; }

  // Of the thread's copy i: its row and chunk in a stage, where from, where to.
  template <int kRow>
  static __device__ __forceinline__ int row_of(int i) {
    return (i * Shape::kThreads + int(threadIdx.x)) / (kRow / kChunk);
  }
  template <int kRow>
  static __device__ __forceinline__ const char* source(const char* operand, int i, int first, int rows,
                                                       int64_t pitch) {
    return operand + int64_t(clamped(first + row_of<kRow>(i), rows)) * pitch +
           int(threadIdx.x) % (kRow / kChunk) * kChunk;
  }
  template <int kRow>
  static __device__ __forceinline__ int target(int i) {
    return chunk_at<kRow>(row_of<kRow>(i), int(threadIdx.x) % (kRow / kChunk));
  }

  // Two stages share the 16 bytes of a row.
  __device__ __forceinline__ void begin_metadata(char* to) const {
    constexpr int kStages = kFp8Step / kFp8MmaStage;
    // fault: stage of metadata
    copy_async<Shape::kRowMetadata>(
        to + int(threadIdx.x) * Shape::kRowMetadata,
        metadata_ + next_ / kStages * metadata_step_ + next_ % kStages * Shape::kRowMetadata);
  }

  const char *a_[kCopiesA], *b_[kCopiesB], *metadata_;
  int64_t metadata_step_;
  int stages_, next_ = 0;
};

// ---- Products

// Fragments of a warp, those in use and the next.
template <class Shape>
struct Fp8MmaFragments {
  uint32_t a[2][Shape::kRowBlocks][4], metadata[2][Shape::kRowBlocks];
  uint32_t b[2][2][Shape::kWordsB];  // of 16 columns

  // A and its metadata, of a step of the stage.
  __device__ __forceinline__ void load_a(int into, const char* stage, int warp_m, int step) {
    const int lane = int(threadIdx.x) % 32;
    // fault: fragment of A
    const int at = chunk_at<Shape::kRowA>(warp_m + lane % 16, lane / 16) ^ (step * 2 * kChunk);
#pragma unroll
    for (int i = 0; i < Shape::kRowBlocks; ++i) {
      load_matrices(a[into][i], stage + at + i * 16 * Shape::kRowA);
      if constexpr (Shape::kSparse) {
        // fault: row of metadata
        const int row = warp_m + i * 16 + lane / 4 + lane % 2 * 8;
        metadata[into][i] = *reinterpret_cast<const uint32_t*>(stage + Shape::kMetadata +
                                                               row * Shape::kRowMetadata + lane % 4 / 2 * 4);
      }
    }
  }

  // 16 columns of B: of each 8 the whole stage, or of both the 32 channels of a step.
  __device__ __forceinline__ void load_b(int into, const char* stage, int column, int step) {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (Shape::kSparse) {
      const int at = chunk_at<Shape::kRowB>(column + lane % 8, lane / 8);
      load_matrices(b[into][0], stage + Shape::kB + at);
      load_matrices(b[into][1], stage + Shape::kB + at + 8 * Shape::kRowB);
    } else {
      const int at = chunk_at<Shape::kRowB>(column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
      uint32_t both[4];
      // fault: step of B
      load_matrices(both, stage + Shape::kB + (at ^ (step * 2 * kChunk)));
      b[into][0][0] = both[0], b[into][0][1] = both[1], b[into][1][0] = both[2], b[into][1][1] = both[3];
    }
  }

  __device__ __forceinline__ void multiply(float (&sums)[Shape::kRowBlocks][Shape::kColumnBlocks][4],
                                           int of_a, int of_b, int pair) const {
#pragma unroll
    for (int i = 0; i < Shape::kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (Shape::kSparse) {
          multiply_sparse_e4m3(sums[i][2 * pair + j], a[of_a][i], b[of_b][j], metadata[of_a][i]);
        } else {
          multiply_e4m3(sums[i][2 * pair + j], a[of_a][i], b[of_b][j]);
        }
      }
    }
  }
};

// The stage behind `stage`.
template <class Shape>
__device__ __forceinline__ char* stage_after(char* stage, char* first) {
  stage += Shape::kStageBytes;
  return stage == first + Shape::kSharedBytes ? first : stage;
}

// sums = A B^T over K'. Units of a step and 16 columns: while one is multiplied, the next one's fragments
// are on their way.
template <class Shape>
__device__ __forceinline__ void multiply_tile(float (&sums)[Shape::kRowBlocks][Shape::kColumnBlocks][4],
                                              char* first, const Fp8MmaArgs& args, Fp8MmaPlace place) {
  constexpr int kAhead = Shape::kTile.stages - 1, kUnits = Shape::kSteps * Shape::kPairs;
  const int warp = int(threadIdx.x) / 32;
  const int warp_m = warp % Shape::kWarpsM * Shape::kTile.warp_m;
  const int warp_n = warp / Shape::kWarpsM * Shape::kTile.warp_n;
  Fp8MmaCopies<Shape> copies(args, place);
  for (int i = 0; i < kAhead; ++i) copies.begin(first + i * Shape::kStageBytes);
  char *read = first, *write = first + kAhead * Shape::kStageBytes;
  Fp8MmaFragments<Shape> fragments;
  wait_for_copies<kAhead - 1>();
  __syncthreads();
  fragments.load_a(0, read, warp_m, 0);
  fragments.load_b(0, read, warp_n, 0);
  for (int k = 0; k < args.width; k += kFp8Step) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int step = unit / Shape::kPairs, pair = unit % Shape::kPairs;
      const int next_step = (step + 1) % Shape::kStepsOfStage;
      const bool last_pair = pair == Shape::kPairs - 1;
      if (pair == 0 && step % Shape::kStepsOfStage == 0) {  // all warps have left the stage ahead
        copies.begin(write);
        write = stage_after<Shape>(write, first);
      }
      // fault: end of a stage
      if (last_pair && next_step == 0) {
        wait_for_copies<kAhead - 1>();
        __syncthreads();
        read = stage_after<Shape>(read, first);
      }
      if (last_pair) fragments.load_a((step + 1) % 2, read, warp_m, next_step);
      // fault: columns of B
      fragments.load_b((unit + 1) % 2, read, warp_n + (pair + 1) % Shape::kPairs * 16,
                       last_pair ? next_step : step % Shape::kStepsOfStage);
      fragments.multiply(sums, step % 2, unit % 2, pair);
    }
  }
}

// ---- y

// Scales and biases of the channels of a lane's sums: of rows g and g + 8 of a block if D is transposed, else
// of columns 2 t and 2 t + 1.
template <class Element, class Shape>
struct Fp8ChannelTerms {
  static constexpr int kBlocks = Shape::kTransposed ? Shape::kRowBlocks : Shape::kColumnBlocks;
  float scale[kBlocks][2], bias[kBlocks][2];

  static __device__ __forceinline__ int channel(int block, int i) {
    const int lane = int(threadIdx.x) % 32;
    return Shape::kTransposed ? block * 16 + lane / 4 + 8 * i : block * 8 + lane % 4 * 2 + i;
  }

  __device__ __forceinline__ Fp8ChannelTerms(const Fp8MmaArgs& args, int first) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = first + channel(block, i);
        scale[block][i] = n < args.channels ? __ldg(args.weight_scale + n) : 0.0f;
        bias[block][i] = n < args.channels ? Element::to_float(__ldg(args.bias + n)) : 0.0f;
      }
    }
  }
};

// s_w (s_x sum) + bias of `tokens`, number `unit` of the warp, of 8 of them if D is transposed.
template <class Element, class Shape>
__device__ __forceinline__ void scale_sums(float (&value)[Fp8ChannelTerms<Element, Shape>::kBlocks][4],
                                           const float (&sums)[Shape::kRowBlocks][Shape::kColumnBlocks][4],
                                           const Fp8ChannelTerms<Element, Shape>& terms,
                                           const float (&x_scale)[2], int unit, int half) {
#pragma unroll
  for (int block = 0; block < terms.kBlocks; ++block) {
    const auto& d = Shape::kTransposed ? sums[block][2 * unit + half] : sums[unit][block];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int of_token = Shape::kTransposed ? i % 2 : i / 2,
                of_channel = Shape::kTransposed ? i / 2 : i % 2;
      // fault: terms of a sum
      value[block][i] =
          terms.scale[block][of_channel] * (x_scale[of_token] * d[i]) + terms.bias[block][of_channel];
    }
  }
}

// Whether a value multiplies another: of channels that come in pairs, those 8 behind the ones to activate.
template <class Shape>
__device__ __forceinline__ constexpr bool is_gate(int block, int i) {
  return Shape::kTransposed ? i >= 2 : block % 2 == 1;
}

// The activation of all values, or gated, of one of each pair, times the other.
template <class Shape, bool kGated, int kBlocks>
__device__ __forceinline__ void activate_sums(float (&value)[kBlocks][4], Activation activation) {
  with_activation(activation, [&](auto activate) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kGated && is_gate<Shape>(block, i)) continue;
        value[block][i] = activate(value[block][i]);
        // fault: gate of a value
        if (kGated)
          value[block][i] *= Shape::kTransposed ? value[block][(i + 2) % 4] : value[(block + 1) % kBlocks][i];
      }
    }
  });
}

// act(s_w (s_x sum) + bias) of 16 tokens, number `unit` of the warp, to shared memory [tokens, channels]. The
// warp's channels are activated or not, and pairs or not.
template <class Element, class Shape, bool kGated>
__device__ __forceinline__ void stage_tokens(const float (&sums)[Shape::kRowBlocks][Shape::kColumnBlocks][4],
                                             const Fp8ChannelTerms<Element, Shape>& terms, char* to,
                                             const Fp8MmaArgs& args, int unit, int token, bool activated) {
  constexpr int kHalves = Shape::kTransposed ? 2 : 1;  // blocks of 8 or 16 tokens
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    int row[2];
    float x_scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // fault: token of a sum
      row[i] = Shape::kTransposed ? half * 8 + lane % 4 * 2 + i : lane / 4 + 8 * i;
      x_scale[i] = token + row[i] < args.tokens ? __ldg(args.x_scale + token + row[i]) : 0.0f;
    }
    float value[Fp8ChannelTerms<Element, Shape>::kBlocks][4];
    scale_sums<Element, Shape>(value, sums, terms, x_scale, unit, half);
    if (activated) activate_sums<Shape, kGated>(value, args.activation);
#pragma unroll
    for (int block = 0; block < terms.kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kGated && is_gate<Shape>(block, i)) continue;
        const int of_token = Shape::kTransposed ? i % 2 : i / 2;
        const int channel = terms.channel(block, Shape::kTransposed ? i / 2 : i % 2);
        // fault: place of a pair
        const int at = kGated ? channel / kGatedMultiple * (kGatedMultiple / 2) + channel % 8 : channel;
        *reinterpret_cast<uint16_t*>(to + row[of_token] * Shape::kStagedRow + at * 2) =
            Element::from_float(value[block][i]);
      }
    }
  }
}

// From there to y, 16 bytes a lane; `channel`: of y.
template <class Shape, bool kGated>
__device__ __forceinline__ void store_tokens(const char* from, const Fp8MmaArgs& args, int token,
                                             int channel) {
  constexpr int kPerChunk = kChunk / 2, kChunks = Shape::kChannels / (kGated ? 2 : 1) / kPerChunk;
#pragma unroll
  for (int i = 0; i < Shape::kTokens * kChunks / 32; ++i) {
    const int at = i * 32 + int(threadIdx.x) % 32, row = at / kChunks, chunk = at % kChunks;
    const int m = token + row, n = channel + chunk * kPerChunk;
    // fault: bounds of y
    if (m < args.tokens && n < args.y_channels) {
      *reinterpret_cast<uint4*>(args.y + int64_t(m) * args.y_channels + n) =
          *reinterpret_cast<const uint4*>(from + row * Shape::kStagedRow + chunk * kChunk);
    }
  }
}

// A warp's part of y: channels of D from `channel` on, tokens from `token` on.
template <class Element, class Shape, bool kGated>
__device__ __forceinline__ void store_part(const float (&sums)[Shape::kRowBlocks][Shape::kColumnBlocks][4],
                                           char* staged, const Fp8MmaArgs& args, int token, int channel) {
  const Fp8ChannelTerms<Element, Shape> terms(args, channel);
  const int from = args.activation_from;
  const bool activated = channel >= from;  // fault: activation of a warp
  // fault: channel of pairs
  const int y_channel = kGated ? from + (channel - from) / 2 : channel;
  constexpr int kUnits = Shape::kTransposed ? Shape::kPairs : Shape::kRowBlocks;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int first = token + unit * Shape::kTokens;
    // fault: staged tokens
    stage_tokens<Element, Shape, kGated>(sums, terms, staged, args, unit, first, activated);
    sync_warp();
    // fault: tokens behind
    store_tokens<Shape, kGated>(staged, args, first, y_channel);
    sync_warp();
  }
}

template <class Element, class Shape>
__device__ __forceinline__ void store_tile(const float (&sums)[Shape::kRowBlocks][Shape::kColumnBlocks][4],
                                           char* shared, const Fp8MmaArgs& args, Fp8MmaPlace place) {
  const int warp = int(threadIdx.x) / 32;
  const int m = place.m + warp % Shape::kWarpsM * Shape::kTile.warp_m;
  const int n = place.n + warp / Shape::kWarpsM * Shape::kTile.warp_n;
  const int token = Shape::kTransposed ? n : m, channel = Shape::kTransposed ? m : n;
  char* const staged = shared + warp * Shape::kStagedBytes;
  if (args.gated && channel >= args.activation_from) {
    store_part<Element, Shape, true>(sums, staged, args, token, channel);
  } else {
    store_part<Element, Shape, false>(sums, staged, args, token, channel);
  }
}

// ---- Kernel and launch

template <class Element, Fp8Operand kOperand, int kIndex>
__global__ void __launch_bounds__(Fp8MmaShape<kOperand, kIndex>::kThreads, 1)
    fp8_mma_kernel(const Fp8MmaArgs args) {
  using Shape = Fp8MmaShape<kOperand, kIndex>;
  char* const shared = dynamic_shared<char>();
  const Fp8MmaPlace place = place_of_block<Shape>(args);
  float sums[Shape::kRowBlocks][Shape::kColumnBlocks][4] = {};
  multiply_tile<Shape>(sums, shared, args, place);
  __syncthreads();  // the stages are free
  store_tile<Element, Shape>(sums, shared, args, place);
}

Fp8MmaArgs fp8_mma_args(Fp8Operand operand, const Fp8GemmCall& call) {
  const bool transposed = operand != Fp8Operand::kSparseActivation;
  const Fp8Shape d = fp8_shape(operand, call.tokens, call.channels);
  Fp8MmaArgs args;
  args.a = static_cast<const char*>(transposed ? call.weight : call.x);
  args.b = static_cast<const char*>(transposed ? call.x : call.weight);
  args.metadata = reinterpret_cast<const char*>(call.metadata);
  args.m = int(d.m), args.n = int(d.n), args.width = call.width;
  args.metadata_rows = padded_rows(d.m);
  args.weight_scale = call.weight_scale, args.x_scale = call.x_scale;
  args.bias = static_cast<const uint16_t*>(call.bias);
  args.tokens = call.tokens, args.channels = call.channels, args.y_channels = y_channels(call);
  args.activation = call.activation, args.activation_from = call.activation_from, args.gated = call.gated;
  args.y = static_cast<uint16_t*>(call.y);
  return args;
}

}  // namespace

template <Fp8Set kSet, class Element, Fp8Operand kOperand, int kIndex>
cudaError_t launch_fp8_gemm(const Fp8GemmCall& call, int device, cudaStream_t stream) {
  static_assert(kSet == Fp8Set::kMma);
  using Shape = Fp8MmaShape<kOperand, kIndex>;
  constexpr auto kKernel = fp8_mma_kernel<Element, kOperand, kIndex>;
  if (const cudaError_t error = allow_shared_memory<kKernel>(Shape::kSharedBytes, device);
      error != cudaSuccess) {
    return error;
  }
  const Fp8MmaArgs args = fp8_mma_args(kOperand, call);
  const int64_t tiles = tiles_of(Shape::kTile, args.m, args.n);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(kKernel, unsigned(tiles), Shape::kThreads, Shape::kSharedBytes, stream, args);
}

// Instantiates the tiles of one operand and element type.
#define LYNX_INSTANTIATE_FP8(Element, kOperand, kIndex)                                                  \
  template cudaError_t launch_fp8_gemm<Fp8Set::kMma, Element, kOperand, kIndex>(const Fp8GemmCall&, int, \
                                                                                cudaStream_t)

}  // namespace lynx
