// SPDX-License-Identifier: Apache-2.0
// Tests the emulator (emulation/) itself: mma against a matrix product, shuffles, and that every fault it is
// there to catch is caught. emulation_test would prove nothing without this.
#include "emulation/device.h"
#include "kernels/launch.h"

#include <cstdio>
#include <random>
#include <string>

namespace {

using emulation::Buffer;
using emulation::Schedule;

int passed = 0, failed = 0;

void report(bool ok, const std::string& name) {
  std::printf("%s %s\n", ok ? "PASS" : "FAIL", name.c_str());
  ++(ok ? passed : failed);
}

// ---- Faulty kernels. Each has one fault, at `fault`; 0 is none. ----

enum class Fault {
  kNone,
  kNoBarrier,
  kBarrierOfHalf,
  kBarrierOfOneLane,
  kShuffleOfHalf,
  kReadBehind,
  kReadAhead,
  kWriteBehind,
  kWriteInput,
  kMisaligned,
  kSharedBounds,
  kSharedBehind,
  kBothOps,
};

struct Shared {
  float sums[2][32];
  float guard;
};

// out[i] = the sum over both warps of in[lane ^ 1], through shared memory; 64 threads, in of 64 floats.
__global__ void kernel(const float* in, float* out, Fault fault) {
  auto& shared = lynx::block_shared<Shared>();
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float mine = __ldg(in + thread);
  if (fault == Fault::kShuffleOfHalf && lane < 16)
    mine = 0.0f;
  else
    mine = __shfl_xor_sync(~0u, mine, 1);
  if (fault == Fault::kBothOps) {
    float d[4] = {};
    if (lane == 3)
      mine = __shfl_xor_sync(~0u, mine, 2);
    else
      lynx::mma_m16n8k16<lynx::Bf16>(d, 0, 0, 0, 0, 0, 0);
  }
  shared.sums[warp][fault == Fault::kSharedBounds ? lane + 1 : lane] = mine;
  if (fault == Fault::kSharedBehind) (&shared.guard)[thread / 63] = 0.0f;
  if (fault == Fault::kNoBarrier || (fault == Fault::kBarrierOfHalf && warp == 1) ||
      (fault == Fault::kBarrierOfOneLane && thread == 5)) {
    // a barrier is missing
  } else {
    __syncthreads();
  }
  const float* from = in;
  if (fault == Fault::kReadBehind && thread == 63) from += 1;
  if (fault == Fault::kReadAhead && thread == 0) from -= 1;
  mine = from[thread] * 0.0f + shared.sums[0][lane] + shared.sums[1][lane];
  if (fault == Fault::kWriteInput && thread == 7) const_cast<float*>(in)[7] = 1.0f;
  if (fault == Fault::kMisaligned && thread == 9)
    mine += float(__ldg(reinterpret_cast<const uint4*>(in + 1)).x);
  out[fault == Fault::kWriteBehind ? thread + 1 : thread] = mine;
}

// The error of a launch under one schedule, and what it left.
std::string run(Schedule schedule, Fault fault, std::vector<float>* left) {
  emulation::schedule = schedule;
  std::vector<float> values(64);
  for (size_t i = 0; i < 64; ++i) values[i] = float(i);
  Buffer in("in", 256), out("out", 256);
  in.set(values.data());
  out.fill(0);
  const cudaError_t code =
      lynx::launch_kernel(kernel, 2, 64, 0, nullptr, static_cast<const float*>(in.data()),
                          static_cast<float*>(out.data()), fault);
  const auto* floats = static_cast<const float*>(out.data());
  left->assign(floats, floats + 64);
  if ((code == cudaSuccess) != emulation::error.empty()) return "the code and the error disagree";
  return emulation::error;
}

// `said` must be part of the error under one of the schedules.
void check_fault(Fault fault, const std::string& said) {
  std::vector<float> left;
  std::string errors;
  for (const Schedule schedule : {Schedule::kForward, Schedule::kReverse})
    errors += run(schedule, fault, &left) + "\n";
  report(errors.find(said) != std::string::npos,
         "caught: " + said + (errors.size() > 2 ? "" : " (nothing was)"));
  if (errors.find(said) == std::string::npos) std::printf("%s", errors.c_str());
}

void check_good_kernel() {
  std::vector<float> forward, reverse;
  bool ok = run(Schedule::kForward, Fault::kNone, &forward).empty();
  ok &= run(Schedule::kReverse, Fault::kNone, &reverse).empty() && forward == reverse;
  for (int i = 0; i < 64; ++i) ok &= forward[size_t(i)] == float(2 * (i % 32 ^ 1) + 32);
  report(ok, "a good kernel runs, the same both ways round");
}

void check_race() {
  std::vector<float> forward, reverse;
  run(Schedule::kForward, Fault::kNoBarrier, &forward);
  run(Schedule::kReverse, Fault::kNoBarrier, &reverse);
  report(std::memcmp(forward.data(), reverse.data(), 256) != 0, "a missing barrier shows in the bytes");
}

// ---- mma ----

__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* d) {  // [16, 16], [16, 8], [16, 8]
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](uint16_t low, uint16_t high) { return uint32_t(low) | uint32_t(high) << 16; };
  const auto of_a = [&](int row, int k) { return pair(a[row * 16 + k], a[row * 16 + k + 1]); };
  const auto of_b = [&](int k) { return pair(b[k * 8 + g], b[(k + 1) * 8 + g]); };
  float sum[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[(g + 8) * 8 + 2 * t], d[(g + 8) * 8 + 2 * t + 1]};
  lynx::mma_m16n8k16<lynx::Fp16>(sum, of_a(g, 2 * t), of_a(g + 8, 2 * t), of_a(g, 2 * t + 8),
                                 of_a(g + 8, 2 * t + 8), of_b(2 * t), of_b(2 * t + 8));
  d[g * 8 + 2 * t] = sum[0], d[g * 8 + 2 * t + 1] = sum[1];
  d[(g + 8) * 8 + 2 * t] = sum[2], d[(g + 8) * 8 + 2 * t + 1] = sum[3];
}

