// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "lynx/engine.h"

namespace lynx {
namespace {

// Names in files and TensorRT's messages may hold anything.
std::string on_one_line(std::string text) {
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return text;
}

}  // namespace

Error::Error(const std::string& cause, const std::string& remedy)
    : std::runtime_error(on_one_line(cause + " " + remedy)),
      cause_(on_one_line(cause)),
      remedy_(on_one_line(remedy)) {}

}  // namespace lynx
