// SPDX-License-Identifier: Apache-2.0
// JSON as the files beside an engine have it: read by nlohmann's parser, no key twice.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

namespace lynx {

// Throws nlohmann::json::exception, for text that is no JSON or has a key twice in one object.
nlohmann::json parse_json(std::string_view text);

// Whether it is an integer of at least `least` that fits into int64_t.
bool is_integer(const nlohmann::json& value, int64_t least);

}  // namespace lynx