void check_mma() {
  std::mt19937 random(1);
  const auto small = [&] { return int(random() % 17) - 8; };  // products and sums are exact
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> d(128), wanted(128);
  for (uint16_t& each : a) each = reference::fp16().nearest(float(small()));
  for (uint16_t& each : b) each = reference::fp16().nearest(float(small()));
  for (float& each : d) each = float(small());
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      double sum = d[i * 8 + j];
      for (size_t k = 0; k < 16; ++k)
        sum += reference::fp16()[a[i * 16 + k]] * reference::fp16()[b[k * 8 + j]];
      wanted[i * 8 + j] = float(sum);
    }
  }
  const cudaError_t code =
      lynx::launch_kernel(mma_kernel, 1, 32, 0, nullptr, static_cast<const uint16_t*>(a.data()),
                          static_cast<const uint16_t*>(b.data()), d.data());
  report(code == cudaSuccess && d == wanted, "mma.m16n8k16 is a matrix product");
}

// With fragments that memory holds as load_matrices and the kernels' way to metadata take them from there.
template <bool kSparse>
__global__ void e4m3_kernel(const uint8_t* a, const uint32_t* metadata, const uint8_t* b, float* d) {
  constexpr int kK = kSparse ? 64 : 32, kRows = 16;  // a [16, 32], metadata [16, 2], b [8, K], d [16, 8]
  struct Tiles {
    alignas(16) uint8_t a[kRows * 32], b[8 * kK];
  };
  auto& shared = lynx::block_shared<Tiles>();
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  lynx::copy_async<16>(shared.a + lane * 16, a + lane * 16);
  if (lane < 8 * kK / 16) lynx::copy_async<16>(shared.b + lane * 16, b + lane * 16);
  lynx::commit_copies();
  lynx::wait_for_copies<0>();
  __syncthreads();
  uint32_t fragment[4], of_b[4];
  lynx::load_matrices(fragment, shared.a + lane % 16 * 32 + lane / 16 * 16);
  lynx::load_matrices(of_b, shared.b + lane % 8 * kK + (kSparse ? lane / 8 : lane / 8 % 2) * 16);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if constexpr (kSparse) {
    lynx::multiply_sparse_e4m3(sum, fragment, of_b, metadata[(g + t % 2 * 8) * 2 + t / 2]);
  } else {
    lynx::multiply_e4m3(sum, fragment, of_b);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <bool kSparse>
void check_e4m3() {
  constexpr size_t kK = kSparse ? 64 : 32;
  std::mt19937 random(2);
  const auto small = [&] { return reference::nearest_e4m3(float(int(random() % 17) - 8)); };
  std::vector<uint8_t> a(16 * 32), b(8 * kK);
  std::vector<uint32_t> metadata(16 * 2, 0);
  std::vector<float> d(128), wanted(128);
  std::vector<double> whole(16 * kK, 0.0);
  for (uint8_t& each : a) each = small();
  for (uint8_t& each : b) each = small();
  for (float& each : d) each = float(int(random() % 9));
  constexpr uint32_t kNibbles[] = {4, 8, 9, 12, 13, 14};
  for (size_t row = 0; row < 16; ++row) {
    for (size_t i = 0; i < 32; ++i) {
      if (!kSparse) whole[row * kK + i] = reference::e4m3_value(a[row * 32 + i]);
    }
    for (size_t group = 0; kSparse && group < 16; ++group) {
      const uint32_t nibble = kNibbles[random() % 6];
      metadata[row * 2 + group / 8] |= nibble << (4 * (group % 8));
      whole[row * kK + 4 * group + (nibble & 3)] = reference::e4m3_value(a[row * 32 + 2 * group]);
      whole[row * kK + 4 * group + (nibble >> 2)] = reference::e4m3_value(a[row * 32 + 2 * group + 1]);
    }
  }
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      double sum = d[i * 8 + j];
      for (size_t k = 0; k < kK; ++k) sum += whole[i * kK + k] * reference::e4m3_value(b[j * kK + k]);
      wanted[i * 8 + j] = float(sum);
    }
  }
  const cudaError_t code = lynx::launch_kernel(
      e4m3_kernel<kSparse>, 1, 32, 0, nullptr, static_cast<const uint8_t*>(a.data()),
      static_cast<const uint32_t*>(metadata.data()), static_cast<const uint8_t*>(b.data()), d.data());
  report(code == cudaSuccess && d == wanted,
         kSparse ? "mma.sp.m16n8k64 of e4m3 is a matrix product" : "mma.m16n8k32 of e4m3 is one");
}

