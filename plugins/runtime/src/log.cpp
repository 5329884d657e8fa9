// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <deque>
#include <mutex>

#include "lynx/engine.h"

namespace lynx {
namespace {

constexpr int32_t kErrorSeverity = 1;
constexpr size_t kMostErrors = 8;

struct State {
  std::mutex mutex;
  Log log;
  std::deque<std::string> errors;
};

// Never destroyed: TensorRT may log until the process is gone.
State& state() {
  static auto* const made = new State;
  return *made;
}

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
      if (severity <= kErrorSeverity) state().errors.emplace_back(message);
      if (state().errors.size() > kMostErrors) state().errors.pop_front();
      log = state().log;
    }
    if (log) log(severity, message);
  } catch (...) {  // nothing may pass through TensorRT's own code
  }
}

void forget_errors() {
  const std::lock_guard lock(state().mutex);
  state().errors.clear();
}

std::string said_errors() {
  const std::lock_guard lock(state().mutex);
  std::string out;
  for (const std::string& error : state().errors) {
    const size_t end = error.find_last_not_of(". \n");
    out += (out.empty() ? " TensorRT says: " : "; ") + error.substr(0, end + 1);
  }
  return out.empty() ? out : out + ".";
}

}  // namespace lynx
