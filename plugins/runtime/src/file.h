// SPDX-License-Identifier: Apache-2.0
// Files, read and never mapped: reading a map of a file that another process cuts off would end this one.
// `what` is the file's part, such as "engine", for the Error that says it is missing or cannot be read.
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

// An open file of the size that it had when it was opened.
class File {
 public:
  File(const std::string& path, const std::string& what);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // The bytes from `position` on. An Error where the file has become shorter.
  void read(size_t position, void* to, size_t bytes) const;
  size_t bytes() const noexcept { return bytes_; }

 private:
  std::string path_, what_;
  int number_ = -1;
  size_t bytes_ = 0;
};

bool is_file(const std::string& path);

// The path of `name` in the folder of `path`.
std::string beside(const std::string& path, const std::string& name);

}  // namespace lynx