// ---- Copies in the background ----

enum class CopyFault { kNone, kNoWait, kOverwritten };

// out = in, 32 words at a time, through two stages.
__global__ void copy_kernel(const uint32_t* in, uint32_t* out, int count, CopyFault fault) {
  using Stages = uint32_t[2][32 * 4];
  auto& stages = lynx::block_shared<Stages>();
  const int lane = int(threadIdx.x);
  const auto begin = [&](int i) {
    if (i < count) lynx::copy_async<16>(stages[i % 2] + lane * 4, in + (i * 32 + lane) * 4);
    lynx::commit_copies();
  };
  begin(0);
  for (int i = 0; i < count; ++i) {
    begin(i + 1);
    if (fault == CopyFault::kNoWait) {
      lynx::wait_for_copies<2>();
    } else {
      lynx::wait_for_copies<1>();
    }
    __syncthreads();
    for (int j = 0; j < 4; ++j) out[i * 128 + j * 32 + lane] = stages[i % 2][j * 32 + lane];
    if (fault != CopyFault::kOverwritten) __syncthreads();
  }
}

void check_copies() {
  const auto right = [](Schedule schedule, CopyFault fault) {
    emulation::schedule = schedule;
    std::vector<uint32_t> in(4 * 128), out(4 * 128);
    for (size_t i = 0; i < in.size(); ++i) in[i] = uint32_t(i + 1);
    const cudaError_t code = lynx::launch_kernel(
        copy_kernel, 1, 32, 0, nullptr, static_cast<const uint32_t*>(in.data()), out.data(), 4, fault);
    return code == cudaSuccess && in == out;
  };
  const auto both = [&](CopyFault fault) {
    return right(Schedule::kForward, fault) && right(Schedule::kReverse, fault);
  };
  report(both(CopyFault::kNone), "copies in the background arrive");
  report(!both(CopyFault::kNoWait), "caught: a copy that was not waited for");
  report(!both(CopyFault::kOverwritten), "caught: a copy onto what others still read");
}

