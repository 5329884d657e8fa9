// SPDX-License-Identifier: Apache-2.0
// Libraries inside an engine.
#pragma once

#include <cstddef>
#include <string>

namespace lynx {

// An Error if `plan` holds host code but copies of the library of that SHA-256. TensorRT loads the libraries
// that an engine carries without asking. Returns how many copies there are.
int check_host_code(const std::string& path, const std::byte* plan, size_t bytes, const std::string& sha256);

}  // namespace lynx
