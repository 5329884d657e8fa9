// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace lynx {

// The linker's digest of this library's contents (its GNU build ID), in hexadecimal; empty where it was
// linked without one.
std::string build_id();

}  // namespace lynx
