// SPDX-License-Identifier: Apache-2.0
// SHA-256's work on whole blocks: by the CPU's own instructions for it where it has them, which is four times
// as fast and more, else in plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lynx {

constexpr size_t kSha256Block = 64;  // bytes

// Takes `count` blocks into the state.
using Sha256Blocks = void (*)(uint32_t state[8], const std::byte* blocks, size_t count);

void sha256_blocks_portable(uint32_t state[8], const std::byte* blocks, size_t count);

// By the instructions of this CPU; null where it has none (x86 before Ice Lake and Zen, and others than x86).
Sha256Blocks sha256_blocks_of_the_cpu();

}  // namespace lynx
