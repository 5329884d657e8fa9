// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// Writes `pixels` [height, width] as a grey PNG, not compressed. Throws std::runtime_error when it cannot;
// the file is then as it was.
void write_png(const std::string& path, const std::vector<uint8_t>& pixels, uint32_t width, uint32_t height);
