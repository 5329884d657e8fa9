// SPDX-License-Identifier: Apache-2.0
#include "build_id.h"

#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstring>

namespace lynx {
namespace {

constexpr char kOwner[] = "GNU";

uintptr_t round_up_to_4(uintptr_t size) { return (size + 3) / 4 * 4; }

std::string hexadecimal(const unsigned char* bytes, size_t count) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (size_t i = 0; i < count; ++i) out += {kDigits[bytes[i] / 16], kDigits[bytes[i] % 16]};
  return out;
}

// The build ID among the notes from `at` on; empty where none is.
std::string find_note(uintptr_t at, uintptr_t end) {
  while (at + sizeof(ElfW(Nhdr)) <= end) {
    const auto& note = *reinterpret_cast<const ElfW(Nhdr)*>(at);
    const uintptr_t name = at + sizeof note, content = name + round_up_to_4(note.n_namesz);
    if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == sizeof kOwner &&
        std::memcmp(reinterpret_cast<const char*>(name), kOwner, sizeof kOwner) == 0) {
      return hexadecimal(reinterpret_cast<const unsigned char*>(content), note.n_descsz);
    }
    at = content + round_up_to_4(note.n_descsz);
  }
  return "";
}

bool holds_us(const dl_phdr_info& object) {
  const auto us = reinterpret_cast<uintptr_t>(&build_id);
  for (int i = 0; i < object.dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = object.dlpi_phdr[i];
    const uintptr_t begin = object.dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD && us >= begin && us < begin + segment.p_memsz) return true;
  }
  return false;
}

// Called for every object of the process, until it returns non-zero.
int visit(dl_phdr_info* object, size_t, void* found) {
  if (!holds_us(*object)) return 0;
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = object->dlpi_phdr[i];
    if (segment.p_type != PT_NOTE) continue;
    const uintptr_t begin = object->dlpi_addr + segment.p_vaddr;
    *static_cast<std::string*>(found) = find_note(begin, begin + segment.p_memsz);
    if (!static_cast<std::string*>(found)->empty()) return 1;
  }
  return 1;
}

}  // namespace

std::string build_id() {
  std::string found;
  dl_iterate_phdr(visit, &found);
  return found;
}

}  // namespace lynx
