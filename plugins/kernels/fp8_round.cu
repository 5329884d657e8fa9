// SPDX-License-Identifier: Apache-2.0
// The rounding pass: one read of x gives the FP8 operand of the GEMM, dense or pruned to 2:4.
//
// A thread block owns a token and holds it in registers, a thread in blocks of 16 channels: so the mean, the
// variance, the largest magnitude and the rounding need x from memory once. What x is made into before it is
// rounded (Producer) happens in those registers, rounded to the element type as a kernel of its own would.
#include <type_traits>

#include "activation.h"
#include "fp8.h"
#include "fp8_linear.h"
#include "launch.h"
#include "producer.h"
#include "warp.h"

namespace lynx {
namespace {

// What a kernel is compiled for.
enum class Make { kPlain, kNorm, kGelu, kGated };

struct RoundArgs {
  const uint16_t* x;      // [rows, channels], x_stride apart
  const uint16_t* gate;   // the same
  int64_t x_stride;       // 2 channels where x is a half
  Activation activation;  // of x, before its rounding
  const uint16_t* gain;   // [rows / rows_per_gain, channels]
  const uint16_t* shift;  // the same
  int64_t rows_per_gain;
  float epsilon;
  bool rms;
  uint8_t* values;     // [rows, width], or pruned: [rows_padded, width / 2]
  uint16_t* metadata;  // Fp8Metadata
  float* scale;        // [rows_padded]
  int64_t rows, rows_padded;
  int channels, width;
  int threads;  // of a thread block
};

constexpr int kMostWarps = 8;
constexpr int kMostThreads = 32 * kMostWarps;

using Block = uint32_t[kBlock / 2];  // 16 channels, two per word

// What the warps of a thread block exchange: mean, variance and maximum, one after the other.
struct RoundExchange {
  float mean[kMostWarps], variance[kMostWarps];
  uint32_t largest[kMostWarps];
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

__device__ __forceinline__ void load_block(Block& out, const uint16_t* from) {
  const uint4 low = __ldg(reinterpret_cast<const uint4*>(from));
  const uint4 high = __ldg(reinterpret_cast<const uint4*>(from) + 1);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// Sum over the thread block, in a fixed order; every thread gets it.
__device__ __forceinline__ float block_sum(float sum, float* of_warps, int threads) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();  // fault: barrier of a token's sum
  sum = 0.0f;
  for (int warp = 0; warp < threads / 32; ++warp) sum += of_warps[warp];
  return sum;
}

// The largest of integers below 2^16, likewise; as bits of floats, since that is what shuffles take.
__device__ __forceinline__ uint32_t block_max(uint32_t largest, uint32_t* of_warps, int threads) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t other = __float_as_uint(__shfl_xor_sync(~0u, __uint_as_float(largest), step));
    largest = largest > other ? largest : other;
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();  // fault: barrier of the largest
  // fault: largest of the warps
  for (int warp = 0; warp < threads / 32; ++warp)
    largest = largest > of_warps[warp] ? largest : of_warps[warp];
  return largest;
}

// The thread's blocks of the token: block v is number v * threads + threadIdx.x; zeros behind K.
template <int kBlocks>
__device__ __forceinline__ void load_token(Block (&z)[kBlocks], const uint16_t* x, const RoundArgs& args,
                                           bool there) {
#pragma unroll
  for (int v = 0; v < kBlocks; ++v) {
    const int channel = (v * args.threads + int(threadIdx.x)) * kBlock;
    if (there && channel < args.channels) {  // fault: channels of x
      load_block(z[v], x + channel);
    } else {
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) z[v][i] = 0;
    }
  }
}

// Sum of (x - centre)^power over the token.
template <class Element, int kPower, int kBlocks>
__device__ __forceinline__ float token_sum(const Block (&z)[kBlocks], float centre, float* of_warps,
                                           const RoundArgs& args) {
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kBlocks; ++v) {
    if ((v * args.threads + int(threadIdx.x)) * kBlock >= args.channels) continue;
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      const float low = low_of<Element>(z[v][i]) - centre, high = high_of<Element>(z[v][i]) - centre;
      sum += kPower == 2 ? low * low + high * high : low + high;
    }
  }
  return block_sum(sum, of_warps, args.threads);
}

