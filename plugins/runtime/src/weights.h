// SPDX-License-Identifier: Apache-2.0
// External weights: from a safetensors file into the GPU's memory.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "gpu.h"
#include "lynx/engine.h"

namespace lynx {

struct Weights {
  DeviceMemory memory;
  std::map<std::string, void*> addresses;  // by tensor name
};

// Loads `wanted` from the file. An Error for a file that is damaged, lacks one or has it otherwise, or is not
// of that SHA-256: the digest is of the very bytes that were copied.
Weights load_weights(const std::string& path, const std::string& sha256, const std::vector<Tensor>& wanted);

}  // namespace lynx
