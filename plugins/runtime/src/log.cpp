// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <mutex>
#include <set>

#include "lynx/engine.h"

namespace lynx {
namespace {

constexpr int32_t kErrorSeverity = 1;
constexpr size_t kMostErrors = 8;

struct State {
  std::mutex mutex;
  Log log;
  std::set<CallErrors*> calls;  // under way
};

// Never destroyed: TensorRT may log until the process is gone.
State& state() {
  static auto* const made = new State;
  return *made;
}

thread_local CallErrors* current = nullptr;  // the call that this thread is in

}  // namespace

void set_log(Log log) {
  const std::lock_guard lock(state().mutex);
  state().log = std::move(log);
}

void log_message(int32_t severity, const char* message) noexcept {
  try {
    Log log;
    {
      const std::lock_guard lock(state().mutex);
      if (severity <= kErrorSeverity && current != nullptr) {
        current->keep(message);
      } else if (severity <= kErrorSeverity) {
        for (CallErrors* call : state().calls) call->keep(message);
      }
      log = state().log;
    }
    if (log) log(severity, message);
  } catch (...) {  // nothing may pass through TensorRT's own code
  }
}

CallErrors::CallErrors() : outer_(current) {
  const std::lock_guard lock(state().mutex);
  state().calls.insert(this);
  current = this;
}

CallErrors::~CallErrors() {
  const std::lock_guard lock(state().mutex);
  state().calls.erase(this);
  current = outer_;
}

std::string CallErrors::said() const {
  const std::lock_guard lock(state().mutex);
  std::string out;
  for (const std::string& error : errors_) {
    const size_t end = error.find_last_not_of(". \n");
    out += (out.empty() ? " TensorRT says: " : "; ") + error.substr(0, end + 1);
  }
  return out.empty() ? out : out + ".";
}

void CallErrors::keep(const char* message) {
  errors_.emplace_back(message);
  if (errors_.size() > kMostErrors) errors_.pop_front();
}

}  // namespace lynx
