// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <algorithm>
#include <limits>
#include <set>
#include <string>
#include <vector>

namespace lynx {

using nlohmann::json;

namespace {

// At most 200 characters; the parser quotes the text, which may be no UTF-8.
std::string ascii(const std::string& text) {
  std::string out = text.substr(0, 200);
  std::replace_if(out.begin(), out.end(), [](unsigned char c) { return c < 0x20 || c >= 0x7f; }, '?');
  return out;
}

}  // namespace

json parse_json(std::string_view text) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto refuse_twice = [&](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
      throw JsonError("the key '" + ascii(value.get<std::string>()) + "' is there twice");
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), refuse_twice);
  } catch (const json::exception& error) {
    throw JsonError(ascii(error.what()));
  }
}

bool is_integer(const json& value, int64_t least) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    return number <= uint64_t(std::numeric_limits<int64_t>::max()) && int64_t(number) >= least;
  }
  return value.is_number_integer() && value.get<int64_t>() >= least;
}

}  // namespace lynx
