// SPDX-License-Identifier: Apache-2.0
// Reads safetensors files, such as a LoRA to bind: every offset is checked before it is used, and nothing is
// mapped, so that a file which another process cuts off is an Error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lynx/engine.h"

namespace lynx {

class SafetensorsFile {
 public:
  // Where a tensor's bytes are, in the file.
  struct Entry {
    Tensor tensor;
    uint64_t begin;
    size_t bytes;
  };

  // An Error for anything but a whole safetensors file whose tensors cover it without gap or overlap.
  explicit SafetensorsFile(const std::string& path);
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;
  ~SafetensorsFile();

  const std::vector<Entry>& entries() const noexcept;  // in the order of the file
  const Entry& at(const std::string& name) const;      // an Error where there is none
  // Reads one of this file's tensors into `to`, host memory of `entry.bytes` bytes.
  void read(const Entry& entry, void* to) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lynx
