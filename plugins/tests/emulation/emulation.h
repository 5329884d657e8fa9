// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA kernel on the CPU: one fibre per thread, one thread block after the other. Slow and strict: it
// is there to find out whether a kernel is right, on machines without a GPU.
//
// A launch fails, with a sentence in error(), when a thread touches memory outside a Buffer buffer, when a
// warp diverges at a collective, when a barrier is not reached by all threads, and when device code compiled
// with -fsanitize=undefined -fsanitize-undefined-trap-on-error does something undefined (a misaligned vector,
// an array's bounds). Every launch must be run under both schedules: threads that race give different bytes.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace emulation {

// The order in which blocks, warps and lanes take turns between barriers. A pair of threads that nothing
// orders runs either way round under one of the two. Memory differs too: under kForward a buffer ends at an
// inaccessible page, under kReverse it begins after one.
enum class Schedule { kForward, kReverse };
extern Schedule schedule;

// Of the device that the host code finds: 80, 90 for wgmma.sp, or 0 for none; and how many SMs it has.
extern int compute_capability;
extern int sm_count;

// Which blocks of a grid run, where not all of them do: of launches that would take hours.
extern std::function<bool(unsigned block)> runs_block;

// What is wrong with the last launch; empty after a good one.
extern std::string error;

constexpr size_t kMostShared = 48 * 1024;  // what a kernel gets without asking

// Bytes of shared memory that `kernel` may take: cudaFuncSetAttribute allows it more.
size_t most_shared(const void* kernel);

// Runs `thread` in every thread of `grid` blocks; false when something is wrong, and then the launch is over.
bool run(unsigned grid, unsigned threads, size_t dynamic_bytes, const std::function<void()>& thread,
         size_t most_shared = kMostShared);

// ---- Called from device code ----

void barrier();

// Waits for the 32 lanes of the warp, then has one of them perform the operation on everybody's arguments.
using Collective = void(void* const (&lanes)[32]);
void collective(Collective* perform, void* arguments);

// cp.async: a copy belongs to the group that the thread's next commit closes. It is done as late as a wait
// lets it, or under kReverse at once: a kernel that reads too early or overwrites what others still read
// gives other bytes under one of the two.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t pending);  // until no more groups than these are left

// Shared memory of the thread block, filled with NaNs when the block starts. `key` names the object.
void* block_shared(const void* key, size_t bytes);
void* dynamic_shared();

// ---- Memory of the "device" ----

// A buffer whose surroundings cannot be touched: inaccessible pages, and canary bytes up to them. Zero where
// nothing has been written, and such parts of it take no memory.
class Buffer {
 public:
  Buffer(std::string name, size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void set(const void* from);  // and makes it read-only: an input
  void fill(int byte);
  bool intact() const;  // the canaries

  // "x, 16 bytes behind its end", or nothing when `address` is not this buffer's.
  std::string describe(const void* address) const;

 private:
  std::string name_;
  size_t bytes_, inner_;  // inner_: bytes between the inaccessible pages
  char *base_, *data_;
};

}  // namespace emulation
