// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <string_view>
#include <system_error>

#include "check_file.h"

namespace xattn::detail {

/// Lets `write` fill a new file beside `path` through the std::ostream& it is given, and renames it: `path` holds either what
/// it held before or the whole new file. Throws FileError if that cannot be; leaves nothing behind, whatever is thrown.
template <typename Write>
void write_beside(std::string_view reader, const std::string& path, Write&& write) {
  std::error_code error;
  const auto there = std::filesystem::status(path, error);
  check_file(!exists(there) || is_regular_file(there), reader, path, "is there, but is not a regular file");
  const std::string beside = fmt::format("{}.{:08x}.tmp", path, std::random_device{}());
  try {
    std::ofstream out(beside, std::ios::binary);
    check_file(out.is_open(), reader, path, "cannot be written: {}", system_reason());
    write(out);
    out.close();
    check_file(out.good(), reader, path, "cannot be written: {}", system_reason());
    std::filesystem::rename(beside, path, error);
    check_file(!error, reader, path, "cannot be written: {}", error.message());
  } catch (...) {
    std::filesystem::remove(beside, error);
    throw;
  }
}

}  // namespace xattn::detail
