// SPDX-License-Identifier: Apache-2.0
// The manifest OUT.json beside an engine, as far as running it needs it; lynx_compile/engine/manifest.py
// writes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lynx/engine.h"

namespace lynx {

struct Manifest {
  uint64_t engine_bytes = 0;
  std::string engine_sha256;
  std::string backend, backend_version;  // "tensorrt" or "tensorrt_rtx", "1.7.1.116"
  std::vector<std::string> gpus;         // "sm80" ...
  std::string plugin_library, plugin_sha256;
  std::vector<Tensor> inputs, outputs, weights;
  std::string weights_file, weights_sha256;  // empty: the weights are in the engine
};

// An Error for a file that is missing, too large, cut off, no JSON, of another format version, or lacks a key
// that is read here or has a wrong one. Keys that are not read are not looked at.
Manifest read_manifest(const std::string& path);

// Whether the engine runs on a GPU of this architecture, "sm89", as far as can be told before TensorRT sees
// it. The rule is stated at `runs_on` in lynx_compile/engine/manifest.py; tests/engine/gpus.json holds both
// to one table.
bool runs_on(const Manifest& manifest, const std::string& gpu);

}  // namespace lynx
