// SPDX-License-Identifier: Apache-2.0
// Checks sparse24.h on the host, with g++ alone: g++ -std=c++17 -O2 -I.. host_test.cpp && ./a.out
//
// The expectations are those of reference.h, stated independently of the header.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/sparse24.h"
#include "reference.h"

namespace {

using reference::Format;
using reference::kBf16Format;
using reference::kFp16Format;
using reference::value_of;

int passed = 0, failed = 0;

void report(bool ok, const char* name) {
  std::printf("%s %s\n", ok ? "PASS" : "FAIL", name);
  ++(ok ? passed : failed);
}

// ---- Checks ----

template <class Element>
void check_conversions(Format format, const reference::Rounding& rounding, const char* name) {
  bool exact = true, rounded = true;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const double wanted = value_of(uint16_t(bits), format);
    const float found = Element::to_float(uint16_t(bits));
    exact &= std::isnan(wanted) ? std::isnan(found)
                                : double(found) == wanted && std::signbit(found) == std::signbit(wanted);
  }
  std::mt19937 random(7);
  for (int i = 0; i < 2000000; ++i) {
    uint32_t bits = random();
    if (i % 4 == 1) bits &= 0xfffff000u;                        // ties of either format
    if (i % 4 == 2) bits = (bits & 0x80ffffffu) | 0x38000000u;  // about fp16's subnormals
    if (i % 4 == 3) bits = (bits & 0x8000ffffu) | 0x477f0000u;  // about fp16's overflow
    const float value = lynx::bits_float(bits);
    rounded &= Element::from_float(value) == rounding.nearest(value);
  }
  report(exact, (std::string(name) + " to_float, all 65536 patterns").c_str());
  report(rounded, (std::string(name) + " from_float, 2 million patterns").c_str());
}

// Values that meet at edges: zeros of both signs, ties, infinities, NaNs, subnormals, random.
uint16_t tricky_value(std::mt19937& random, Format format) {
  const uint16_t infinity = uint16_t(((1 << format.exponent_bits) - 1) << format.mantissa_bits);
  const uint16_t pool[] = {0x0000, 0x8000, 0x3c00, 0xbc00,   0x3f80,
                           0xbf80, 0x0001, 0x8001, infinity, uint16_t(infinity | 0x8000),
                           0x7fff, 0xffff};
  const uint32_t draw = random();
  return draw % 3 == 0 ? pool[draw / 3 % 12] : uint16_t(draw >> 8);
}

template <class Element>
void check_blocks(Format format, const char* name) {
  std::mt19937 random(11);
  bool positions_ok = true, values_ok = true, norms_ok = true;
  for (int round = 0; round < 200000; ++round) {
    uint16_t z[16];
    for (int i = 0; i < 16; ++i) {
      z[i] = round % 5 == 0 ? uint16_t(0x3c00 + random() % 2) : tricky_value(random, format);
      // A NaN outranks a NaN by its payload; all are made alike to test the tie.
      if (std::isnan(value_of(z[i], format))) z[i] = uint16_t(0x7fff | (z[i] & 0x8000));
    }
    uint32_t z_words[8];
    std::memcpy(z_words, z, sizeof z);
    lynx::RowNorm norm;
    const lynx::CompressedBlock block = lynx::compress_block<Element>(z_words, &norm);
    uint16_t values[8];
    std::memcpy(values, block.values, sizeof values);
    double all = 0.0, kept = 0.0;
    for (int q = 0; q < 4; ++q) {
      std::array<double, 4> score;
      for (int i = 0; i < 4; ++i) {
        score[i] = std::fabs(value_of(z[4 * q + i], format));
        all += value_of(z[4 * q + i], format) * value_of(z[4 * q + i], format);
      }
      const auto wanted = reference::kept_positions(score);
      const uint32_t nibble = block.metadata >> (4 * q) & 15u;
      const int lo = nibble & 3u, hi = nibble >> 2;
      positions_ok &= lo == wanted[0] && hi == wanted[1];
      values_ok &= values[2 * q] == z[4 * q + lo] && values[2 * q + 1] == z[4 * q + hi];
      for (const int i : wanted) kept += value_of(z[4 * q + i], format) * value_of(z[4 * q + i], format);
    }
    positions_ok &= block.metadata < 0x10000u;
    const auto close = [](float found, double wanted) {
      if (!std::isfinite(float(wanted))) return !std::isfinite(found);
      return std::fabs(double(found) - wanted) <= 1e-6 * wanted + 1e-37;
    };
    norms_ok &= close(norm.all, all) && close(norm.kept, kept);
  }
  const std::string title = name;
  report(positions_ok, (title + ": kept positions of 800000 groups").c_str());
  report(values_ok, (title + ": compressed values").c_str());
  report(norms_ok, (title + ": norms").c_str());
}

