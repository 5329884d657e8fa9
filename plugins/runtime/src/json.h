// SPDX-License-Identifier: Apache-2.0
// JSON as the files beside an engine have it: read by nlohmann's parser, no key twice.
#pragma once

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>

namespace lynx {

// What is wrong with a text, in ASCII.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws a JsonError for text that is no JSON or has a key twice in one object.
nlohmann::json parse_json(std::string_view text);

// Whether it is an integer of at least `least` that fits into int64_t.
bool is_integer(const nlohmann::json& value, int64_t least);

}  // namespace lynx
