// SPDX-License-Identifier: Apache-2.0
// Whole files: read into memory, or mapped. `what` is the file's part, such as "engine", for the Error that
// says it is missing or cannot be read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace lynx {

// A copy: what was checked stays what it was.
struct FileBytes {
  std::unique_ptr<std::byte[]> data;
  size_t bytes = 0;
};
// An Error also for a file of more than `most` bytes.
FileBytes read_file(const std::string& path, const std::string& what, size_t most = SIZE_MAX);

// Read-only. Reading it ends the process if another one cuts the file off meanwhile.
class MappedFile {
 public:
  MappedFile(const std::string& path, const std::string& what);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const noexcept { return data_; }
  size_t bytes() const noexcept { return bytes_; }

 private:
  const std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

bool is_file(const std::string& path);

// The path of `name` in the folder of `path`.
std::string beside(const std::string& path, const std::string& name);

}  // namespace lynx
