// SPDX-License-Identifier: Apache-2.0
#undef _FORTIFY_SOURCE  // its longjmp takes a jump to another stack for an error
#include "emulation.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;

cudaError_t cudaGetLastError() { return emulation::error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorLaunchFailure ? emulation::error.c_str() : "a CUDA error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return emulation::compute_capability == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? emulation::compute_capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? emulation::compute_capability % 10
                                                            : emulation::sm_count;
  return cudaSuccess;
}

namespace emulation {

Schedule schedule = Schedule::kForward;
int compute_capability = 80;
int sm_count = 132;
std::function<bool(unsigned)> runs_block;
std::string error;

namespace {

constexpr size_t kWarp = 32;
constexpr size_t kMostThreads = 1024;
constexpr size_t kMostToAsk = 99 * 1024;     // of shared memory, on all GPUs from sm_80 on
constexpr size_t kStack = 128 * 1024;        // of a fibre
constexpr size_t kPoisonedStack = 8 * 1024;  // its top, where the locals lie
constexpr int kCanary = 0xa5;
constexpr int kPoison = 0xff;  // NaNs in every format

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fibre {
  ucontext_t context;  // of its start; later it is at `position`
  jmp_buf position;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false;
  State state = State::kDone;
  Collective* perform = nullptr;
  void* arguments = nullptr;
  std::deque<std::vector<Copy>> copies;  // in flight, by group; the last is not closed yet
};

struct SharedObject {
  std::unique_ptr<Buffer> memory;
  bool in_block = false;  // named by a thread of the running block
};

std::vector<const Buffer*> buffers;  // all there are
std::vector<Fibre> fibres;           // of a block; kept for the next
jmp_buf scheduler;
sigjmp_buf escape;  // out of a fibre that did something wrong
volatile sig_atomic_t in_fibre = 0;
size_t current = 0;  // the running fibre
struct Launch {
  unsigned grid, threads;
  size_t most_shared;
  const std::function<void()>* thread;
} launch;
std::map<const void*, SharedObject> shared_objects;
std::unique_ptr<Buffer> dynamic_memory;
std::map<const void*, size_t> allowed_shared;  // by kernel

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

size_t in_turn(size_t i, size_t count) { return schedule == Schedule::kForward ? i : count - 1 - i; }

std::string where() {
  return "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": ";
}

// Ends the launch; only from device code.
[[noreturn]] void give_up(const std::string& what) {
  error = where() + what;
  siglongjmp(escape, 1);
}

void on_signal(int number, siginfo_t* info, void*) {
  if (!in_fibre) {  // the test's own fault: die of it
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  if (number != SIGSEGV && number != SIGBUS) {
    give_up("undefined behaviour: a misaligned vector, an array's bounds, a shift or an overflow");
  }
  for (const Buffer* buffer : buffers) {
    const std::string place = buffer->describe(info->si_addr);
    if (!place.empty()) give_up("touches " + place);
  }
  give_up("touches memory that is no buffer's");
}

void catch_signals() {
  static bool caught = false;
  if (caught) return;
  caught = true;
  static char stack[64 * 1024];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}) sigaction(number, &action, nullptr);
}

// Jumps between stacks as setjmp and longjmp can where swapcontext has made them: without its system calls.
void pause(State state) {
  Fibre& fibre = fibres[current];
  fibre.state = state;
  if (_setjmp(fibre.position) == 0) _longjmp(scheduler, 1);
}

void start_fibre() {
  (*launch.thread)();
  pause(State::kDone);
}

void resume(size_t index) {
  current = index;
  threadIdx = {unsigned(index), 0, 0};
  in_fibre = 1;
  if (_setjmp(scheduler) == 0) {
    Fibre& fibre = fibres[current];
    if (fibre.started) _longjmp(fibre.position, 1);
    fibre.started = true;
    setcontext(&fibre.context);
  }
  in_fibre = 0;
}

// Runs a warp until all its lanes are at the barrier or done.
bool advance(size_t first) {
  for (;;) {
    for (size_t i = 0; i < kWarp; ++i) {
      const size_t fibre = first + in_turn(i, kWarp);
      if (fibres[fibre].state == State::kReady) resume(fibre);
    }
    const auto waiting = [&](const Fibre& f) {
      return f.state == State::kAtCollective && f.perform == fibres[first].perform;
    };
    const auto begin = fibres.begin() + long(first), end = begin + long(kWarp);
    if (std::all_of(begin, end, waiting)) {
      void* lanes[kWarp];
      for (size_t i = 0; i < kWarp; ++i) {
        lanes[i] = fibres[first + i].arguments;
        fibres[first + i].state = State::kReady;
      }
      fibres[first].perform(lanes);
    } else if (std::any_of(begin, end, [](const Fibre& f) { return f.state == State::kAtCollective; })) {
      error = "block " + std::to_string(blockIdx.x) + ", warp " + std::to_string(first / kWarp) +
              ": a collective is not reached by all lanes";
      return false;
    } else {
      return true;
    }
  }
}

bool run_block() {
  const size_t threads = launch.threads;
  for (auto& [key, object] : shared_objects) {
    object.memory->fill(kPoison);
    object.in_block = false;
  }
  if (dynamic_memory) dynamic_memory->fill(kPoison);
  for (size_t i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    std::memset(fibre.stack.get() + kStack - kPoisonedStack, kPoison, kPoisonedStack);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, start_fibre, 0);
    fibre.started = false;
    fibre.state = State::kReady;
    fibre.copies.assign(1, {});
  }
  for (;;) {
    for (size_t i = 0; i < threads / kWarp; ++i) {
      if (!advance(in_turn(i, threads / kWarp) * kWarp)) return false;
    }
    const auto begin = fibres.begin(), end = begin + long(threads);
    const long at_barrier =
        std::count_if(begin, end, [](const Fibre& f) { return f.state == State::kAtBarrier; });
    if (at_barrier == 0) return true;
    if (at_barrier != long(threads)) {
      error = "block " + std::to_string(blockIdx.x) + ": a barrier is reached by " +
              std::to_string(at_barrier) + " of " + std::to_string(threads) + " threads";
      return false;
    }
    for (auto fibre = begin; fibre != end; ++fibre) fibre->state = State::kReady;
  }
}

