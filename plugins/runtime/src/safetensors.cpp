// SPDX-License-Identifier: Apache-2.0
#include "safetensors.h"

#include <algorithm>
#include <limits>

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

// One tensor of the header, which ends at byte `data` of the file; `room`: bytes behind it.
SafetensorsFile::Entry entry_of(const std::string& path, const std::string& name, const json& value,
                                uint64_t data, uint64_t room) {
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

// The length, 8 bytes, and the JSON behind it.
std::vector<std::byte> header_bytes(const std::string& path, const File& file) {
  if (file.bytes() < kLengthBytes) refuse(path, "it ends within its header");
  std::vector<std::byte> out(kLengthBytes);
  file.read(0, out.data(), kLengthBytes);
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= uint64_t(out[i]) << (8 * i);
  if (length > kLargestHeader) refuse(path, "its header would take " + std::to_string(length) + " bytes");
  if (length > file.bytes() - kLengthBytes) refuse(path, "it ends within its header");
  out.resize(kLengthBytes + length);
  file.read(kLengthBytes, out.data() + kLengthBytes, size_t(length));
  return out;
}

json header_of(const std::string& path, const std::vector<std::byte>& bytes) {
  try {
    return parse_json(
        {reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, bytes.size() - kLengthBytes});
  } catch (const JsonError& error) {
    refuse(path, std::string("its header is no JSON: ") + error.what());
  }
}

}  // namespace

SafetensorsHeader read_header(const std::string& path, const File& file) {
  SafetensorsHeader out{header_bytes(path, file), {}};
  const json header = header_of(path, out.bytes);
  if (!header.is_object()) refuse(path, "its header is no mapping");
  const uint64_t data = out.bytes.size(), room = file.bytes() - data;
  for (const auto& [name, value] : header.items()) {
    if (name != "__metadata__") out.entries.push_back(entry_of(path, name, value, data, room));
  }
  std::sort(out.entries.begin(), out.entries.end(), [](const auto& a, const auto& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.bytes < b.bytes;  // empty ones before what begins there
  });
  uint64_t end = data;
  for (const SafetensorsFile::Entry& entry : out.entries) {
    if (entry.begin != end) {
      refuse(path, "'" + entry.tensor.name.substr(0, 200) + "' overlaps another tensor or leaves a gap");
    }
    end += entry.bytes;
  }
  if (end != data + room) {
    refuse(path, "its tensors take " + std::to_string(end - data) + " bytes, and there are " +
                     std::to_string(room));
  }
  return out;
}

const SafetensorsFile::Entry& entry_named(const std::string& path,
                                          const std::vector<SafetensorsFile::Entry>& entries,
                                          const std::string& name) {
  for (const SafetensorsFile::Entry& entry : entries) {
    if (entry.tensor.name == name) return entry;
  }
  throw Error(path + " has no tensor '" + name + "'.", "Give the file that belongs to the engine.");
}

struct SafetensorsFile::Impl {
  explicit Impl(const std::string& from)
      : path(from), file(from, "safetensors file"), entries(read_header(from, file).entries) {}

  std::string path;
  File file;
  std::vector<Entry> entries;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;
SafetensorsFile::~SafetensorsFile() = default;

const std::vector<SafetensorsFile::Entry>& SafetensorsFile::entries() const noexcept {
  return impl_->entries;
}

const SafetensorsFile::Entry& SafetensorsFile::at(const std::string& name) const {
  return entry_named(impl_->path, impl_->entries, name);
}

void SafetensorsFile::read(const Entry& entry, void* to) const {
  impl_->file.read(size_t(entry.begin), to, entry.bytes);
}

}  // namespace lynx
