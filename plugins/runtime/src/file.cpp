// SPDX-License-Identifier: Apache-2.0
#include "file.h"

#include <fcntl.h>
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

// Of a regular file; anything else has none.
size_t size_of(int number, const std::string& path, const std::string& what) {
  struct stat status{};
  if (::fstat(number, &status) != 0) fail(path, what, errno);
  if (!S_ISREG(status.st_mode)) fail(path, what, S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
  return size_t(status.st_size);
}

}  // namespace

FileBytes read_file(const std::string& path, const std::string& what, size_t most) {
  const File file(path, what);
  if (file.bytes() > most) {
    throw Error(path + " is larger than " + std::to_string(most >> 20) + " MiB.",
                "Check whether it is the engine's " + what + ".");
  }
  FileBytes out;
  out.bytes = file.bytes();
  out.data.reset(new std::byte[out.bytes]);  // not make_unique, which would write all of it first
  file.read(0, out.data.get(), out.bytes);
  return out;
}

File::File(const std::string& path, const std::string& what)
    : path_(path), what_(what), number_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (number_ < 0) fail(path, what, errno);
  try {
    bytes_ = size_of(number_, path, what);
  } catch (...) {  // no destructor runs where a constructor throws
    ::close(number_);
    throw;
  }
}

File::~File() { ::close(number_); }

void File::read(size_t position, void* to, size_t bytes) const {
  auto* place = static_cast<std::byte*>(to);
  while (bytes > 0) {
    const ssize_t count = ::pread(number_, place, bytes, off_t(position));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(path_, what_, errno);
    if (count == 0) throw Error(path_ + " was cut off while it was read.", "Copy it again.");
    place += count, position += size_t(count), bytes -= size_t(count);
  }
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