// The blocks one after the other; false when something is wrong.
bool run_grid() {
  if (sigsetjmp(escape, 1) != 0) {  // a fibre gave up
    in_fibre = 0;
    return false;
  }
  for (size_t i = 0; i < launch.grid; ++i) {
    blockIdx = {unsigned(in_turn(i, launch.grid)), 0, 0};
    if (runs_block && !runs_block(blockIdx.x)) continue;
    if (!run_block()) return false;
  }
  return true;
}

}  // namespace

size_t most_shared(const void* kernel) {
  const auto found = allowed_shared.find(kernel);
  return found == allowed_shared.end() ? kMostShared : found->second;
}

bool run(unsigned grid, unsigned threads, size_t dynamic_bytes, const std::function<void()>& thread,
         size_t most_shared) {
  error.clear();
  if (grid == 0 || threads == 0 || threads > kMostThreads || threads % kWarp != 0 ||
      dynamic_bytes > most_shared) {
    error = "a launch of " + std::to_string(grid) + " blocks of " + std::to_string(threads) +
            " threads with " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory";
    return false;
  }
  catch_signals();
  if (fibres.size() < threads) fibres.resize(threads);
  shared_objects.clear();
  dynamic_memory.reset(dynamic_bytes ? new Buffer("dynamic shared memory", dynamic_bytes) : nullptr);
  launch = {grid, threads, most_shared, &thread};
  if (!run_grid()) return false;
  for (const auto& [key, object] : shared_objects) {
    if (!object.memory->intact()) error = "bytes outside shared memory were written";
  }
  if (dynamic_memory && !dynamic_memory->intact()) error = "bytes outside dynamic shared memory were written";
  return error.empty();
}

