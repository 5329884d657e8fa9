// SPDX-License-Identifier: Apache-2.0
#include "host_code.h"

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lynx/engine.h"
#include "sha256.h"

namespace lynx {
namespace {

constexpr uint16_t kCudaMachine = 190;  // EM_CUDA: code for the GPU

// Whether host code of some machine begins at `file`, 64 bytes of which are there. What the ELF specification
// fixes is compared, so that no random bytes pass for it.
bool is_host_code(const Elf64_Ehdr& header) {
  const unsigned char* const ident = header.e_ident;
  const bool known_class = ident[EI_CLASS] == ELFCLASS32 || ident[EI_CLASS] == ELFCLASS64;
  const bool known_order = ident[EI_DATA] == ELFDATA2LSB || ident[EI_DATA] == ELFDATA2MSB;
  const bool padded = std::all_of(ident + EI_PAD, ident + EI_NIDENT, [](unsigned char c) { return c == 0; });
  return known_class && known_order && ident[EI_VERSION] == EV_CURRENT && padded &&
         header.e_machine != kCudaMachine;
}

// Bytes of a 64-bit library: linkers put the table of sections last. 0 where that cannot be.
uint64_t library_bytes(const Elf64_Ehdr& header, uint64_t room) {
  const uint64_t table = uint64_t(header.e_shnum) * header.e_shentsize;
  const bool fits = header.e_ident[EI_CLASS] == ELFCLASS64 && table > 0 && header.e_shoff <= room &&
                    table <= room - header.e_shoff;
  return fits ? header.e_shoff + table : 0;
}

}  // namespace

int check_host_code(const std::string& path, const std::byte* plan, size_t bytes, const std::string& digest) {
  const std::byte* at = plan;
  const std::byte* const end = plan + bytes;
  int copies = 0;
  while (size_t(end - at) >= sizeof(Elf64_Ehdr)) {
    at = static_cast<const std::byte*>(memmem(at, size_t(end - at), ELFMAG, SELFMAG));
    if (at == nullptr || size_t(end - at) < sizeof(Elf64_Ehdr)) break;
    Elf64_Ehdr header;
    std::memcpy(&header, at, sizeof header);
    if (!is_host_code(header)) {
      at += SELFMAG;
      continue;
    }
    const uint64_t library = library_bytes(header, uint64_t(end - at));
    if (library == 0 || sha256(at, size_t(library)) != digest) {
      throw Error(path + " carries host code that is not the plugin library of SHA-256 " +
                      digest.substr(0, 12) + "....",
                  "Do not load it; compile it again.");
    }
    ++copies;
    at += library;
  }
  return copies;
}

}  // namespace lynx
