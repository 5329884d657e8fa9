// SPDX-License-Identifier: Apache-2.0
#include "lynx/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "file.h"
#include "json.h"
#include "tensor.h"

namespace lynx {
namespace {

using nlohmann::json;

constexpr size_t kLengthBytes = 8;                        // the header's length, little-endian
constexpr uint64_t kLargestHeader = uint64_t(100) << 20;  // as in the safetensors library
constexpr size_t kMostDimensions = 8;
constexpr const char* kAgain = "Copy the file again, or compile the engine again.";

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw Error(path + " is cut off or no safetensors file (" + why + ").", kAgain);
}

std::vector<int64_t> naturals(const json& values, const std::string& path, const std::string& what) {
  if (!values.is_array()) refuse(path, what);
  std::vector<int64_t> out;
  for (const json& value : values) {
    if (!is_integer(value, 0)) refuse(path, what);
    out.push_back(value.get<int64_t>());
  }
  return out;
}

// One tensor of the header; `room`: bytes behind the header, which begin at `data`.
SafetensorsFile::Entry entry_of(const std::string& path, const std::string& name, const json& value,
                                const std::byte* data, uint64_t room) {
  const std::string what = "its entry '" + name.substr(0, 200) + "' is wrong";
  const bool whole = value.is_object() && value.size() == 3 && value.contains("dtype") &&
                     value["dtype"].is_string() && value.contains("shape") && value.contains("data_offsets");
  if (!whole) refuse(path, what);
  const std::vector<int64_t> shape = naturals(value["shape"], path, what);
  const std::vector<int64_t> offsets = naturals(value["data_offsets"], path, what);
  if (shape.size() > kMostDimensions || offsets.size() != 2) refuse(path, what);
  const auto begin = uint64_t(offsets[0]), end = uint64_t(offsets[1]);
  if (begin > end || end > room) refuse(path, what + ": it lies outside the file");
  SafetensorsFile::Entry out{
      {name, safetensors_dtype(value["dtype"].get<std::string>()), shape}, data + begin, size_t(end - begin)};
  if (out.tensor.dtype.empty()) refuse(path, what + ": its dtype is unknown");
  size_t bytes = 0;
  if (!tensor_bytes(out.tensor, &bytes) || bytes != out.bytes)
    refuse(path, what + ": its shape does not fit its bytes");
  return out;
}

json header_of(const std::string& path, const MappedFile& file, uint64_t* header_bytes) {
  if (file.bytes() < kLengthBytes) refuse(path, "it ends within its header");
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= uint64_t(file.data()[i]) << (8 * i);
  if (length > kLargestHeader) refuse(path, "its header would take " + std::to_string(length) + " bytes");
  if (length > file.bytes() - kLengthBytes) refuse(path, "it ends within its header");
  *header_bytes = kLengthBytes + length;
  try {
    return parse_json({reinterpret_cast<const char*>(file.data()) + kLengthBytes, size_t(length)});
  } catch (const JsonError& error) {
    refuse(path, std::string("its header is no JSON: ") + error.what());
  }
}

std::vector<SafetensorsFile::Entry> read_entries(const std::string& path, const MappedFile& file) {
  uint64_t header_bytes = 0;
  const json header = header_of(path, file, &header_bytes);
  if (!header.is_object()) refuse(path, "its header is no mapping");
  const std::byte* const data = file.data() + header_bytes;
  const uint64_t room = file.bytes() - header_bytes;
  std::vector<SafetensorsFile::Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name != "__metadata__") entries.push_back(entry_of(path, name, value, data, room));
  }
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return a.data != b.data ? a.data < b.data : a.bytes < b.bytes;  // empty ones before what begins there
  });
  const std::byte* end = data;
  for (const SafetensorsFile::Entry& entry : entries) {
    if (entry.data != end) {
      refuse(path, "'" + entry.tensor.name.substr(0, 200) + "' overlaps another tensor or leaves a gap");
    }
    end += entry.bytes;
  }
  if (end != data + room) {
    refuse(path, "its tensors take " + std::to_string(end - data) + " bytes, and there are " +
                     std::to_string(room));
  }
  return entries;
}

}  // namespace

struct SafetensorsFile::Impl {
  explicit Impl(const std::string& from)
      : path(from), file(from, "safetensors file"), entries(read_entries(from, file)) {}

  std::string path;
  MappedFile file;
  std::vector<Entry> entries;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;
SafetensorsFile::~SafetensorsFile() = default;

const std::vector<SafetensorsFile::Entry>& SafetensorsFile::entries() const noexcept {
  return impl_->entries;
}
const std::byte* SafetensorsFile::data() const noexcept { return impl_->file.data(); }
size_t SafetensorsFile::bytes() const noexcept { return impl_->file.bytes(); }

const SafetensorsFile::Entry& SafetensorsFile::at(const std::string& name) const {
  for (const Entry& entry : impl_->entries) {
    if (entry.tensor.name == name) return entry;
  }
  throw Error(impl_->path + " has no tensor '" + name + "'.", "Give the file that belongs to the engine.");
}

}  // namespace lynx
