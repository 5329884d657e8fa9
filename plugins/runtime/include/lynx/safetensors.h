// SPDX-License-Identifier: Apache-2.0
// Reads safetensors files, such as a LoRA to bind: memory-mapped, every offset checked before it is used.
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
  // Where a tensor's bytes are, in the mapping.
  struct Entry {
    Tensor tensor;
    const std::byte* data;
    size_t bytes;
  };

  // An Error for anything but a whole safetensors file whose tensors cover it without gap or overlap.
  explicit SafetensorsFile(const std::string& path);
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;
  ~SafetensorsFile();

  const std::vector<Entry>& entries() const noexcept;  // in the order of the file
  const Entry& at(const std::string& name) const;      // an Error where there is none
  // The whole file. Nobody may cut it off meanwhile: reading what is gone ends the process.
  const std::byte* data() const noexcept;
  size_t bytes() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lynx