// ---- Launches ----

__global__ void dynamic_kernel(size_t at) { lynx::dynamic_shared<char>()[at] = 1; }

struct Large {
  char bytes[48 * 1024 + 16];
};
__global__ void large_kernel() { lynx::block_shared<Large>().bytes[0] = 1; }

void check_launches() {
  emulation::schedule = Schedule::kForward;
  const auto launch = [](unsigned grid, unsigned threads, size_t bytes, size_t at) {
    return lynx::launch_kernel(dynamic_kernel, grid, threads, bytes, nullptr, at) == cudaSuccess;
  };
  report(launch(1, 32, 64, 63), "dynamic shared memory");
  report(!launch(1, 32, 64, 64), "caught: a write behind dynamic shared memory");
  report(!launch(1, 32, 0, 0), "caught: dynamic shared memory that was not asked for");
  report(!launch(1, 32, 49 * 1024, 0) && !launch(0, 32, 64, 0) && !launch(1, 1056, 64, 0) &&
             !launch(1, 33, 64, 0),
         "caught: launches that a GPU refuses");
  report(cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 99 * 1024) ==
                 cudaSuccess &&
             launch(1, 32, 99 * 1024, 99 * 1024 - 1) && !launch(1, 32, 99 * 1024 + 16, 0) &&
             cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024) !=
                 cudaSuccess,
         "as much shared memory as a kernel was allowed, and not more");
  report(lynx::launch_kernel(large_kernel, 1, 32, 0, nullptr) != cudaSuccess,
         "caught: too much shared memory");
}

void check_byte_perm() {
  report(__byte_perm(0x33221100u, 0x77665544u, 0x7520u) == 0x77552200u, "byte_perm picks bytes by nibbles");
}

}  // namespace

int main() {
  check_good_kernel();
  check_race();
  check_fault(Fault::kBarrierOfHalf, "a barrier is reached by 32 of 64 threads");
  check_fault(Fault::kBarrierOfOneLane, "a barrier is reached by 63 of 64 threads");
  check_fault(Fault::kShuffleOfHalf, "a collective is not reached by all lanes");
  check_fault(Fault::kBothOps, "a collective is not reached by all lanes");
  check_fault(Fault::kReadBehind, "thread 63: touches in, 0 bytes behind its end");
  check_fault(Fault::kReadAhead, "thread 0: touches in, 4 bytes ahead of it");
  check_fault(Fault::kWriteBehind, "touches out, 0 bytes behind its end");
  check_fault(Fault::kWriteInput, "thread 7: touches in, an input, to write it");
  check_fault(Fault::kMisaligned, "thread 9: undefined behaviour");
  check_fault(Fault::kSharedBounds, "thread 31: undefined behaviour");
  check_fault(Fault::kSharedBehind, "bytes outside shared memory were written");
  check_mma();
  check_e4m3<false>();
  check_e4m3<true>();
  check_copies();
  check_launches();
  check_byte_perm();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
