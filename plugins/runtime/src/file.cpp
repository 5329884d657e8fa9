// SPDX-License-Identifier: Apache-2.0
#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "lynx/engine.h"

namespace lynx {
namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what, int error) {
  if (error == ENOENT) {
    throw Error("The " + what + " " + path + " does not exist.",
                "Check the path, and keep an engine's files together.");
  }
  throw Error(path + " cannot be read (" + std::strerror(error) + ").",
              "Check its permissions and its disk.");
}

// An open file, closed with it.
class Handle {
 public:
  Handle(const std::string& path, const std::string& what)
      : number_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (number_ < 0) fail(path, what, errno);
  }
  ~Handle() { ::close(number_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

size_t size_of(const Handle& file, const std::string& path, const std::string& what) {
  struct stat status{};
  if (::fstat(file.number(), &status) != 0) fail(path, what, errno);
  if (!S_ISREG(status.st_mode)) fail(path, what, S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
  return size_t(status.st_size);
}

}  // namespace

FileBytes read_file(const std::string& path, const std::string& what, size_t most) {
  const Handle file(path, what);
  FileBytes out;
  out.bytes = size_of(file, path, what);
  if (out.bytes > most) {
    throw Error(path + " is larger than " + std::to_string(most >> 20) + " MiB.",
                "Check whether it is the engine's " + what + ".");
  }
  out.data.reset(new std::byte[out.bytes]);  // not make_unique, which would write all of it first
  size_t position = 0;
  while (position < out.bytes) {
    const ssize_t count = ::read(file.number(), &out.data[position], out.bytes - position);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(path, what, errno);
    if (count == 0) throw Error(path + " was cut off while it was read.", "Try again.");
    position += size_t(count);
  }
  return out;
}

MappedFile::MappedFile(const std::string& path, const std::string& what) {
  const Handle file(path, what);
  bytes_ = size_of(file, path, what);
  if (bytes_ == 0) return;  // nothing cannot be mapped
  void* const address = ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file.number(), 0);
  if (address == MAP_FAILED) fail(path, what, errno);
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), bytes_);
}

bool is_file(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

std::string beside(const std::string& path, const std::string& name) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? name : path.substr(0, slash + 1) + name;
}

}  // namespace lynx