// norm(x) * gain + shift
template <class Element, int kBlocks>
__device__ __forceinline__ void apply_norm(Block (&z)[kBlocks], RoundExchange& shared, const RoundArgs& args,
                                           int64_t row) {
  const float count = float(args.channels);
  // fault: mean
  const float mean = args.rms ? 0.0f : __fdiv_rn(token_sum<Element, 1>(z, 0.0f, shared.mean, args), count);
  const float variance = __fdiv_rn(token_sum<Element, 2>(z, mean, shared.variance, args), count);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(variance + args.epsilon));
  const int64_t gains = row / args.rows_per_gain * args.channels;  // fault: gain of a token
#pragma unroll
  for (int v = 0; v < kBlocks; ++v) {
    const int channel = (v * args.threads + int(threadIdx.x)) * kBlock;
    if (channel >= args.channels) continue;
    Block gain, shift;
    load_block(gain, args.gain + gains + channel);
    load_block(shift, args.shift + gains + channel);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      const float low = (low_of<Element>(z[v][i]) - mean) * scale;
      const float high = (high_of<Element>(z[v][i]) - mean) * scale;
      z[v][i] = pair_of<Element>(low * low_of<Element>(gain[i]) + low_of<Element>(shift[i]),
                                 high * high_of<Element>(gain[i]) + high_of<Element>(shift[i]));
    }
  }
}

template <class Element, int kBlocks>
__device__ __forceinline__ void apply_gelu(Block (&z)[kBlocks], Activation activation) {
#pragma unroll
  for (int v = 0; v < kBlocks; ++v) {
    with_activation_apart(activation, [&](auto activate) {
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) {
        z[v][i] = pair_of<Element>(activate(low_of<Element>(z[v][i])), activate(high_of<Element>(z[v][i])));
      }
    });
  }
}

// activation(x) * gate
template <class Element, int kBlocks>
__device__ __forceinline__ void apply_gate(Block (&z)[kBlocks], const uint16_t* gate, const RoundArgs& args) {
  with_activation(args.activation, [&](auto activate) {
#pragma unroll
    for (int v = 0; v < kBlocks; ++v) {
      const int channel = (v * args.threads + int(threadIdx.x)) * kBlock;
      if (channel >= args.channels) continue;
      Block factor;
      load_block(factor, gate + channel);
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) {
        z[v][i] = pair_of<Element>(activate(low_of<Element>(z[v][i])) * low_of<Element>(factor[i]),
                                   activate(high_of<Element>(z[v][i])) * high_of<Element>(factor[i]));
      }
    }
  });
}

// The largest magnitude of the token, as the element type's bits: NaN is above infinity.
template <int kBlocks>
__device__ __forceinline__ uint32_t largest_magnitude(const Block (&z)[kBlocks], RoundExchange& shared,
                                                      const RoundArgs& args) {
  uint32_t halves = 0;
#pragma unroll
  for (int v = 0; v < kBlocks; ++v) {
#pragma unroll
    // fault: magnitudes
    for (int i = 0; i < kBlock / 2; ++i) halves = max_of_halves(halves, z[v][i] & 0x7fff7fffu);
  }
  const uint32_t low = halves & 0xffffu, high = halves >> 16;
  return block_max(low > high ? low : high, shared.largest, args.threads);
}

// Four values times `inverse`, rounded.
template <class Element>
__device__ __forceinline__ uint32_t round_four(uint32_t first, uint32_t second, float inverse) {
  const uint32_t low = e4m3_pair(low_of<Element>(first) * inverse, high_of<Element>(first) * inverse);
  const uint32_t high = e4m3_pair(low_of<Element>(second) * inverse, high_of<Element>(second) * inverse);
  return low | high << 16;  // fault: four values
}

template <class Element>
__device__ __forceinline__ void store_dense(const Block& z, float inverse, uint8_t* to) {
  *reinterpret_cast<uint4*>(to) = {
      round_four<Element>(z[0], z[1], inverse), round_four<Element>(z[2], z[3], inverse),
      round_four<Element>(z[4], z[5], inverse), round_four<Element>(z[6], z[7], inverse)};
}

// The kept half of a block; returns its metadata.
template <class Element>
__device__ __forceinline__ uint16_t store_pruned(const Block& z, float inverse, uint8_t* to) {
  const CompressedBlock kept = compress_block<Element>(z, nullptr);
  *reinterpret_cast<uint2*>(to) = {round_four<Element>(kept.values[0], kept.values[1], inverse),
                                   round_four<Element>(kept.values[2], kept.values[3], inverse)};
  return uint16_t(kept.metadata);
}

// Two thread blocks an SM at least, but where the token alone takes half of the registers.
constexpr int blocks_per_sm(int blocks) { return blocks <= 4 ? 2 : 1; }

