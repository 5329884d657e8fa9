// SPDX-License-Identifier: Apache-2.0
#include "manifest.h"

#include <algorithm>
#include <set>

#include "file.h"
#include "json.h"

namespace lynx {
namespace {

using nlohmann::json;

constexpr int64_t kFormatVersion = 2;
constexpr size_t kLargestBytes = size_t(16) << 20;  // FLUX.1-dev's is 0.2 MB
constexpr size_t kMostDimensions = 8;               // of a TensorRT tensor
constexpr const char* kNotOfRtx[] = {"sm90", "sm100", "sm103", "sm110"};
constexpr const char* kAgain = "Copy the engine's files again, all of them, or compile it again.";

// A value of the manifest and where it stands, for the Error that says it is wrong.
class Value {
 public:
  Value(const std::string& file, std::string key, const json& value)
      : file_(file), key_(std::move(key)), value_(value) {}

  Value operator[](const char* key) const {
    if (!value_.is_object()) fail("is no mapping");
    const auto found = value_.find(key);
    const std::string full = key_.empty() ? key : key_ + "." + key;
    if (found == value_.end()) throw Error(file_ + ": '" + full + "' is missing.", kAgain);
    return Value(file_, full, *found);
  }

  std::string text() const {
    if (!value_.is_string() || value_.get_ref<const std::string&>().empty()) fail("is no text");
    return value_.get<std::string>();
  }
  // A name in the engine's folder; never a path out of it.
  std::string file_name() const {
    const std::string name = text();
    const bool plain = name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
    if (!plain || name.find_first_not_of('.') == std::string::npos) fail("is no file name");
    return name;
  }
  std::string sha256() const {
    const std::string digest = text();
    const bool hex = digest.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (digest.size() != 64 || !hex) fail("is no SHA-256");
    return digest;
  }
  int64_t integer(int64_t least) const {
    if (!is_integer(value_, least)) fail("is no integer of " + std::to_string(least) + " or more");
    return value_.get<int64_t>();
  }
  bool is_null() const { return value_.is_null(); }

  std::vector<Value> items() const {
    if (!value_.is_array()) fail("is no list");
    std::vector<Value> out;
    for (size_t i = 0; i < value_.size(); ++i)
      out.emplace_back(file_, key_ + "." + std::to_string(i), value_[i]);
    return out;
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw Error(file_ + ": '" + key_ + "' " + why + ".", kAgain);
  }

 private:
  const std::string& file_;
  std::string key_;
  const json& value_;
};

Tensor tensor_of(const Value& value) {
  Tensor out{value["name"].text(), value["dtype"].text(), {}};
  for (const Value& extent : value["shape"].items()) out.shape.push_back(extent.integer(-1));
  if (out.shape.size() > kMostDimensions) value["shape"].fail("has more than 8 extents");
  return out;
}

std::vector<Tensor> tensors_of(const Value& value, std::set<std::string>& names) {
  std::vector<Tensor> out;
  for (const Value& item : value.items()) {
    out.push_back(tensor_of(item));
    if (!names.insert(out.back().name).second) item["name"].fail("is there twice");
  }
  return out;
}

// 89 of "sm89"; 0 of anything else.
int number_of(const std::string& gpu) {
  const bool known = gpu.size() >= 4 && gpu.size() <= 5 && gpu.compare(0, 2, "sm") == 0 &&
                     gpu.find_first_not_of("0123456789", 2) == std::string::npos;
  return known ? std::stoi(gpu.substr(2)) : 0;
}

json read_json(const std::string& path) {
  const FileBytes file = read_file(path, "manifest", kLargestBytes);
  try {
    return parse_json({reinterpret_cast<const char*>(file.data.get()), file.bytes});
  } catch (const JsonError& error) {
    throw Error(path + " is cut off or no JSON (" + error.what() + ").", kAgain);
  }
}

}  // namespace

Manifest read_manifest(const std::string& path) {
  const json values = read_json(path);
  const bool ours = values.is_object() && values.contains("format_version") &&
                    values["format_version"].is_number_integer() &&
                    values["format_version"] == kFormatVersion;
  if (!ours) {
    throw Error(path + " is no manifest of format version " + std::to_string(kFormatVersion) + ".",
                "Compile the engine again with this version of lynx-compile.");
  }
  const Value root(path, "", values);
  Manifest out;
  out.engine_bytes = uint64_t(root["engine"]["bytes"].integer(0));
  out.engine_sha256 = root["engine"]["sha256"].sha256();
  out.backend = root["backend"]["name"].text();
  out.backend_version = root["backend"]["version"].text();
  for (const Value& gpu : root["gpus"].items()) out.gpus.push_back(gpu.text());
  out.plugin_library = root["plugin"]["library"].file_name();
  out.plugin_sha256 = root["plugin"]["sha256"].sha256();
  std::set<std::string> names;
  out.inputs = tensors_of(root["inputs"], names);
  out.outputs = tensors_of(root["outputs"], names);
  const Value weights = root["weights"];
  const std::string mode = weights["mode"].text();
  if (mode != "embedded" && mode != "external") weights["mode"].fail("is neither embedded nor external");
  out.weights = tensors_of(weights["tensors"], names);
  if (mode == "external") {
    out.weights_file = weights["file"].file_name();
    out.weights_sha256 = weights["sha256"].sha256();
  } else if (!out.weights.empty() || !weights["file"].is_null()) {
    weights["tensors"].fail("is for external weights");
  }
  return out;
}

bool runs_on(const Manifest& manifest, const std::string& gpu) {
  const std::vector<std::string>& built = manifest.gpus;
  if (std::find(built.begin(), built.end(), gpu) != built.end()) return true;
  if (manifest.backend != "tensorrt_rtx") return false;
  for (const char* left_out : kNotOfRtx) {
    if (gpu == left_out) return false;
  }
  return std::any_of(built.begin(), built.end(), [&](const std::string& older) {
    return number_of(older) > 0 && number_of(older) < number_of(gpu);
  });
}

}  // namespace lynx
