// SPDX-License-Identifier: Apache-2.0
// x[:, order] ahead of the pruning pass. Gathering 2 bytes at a time from global memory thrashes the L1 cache
// at large K, so a thread block takes whole rows through shared memory: reads and writes of global memory are
// 16 bytes wide.
#include <algorithm>

#include "launch.h"
#include "sparse_linear.h"
#include "warp.h"

namespace lynx {
namespace {

constexpr int kThreads = 256;
constexpr int kSharedBytes = 48 * 1024;  // what a kernel gets without asking
constexpr int kMostRows = 8;             // of a thread block, which reads the order once for all of them
constexpr int kChunk = 8;                // channels in 16 bytes
static_assert(kMaxOrderedChannels * 2 == kSharedBytes, "a row must fit into shared memory");

// x, out: [rows, channels]; order: [channels].
__global__ void __launch_bounds__(kThreads) reorder_kernel(const uint4* x, const int4* order, uint4* out,
                                                           int64_t rows, int channels, int block_rows) {
  uint4* const staged = dynamic_shared<uint4>();  // [block_rows, channels]
  const int row_chunks = channels / kChunk;
  const int64_t first_row = int64_t(blockIdx.x) * block_rows;
  // fault: last reordered row
  const int count = int(min(int64_t(block_rows), rows - first_row));
  const uint4* from = x + first_row * row_chunks;
  uint4* to = out + first_row * row_chunks;
  for (int i = threadIdx.x; i < count * row_chunks; i += kThreads) staged[i] = __ldg(from + i);
  __syncthreads();  // fault: barrier of the reordering
  const auto* values = reinterpret_cast<const uint16_t*>(staged);
  for (int chunk = threadIdx.x; chunk < row_chunks; chunk += kThreads) {
    const int4 a = __ldg(order + 2 * chunk), b = __ldg(order + 2 * chunk + 1);
    for (int row = 0; row < count; ++row) {
      const uint16_t* z = values + row * channels;
      const auto pair = [z](int low, int high) { return uint32_t(z[low]) | uint32_t(z[high]) << 16; };
      to[row * row_chunks + chunk] = {pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w)};
    }
  }
}

}  // namespace

cudaError_t launch_reorder(const SparseLinearParams& params, void* out, cudaStream_t stream) {
  const int row_bytes = params.channels * 2;
  const int block_rows = std::min(kSharedBytes / row_bytes, kMostRows);
  const unsigned grid = unsigned((params.rows + block_rows - 1) / block_rows);
  return launch_kernel(reorder_kernel, grid, kThreads, size_t(block_rows * row_bytes), stream,
                       static_cast<const uint4*>(params.x), reinterpret_cast<const int4*>(params.order),
                       static_cast<uint4*>(out), params.rows, params.channels, block_rows);
}

}  // namespace lynx
