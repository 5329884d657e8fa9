// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4). Our own, because a program that runs an engine should need no further library.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "sha256_blocks.h"

namespace lynx {

class Sha256 {
 public:
  Sha256();  // by the fastest code that this CPU runs
  explicit Sha256(Sha256Blocks blocks) : blocks_(blocks) {}

  void update(const std::byte* data, size_t bytes);
  std::string hex();  // of all that came; once

 private:
  Sha256Blocks blocks_;
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, kSha256Block> pending_{};
  size_t pending_bytes_ = 0;
  uint64_t total_bytes_ = 0;
};

std::string sha256(const std::byte* data, size_t bytes);

}  // namespace lynx
