// SPDX-License-Identifier: Apache-2.0
// External weights: from a safetensors file into the GPU's memory.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "file.h"
#include "gpu.h"
#include "lynx/engine.h"
#include "safetensors.h"

namespace lynx {

struct Weights {
  DeviceMemory memory;
  std::map<std::string, void*> addresses;  // by tensor name
};

// An open weights file whose header fits.
struct WeightsFile {
  std::string path;
  File file;
  SafetensorsHeader header;
};

// Null without a path: the weights are in the engine. An Error for a file that is missing, cut off or no
// safetensors file, lacks one of `wanted` or has it otherwise.
std::unique_ptr<WeightsFile> open_weights(const std::string& path, const std::vector<Tensor>& wanted);

// Loads `wanted`, which is what it was opened with. An Error where it is not of that SHA-256: the digest is
// of the very bytes that were copied.
Weights load_weights(const WeightsFile& weights, const std::string& sha256,
                     const std::vector<Tensor>& wanted);

}  // namespace lynx
