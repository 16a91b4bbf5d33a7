// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace xattn::test {

inline uint32_t crc32_of(std::string_view bytes) {
  uint32_t crc = ~0U;
  for (const char byte : bytes) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xedb88320U : 0U);
  }
  return ~crc;
}

/// The low `size` bytes of a number, the lowest first.
inline std::string little_endian(uint64_t value, size_t size) {
  std::string bytes;
  for (size_t i = 0; i < size; ++i) bytes += static_cast<char>(value >> (8 * i) & 0xffU);
  return bytes;
}

/// A zip archive of entries (name, bytes) in this order, all stored: not compressed, no zip64.
inline std::string zip_of(const std::vector<std::pair<std::string, std::string>>& entries) {
  std::string file;
  std::string directory;
  for (const auto& [name, bytes] : entries) {
    // Version needed, flags (names in UTF-8), method, time, date (1980-01-01), CRC, both sizes, length of name and extra field.
    const auto common = little_endian(10, 2) + little_endian(0x800, 2) + little_endian(0, 2) + little_endian(0, 2) +
                        little_endian(0x21, 2) + little_endian(crc32_of(bytes), 4) + little_endian(bytes.size(), 4) +
                        little_endian(bytes.size(), 4) + little_endian(name.size(), 2) + little_endian(0, 2);
    // Version made by; comment, disk, attributes inside and outside, offset.
    directory += "PK\1\2" + little_endian(10, 2) + common + std::string(10, '\0') + little_endian(file.size(), 4) + name;
    file += "PK\3\4" + common + name + bytes;
  }
  // Two disk numbers, entries on this disk and in all, size and offset of the directory, length of the comment.
  return file + directory + "PK\5\6" + std::string(4, '\0') + little_endian(entries.size(), 2) +
         little_endian(entries.size(), 2) + little_endian(directory.size(), 4) + little_endian(file.size(), 4) +
         std::string(2, '\0');
}

}  // namespace xattn::test
