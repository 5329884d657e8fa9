// SPDX-License-Identifier: Apache-2.0
#include "png.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace {

void append_big_endian(std::string& out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out += char(value >> shift & 0xff);
}

uint32_t crc32(const std::string& bytes) {
  uint32_t crc = ~0u;
  for (const char byte : bytes) {
    crc ^= uint8_t(byte);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return ~crc;
}

uint32_t adler32(const std::string& bytes) {
  uint32_t a = 1, b = 0;
  for (const char byte : bytes) {
    a = (a + uint8_t(byte)) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

// A zlib stream of stored blocks.
std::string stored(const std::string& bytes) {
  constexpr size_t kBlock = 65535;
  std::string out = "\x78\x01";
  for (size_t at = 0; at < bytes.size(); at += kBlock) {
    const size_t length = std::min(kBlock, bytes.size() - at);
    out += char(at + length == bytes.size());  // the last one
    for (const size_t value : {length, ~length}) out += char(value & 0xff), out += char(value >> 8 & 0xff);
    out.append(bytes, at, length);
  }
  append_big_endian(out, adler32(bytes));
  return out;
}

void append_chunk(std::string& out, const std::string& type, const std::string& data) {
  append_big_endian(out, uint32_t(data.size()));
  out += type + data;
  append_big_endian(out, crc32(type + data));
}

}  // namespace

void write_png(const std::string& path, const std::vector<uint8_t>& pixels, uint32_t width, uint32_t height) {
  if (width == 0 || height == 0 || pixels.size() != size_t(width) * height)
    throw std::runtime_error("a picture of the wrong size");
  std::string header, rows, out = "\x89PNG\r\n\x1a\n";
  append_big_endian(header, width);
  append_big_endian(header, height);
  header += std::string("\x08\0\0\0\0", 5);  // 8 bits, grey, no interlace
  for (uint32_t y = 0; y < height; ++y) {
    rows += '\0';  // no filter
    rows.append(reinterpret_cast<const char*>(&pixels[size_t(y) * width]), width);
  }
  append_chunk(out, "IHDR", header);
  append_chunk(out, "IDAT", stored(rows));
  append_chunk(out, "IEND", "");
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file << out;
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    std::remove(temporary.c_str());
    throw std::runtime_error(path + " could not be written (" + why + ")");
  }
}
