// SPDX-License-Identifier: Apache-2.0
// TensorRT's log: one for the process, of which each call of TensorRT keeps the errors that are its own.
#pragma once

#include <cstdint>
#include <deque>
#include <string>

namespace lynx {

// From any thread. An error belongs to the call that its thread is in; one from a thread of TensorRT's own
// may belong to any call that is under way, and is kept for all of them.
void log_message(int32_t severity, const char* message) noexcept;

// The errors of one call of TensorRT, from its construction on, which must be in the thread that makes the
// call.
class CallErrors {
 public:
  CallErrors();
  ~CallErrors();
  CallErrors(const CallErrors&) = delete;
  CallErrors& operator=(const CallErrors&) = delete;

  // The end of a sentence, such as " TensorRT says: ..."; empty without errors.
  std::string said() const;

 private:
  friend void log_message(int32_t severity, const char* message) noexcept;
  void keep(const char* message);

  CallErrors* const outer_;  // of the same thread
  std::deque<std::string> errors_;
};

}  // namespace lynx