template <class Element, Make kMake, bool kPruned, int kBlocks>
__global__ void __launch_bounds__(kMostThreads, blocks_per_sm(kBlocks)) round_kernel(const RoundArgs args) {
  let_next_kernel_begin();
  auto& shared = block_shared<RoundExchange>();
  const int64_t row = blockIdx.x;
  const bool there = row < args.rows;
  const int64_t at = row * args.x_stride;  // fault: place of a token
  Block z[kBlocks];
  load_token(z, args.x + at, args, there);
  if constexpr (kMake == Make::kNorm) {
    if (there) apply_norm<Element>(z, shared, args, row);
  }
  if constexpr (kMake == Make::kGelu) apply_gelu<Element>(z, args.activation);
  if constexpr (kMake == Make::kGated) {
    if (there) apply_gate<Element>(z, args.gate + at, args);  // fault: gate of a token
  }
  const Fp8Scale scale = fp8_scale(Element::to_float(uint16_t(largest_magnitude(z, shared, args))));
  if (threadIdx.x == 0) args.scale[row] = scale.scale;  // fault: scale of a token
#pragma unroll
  for (int v = 0; v < kBlocks; ++v) {
    const int block = v * args.threads + int(threadIdx.x);
    if (block * kBlock >= args.width) continue;
    if constexpr (kPruned) {
      uint8_t* const to = args.values + row * (args.width / 2) + block * kKeptPerBlock;
      // fault: metadata of a token
      args.metadata[Fp8Metadata::halfword(row, block, args.rows_padded)] =
          store_pruned<Element>(z[v], scale.inverse, to);
    } else {
      store_dense<Element>(z[v], scale.inverse, args.values + row * args.width + block * kBlock);
    }
  }
}

template <class Element, Make kMake, bool kPruned, int kBlocks>
cudaError_t launch_blocks(const RoundArgs& args, cudaStream_t stream) {
  return launch_kernel(round_kernel<Element, kMake, kPruned, kBlocks>,
                       // fault: rows that pad
                       unsigned(kPruned ? args.rows_padded : args.rows), unsigned(args.threads), 0, stream,
                       args);
}

// As many threads as let each hold two blocks, up to kMostThreads of up to eight.
template <class Element, Make kMake, bool kPruned>
cudaError_t launch_made(RoundArgs args, cudaStream_t stream) {
  const int blocks = args.width / kBlock;
  const int warps = (blocks + 63) / 64;
  args.threads = 32 * (warps < kMostWarps ? warps : kMostWarps);
  const int each = (blocks + args.threads - 1) / args.threads;
  auto* launch = launch_blocks<Element, kMake, kPruned, 8>;
  if (each <= 2) {
    launch = launch_blocks<Element, kMake, kPruned, 2>;
  } else if (each <= 3) {
    launch = launch_blocks<Element, kMake, kPruned, 3>;
  } else if (each <= 4) {
    launch = launch_blocks<Element, kMake, kPruned, 4>;
  } else if (each <= 6) {
    launch = launch_blocks<Element, kMake, kPruned, 6>;
  }
  return launch(args, stream);
}

template <class Element, bool kPruned>
cudaError_t launch_producer(Producer producer, const RoundArgs& args, cudaStream_t stream) {
  switch (producer) {
    case Producer::kNorm:
      return launch_made<Element, Make::kNorm, kPruned>(args, stream);
    case Producer::kGelu:
      return launch_made<Element, Make::kGelu, kPruned>(args, stream);
    case Producer::kGated:
      return launch_made<Element, Make::kGated, kPruned>(args, stream);
    case Producer::kNone:
      break;
  }
  return launch_made<Element, Make::kPlain, kPruned>(args, stream);
}

}  // namespace

cudaError_t launch_fp8_round(const Fp8LinearParams& params, const RoundedOperand& out, cudaStream_t stream) {
  RoundArgs args{};
  set_producer(args, params);
  args.values = out.values;
  args.metadata = out.metadata;
  args.scale = out.scale;
  args.rows = params.rows;
  args.rows_padded = padded_rows(params.rows);
  args.channels = params.channels;
  args.width = int(fp8_width(params.channels));
  const bool pruned = params.operand == Fp8Operand::kSparseActivation, bf16 = params.dtype == DType::kBf16;
  if (pruned) {
    return bf16 ? launch_producer<Bf16, true>(params.producer, args, stream)
                : launch_producer<Fp16, true>(params.producer, args, stream);
  }
  return bf16 ? launch_producer<Bf16, false>(params.producer, args, stream)
              : launch_producer<Fp16, false>(params.producer, args, stream);
}

}  // namespace lynx
