// SPDX-License-Identifier: Apache-2.0
#pragma once

#if __has_include(<fmt/base.h>)
#include <fmt/base.h>
#else  // before fmt 11
#include <fmt/core.h>
#endif

#include <string>
#include <string_view>

// Formatting by fmt. Its implementation is compiled only in text.cpp, since it would take a third of every file's compile time.
namespace xattn::detail {

std::string vformatted(fmt::string_view format, fmt::format_args arguments);

/// Like fmt::format, and also for a format given as fmt::runtime.
template <typename... Args>
std::string formatted(fmt::format_string<Args...> format, Args&&... args) {
  return vformatted(format, fmt::make_format_args(args...));
}

/// The elements with separators between them: "2, 6, 128".
template <typename Range>
std::string joined(const Range& elements, std::string_view separator = ", ") {
  std::string text;
  bool first = true;
  for (const auto& element : elements) {
    if (!first) text += separator;
    text += formatted("{}", element);
    first = false;
  }
  return text;
}

}  // namespace xattn::detail
