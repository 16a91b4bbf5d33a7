// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/file_error.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text.h"

// How the library refuses a file: "[reader] path: what was expected and what came", always one line.
namespace xattn::detail {

/// `text` with its control characters escaped: names come from files, and must not break the line or drive the terminal.
std::string one_line(std::string_view text);

/// In double quotes, as JSON: names come from files, and may hold anything.
std::string in_quotes(std::string_view text);

/// Throws FileError with "[reader] path: message".
template <typename... Args>
[[noreturn]] void fail_file(std::string_view reader,
                            std::string_view path,
                            fmt::format_string<Args...> format,
                            Args&&... args) {
  const auto message = formatted(format, std::forward<Args>(args)...);
  throw FileError(one_line(formatted("[{}] {}: {}", reader, path, message)));
}

/// The same unless `ok`. The message is only formatted when it is needed.
template <typename... Args>
void check_file(bool ok, std::string_view reader, std::string_view path, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) {
    fail_file(reader, path, format, std::forward<Args>(args)...);
  }
}

/// "; missing: a, b", or nothing if there are none.
std::string list(std::string_view what, const std::vector<std::string>& names);

/// What the operating system said last: "No such file or directory".
std::string system_reason();

}  // namespace xattn::detail
