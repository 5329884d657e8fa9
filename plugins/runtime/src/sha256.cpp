// SPDX-License-Identifier: Apache-2.0
#include "sha256.h"

#include <algorithm>
#include <cstring>

namespace lynx {

Sha256::Sha256()
    : Sha256(sha256_blocks_of_the_cpu() != nullptr ? sha256_blocks_of_the_cpu() : sha256_blocks_portable) {}

void Sha256::update(const std::byte* data, size_t bytes) {
  total_bytes_ += bytes;
  if (pending_bytes_ > 0) {
    const size_t taken = std::min(bytes, pending_.size() - pending_bytes_);
    std::memcpy(&pending_[pending_bytes_], data, taken);
    pending_bytes_ += taken, data += taken, bytes -= taken;
    if (pending_bytes_ < pending_.size()) return;
    blocks_(state_.data(), pending_.data(), 1);
    pending_bytes_ = 0;
  }
  const size_t whole = bytes / kSha256Block;
  blocks_(state_.data(), data, whole);
  data += whole * kSha256Block, bytes -= whole * kSha256Block;
  if (bytes > 0) std::memcpy(pending_.data(), data, bytes);
  pending_bytes_ = bytes;
}

std::string Sha256::hex() {
  const uint64_t bits = 8 * total_bytes_;
  std::array<std::byte, 72> end{
      std::byte{0x80}};  // a one bit, zeros up to 8 bytes before a block's end, length
  const size_t zeros_until = pending_bytes_ < 56 ? 56 : 120;
  const size_t length_at = zeros_until - pending_bytes_;
  for (int i = 0; i < 8; ++i) end[length_at + size_t(i)] = std::byte(bits >> (56 - 8 * i) & 0xff);
  update(end.data(), length_at + 8);
  std::string out;
  for (const uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) out += "0123456789abcdef"[word >> shift & 15];
  }
  return out;
}

std::string sha256(const std::byte* data, size_t bytes) {
  Sha256 digest;
  digest.update(data, bytes);
  return digest.hex();
}

}  // namespace lynx
