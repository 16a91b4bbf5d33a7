// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/file_error.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/printed.h"
#include "base/text.h"

// How the library refuses a file: "[reader] path: what was expected and what came", always one line, and never a long one.
namespace xattn::detail {

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

/// "; missing: a, b", or nothing if there are none; of more than a hundred the first, and how many more there are.
std::string list(std::string_view what, const std::vector<std::string>& names);

/// What the operating system said last: "No such file or directory".
std::string system_reason();

}  // namespace xattn::detail
