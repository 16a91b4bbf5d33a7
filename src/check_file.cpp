// SPDX-License-Identifier: Apache-2.0
#include "check_file.h"

#include <cerrno>
#include <nlohmann/json.hpp>
#include <system_error>

namespace xattn::detail {

std::string one_line(std::string_view text) {
  std::string line;
  for (char c : text) {
    if (const auto code = static_cast<unsigned char>(c); code < 0x20 || code == 0x7f) {
      line += formatted("\\x{:02x}", code);
    } else {
      line += c;
    }
  }
  return line;
}

std::string in_quotes(std::string_view text) {
  using Json = nlohmann::json;
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string list(std::string_view what, const std::vector<std::string>& names) {
  return names.empty() ? "" : formatted("; {}: {}", what, joined(names));
}

std::string system_reason() {
  return std::generic_category().message(errno);
}

}  // namespace xattn::detail