void barrier() { pause(State::kAtBarrier); }

void collective(Collective* perform, void* arguments) {
  fibres[current].perform = perform;
  fibres[current].arguments = arguments;
  pause(State::kAtCollective);
}

void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    give_up("a misaligned cp.async");
  }
  if (schedule == Schedule::kReverse) {
    std::memcpy(to, from, bytes);
  } else {
    fibres[current].copies.back().push_back({to, from, bytes});
  }
}

void commit_copies() { fibres[current].copies.emplace_back(); }

void wait_for_copies(size_t pending) {
  auto& groups = fibres[current].copies;
  for (; groups.size() > pending + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void* block_shared(const void* key, size_t bytes) {
  SharedObject& object = shared_objects[key];
  if (!object.memory) {
    object.memory = std::make_unique<Buffer>("shared memory", bytes);
    object.memory->fill(kPoison);
    size_t all = dynamic_memory ? dynamic_memory->bytes() : 0;
    for (const auto& [other, each] : shared_objects) all += each.memory->bytes();
    if (all > launch.most_shared) give_up("takes " + std::to_string(all) + " bytes of shared memory");
  }
  return object.memory->data();
}

void* dynamic_shared() {
  if (!dynamic_memory) give_up("uses dynamic shared memory, and the launch asked for none");
  return dynamic_memory->data();
}

// ---- Buffer ----

Buffer::Buffer(std::string name, size_t bytes) : name_(std::move(name)), bytes_(bytes) {
  const size_t aligned = (bytes + 15) / 16 * 16;  // what the device allocates begins so
  inner_ = (aligned + page() - 1) / page() * page();
  base_ = static_cast<char*>(
      mmap(nullptr, inner_ + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base_ == MAP_FAILED || mprotect(base_ + page(), inner_, PROT_READ | PROT_WRITE) != 0) std::abort();
  data_ = base_ + page() + (schedule == Schedule::kForward ? inner_ - aligned : 0);
  std::memset(base_ + page(), kCanary, size_t(data_ - base_) - page());
  std::memset(data_ + bytes_, kCanary, size_t(base_ + page() + inner_ - data_) - bytes_);
  buffers.push_back(this);
}

Buffer::~Buffer() {
  buffers.erase(std::find(buffers.begin(), buffers.end(), this));
  munmap(base_, inner_ + 2 * page());
}

void Buffer::set(const void* from) {
  std::memcpy(data_, from, bytes_);
  if (mprotect(base_ + page(), inner_, PROT_READ) != 0) std::abort();
}

void Buffer::fill(int byte) { std::memset(data_, byte, bytes_); }

bool Buffer::intact() const {
  const auto canary = [](char byte) { return static_cast<unsigned char>(byte) == kCanary; };
  return std::all_of(base_ + page(), data_, canary) &&
         std::all_of(data_ + bytes_, base_ + page() + inner_, canary);
}

std::string Buffer::describe(const void* address) const {
  const auto at = reinterpret_cast<intptr_t>(address), base = reinterpret_cast<intptr_t>(base_);
  if (at < base || at >= base + intptr_t(inner_ + 2 * page())) return "";
  const intptr_t offset = at - reinterpret_cast<intptr_t>(data_);
  if (offset < 0) return name_ + ", " + std::to_string(-offset) + " bytes ahead of it";
  if (offset >= intptr_t(bytes_))
    return name_ + ", " + std::to_string(offset - intptr_t(bytes_)) + " bytes behind its end";
  return name_ + ", an input, to write it";
}

}  // namespace emulation

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || size_t(value) > emulation::kMostToAsk) return cudaErrorInvalidValue;
  emulation::allowed_shared[kernel] = size_t(value);
  return cudaSuccess;
}

// For tests/plugins/test_emulation.py.
extern "C" void lynx_emulate(int compute_capability, int reverse) {
  emulation::compute_capability = compute_capability;
  emulation::schedule = reverse ? emulation::Schedule::kReverse : emulation::Schedule::kForward;
}