// A whole operand through a layout and back: every block's metadata is found where the layout's 16-bit index
// says.
template <class Layout, class Index>
void check_layout(int64_t rows, int64_t width, Index index, const char* name) {
  const int64_t blocks = width / lynx::kBlock;
  std::vector<uint32_t> words(size_t(Layout::bytes(rows, width) / 4), lynx::kEmptyMetadataPair);
  std::vector<int> writes(words.size(), 0);
  const auto metadata = [&](int64_t m, int64_t block) { return uint16_t(0x1000 + m * blocks + block); };
  for (int64_t m = 0; m < rows; ++m) {
    if (m % 16 >= 8) continue;
    for (int64_t block = 0; block < blocks; ++block) {
      const size_t at = size_t(Layout::word(m, block, rows));
      if (at >= words.size()) return report(false, name);
      words[at] = metadata(m, block) | uint32_t(metadata(m + 8, block)) << 16;
      ++writes[at];
    }
  }
  bool ok = int64_t(std::count(writes.begin(), writes.end(), 1)) == rows / 2 * blocks;  // no word twice
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = index(m, block);
      ok &= uint16_t(words[size_t(at / 2)] >> (16 * (at % 2))) == metadata(m, block);
    }
  }
  report(ok, name);
}

void check_scale() {
  const auto scale = [](float all, float kept) { return lynx::norm_scale({all, kept}); };
  report(scale(0.0f, 0.0f) == 0.0f, "norm scale of an all-zero row is 0");
  report(std::fabs(scale(8.0f, 4.0f) - std::sqrt(2.0f)) < 1e-6f, "norm scale of 8 over 4 is sqrt 2");
  report(std::isnan(scale(INFINITY, INFINITY)), "norm scale of an infinite row is NaN");
  report(
      lynx::low_rank_value<lynx::Bf16>(3.0f, 0.0f) == 0 && lynx::low_rank_value<lynx::Bf16>(3.0f, NAN) == 0,
      "U is 0 where the scale is 0 or NaN");
  report(lynx::low_rank_value<lynx::Bf16>(3.0f, 1.5f) == 0x4000, "U is T / s");
}

void check_padding() {
  report(lynx::padded_width(192, 16) == 256 && lynx::padded_width(192, 0) == 192 &&
             lynx::padded_width(208, 0) == 256 && lynx::padded_width(15360, 128) == 15616,
         "padded width");
  report(lynx::padded_rows(1) == 64 && lynx::padded_rows(64) == 64 && lynx::padded_rows(4609) == 4672,
         "padded rows");
}

}  // namespace

int main() {
  check_conversions<lynx::Bf16>(kBf16Format, reference::bf16(), "bf16");
  check_conversions<lynx::Fp16>(kFp16Format, reference::fp16(), "fp16");
  check_blocks<lynx::Bf16>(kBf16Format, "bf16");
  check_blocks<lynx::Fp16>(kFp16Format, "fp16");
  for (const int64_t rows : {64, 192}) {
    for (const int64_t width : {64, 192, 320}) {
      const auto title = [&](const char* name) {
        return std::string(name) + " metadata of " + std::to_string(rows) + " x " + std::to_string(width);
      };
      check_layout<lynx::Sm80Metadata>(
          rows, width, [&](int64_t m, int64_t b) { return reference::sm80_index(m, b, rows); },
          title("sm_80").c_str());
      check_layout<lynx::Sm90Metadata<64>>(
          rows, width, [&](int64_t m, int64_t b) { return reference::sm90_index(m, b, rows, 64); },
          title("sm_90, 64").c_str());
      check_layout<lynx::Sm90Metadata<128>>(
          rows, width, [&](int64_t m, int64_t b) { return reference::sm90_index(m, b, rows, 128); },
          title("sm_90, 128").c_str());
    }
  }
  check_scale();
  check_padding();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
