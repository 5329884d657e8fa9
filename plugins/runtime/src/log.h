// SPDX-License-Identifier: Apache-2.0
// TensorRT's log: one per process, which keeps its last errors for exceptions.
#pragma once

#include <cstdint>
#include <string>

namespace lynx {

void log_message(int32_t severity, const char* message) noexcept;
void forget_errors();

// The errors since forget_errors as the end of a sentence, such as " TensorRT says: ..."; empty without.
std::string said_errors();

}  // namespace lynx
