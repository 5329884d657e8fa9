// SPDX-License-Identifier: Apache-2.0
// The header of a safetensors file, which is not trusted.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "file.h"
#include "lynx/safetensors.h"

namespace lynx {

struct SafetensorsHeader {
  std::vector<std::byte> bytes;  // as they lie in the file, the header's length before it included
  std::vector<SafetensorsFile::Entry> entries;  // in the order of the file
};

// An Error for anything but a whole safetensors file whose tensors cover it without gap or overlap.
SafetensorsHeader read_header(const std::string& path, const File& file);

// An Error where there is no such tensor.
const SafetensorsFile::Entry& entry_named(const std::string& path,
                                          const std::vector<SafetensorsFile::Entry>& entries,
                                          const std::string& name);

}  // namespace lynx
