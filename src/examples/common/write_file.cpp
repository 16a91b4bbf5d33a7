// SPDX-License-Identifier: Apache-2.0
#include "write_file.h"

#include <fmt/format.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <system_error>

namespace examples {

void write_file(const std::string& path, std::string_view bytes) {
  const auto check = [&path](bool ok, const std::string& reason) {
    if (!ok) {
      throw std::runtime_error(fmt::format("cannot write {}: {}", path, reason));
    }
  };
  const auto system_reason = [] { return std::generic_category().message(errno); };

  std::error_code error;
  const auto there = std::filesystem::status(path, error);
  check(!exists(there) || is_regular_file(there), "it is there, but is not a regular file");
  const auto beside = fmt::format("{}.{:08x}.tmp", path, std::random_device{}());
  try {
    std::ofstream out(beside, std::ios::binary);
    check(out.is_open(), system_reason());
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    out.close();
    check(out.good(), system_reason());
    std::filesystem::rename(beside, path, error);
    check(!error, error.message());
  } catch (...) {
    std::filesystem::remove(beside, error);
    throw;
  }
}

void check_folder(const std::string& path) {
  const auto folder = std::filesystem::path(path).parent_path();
  if (!folder.empty() && !std::filesystem::is_directory(folder)) {
    throw std::runtime_error(fmt::format("cannot write {}: there is no folder {}", path, folder.string()));
  }
}

}  // namespace examples
