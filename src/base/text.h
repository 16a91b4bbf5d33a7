// SPDX-License-Identifier: Apache-2.0
#pragma once

#if __has_include(<fmt/base.h>)
#include <fmt/base.h>
#else  // before fmt 11
#include <fmt/core.h>
#endif

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

// Formatting by fmt. Its implementation is compiled only in text.cpp, since it would take a third of every file's compile time.
namespace xattn::detail {

std::string vformatted(fmt::string_view format, fmt::format_args arguments);

/// Calls the argument if it is a function, and otherwise returns it. A function delays the writing of a text until a message
/// needs it.
template <typename T>
decltype(auto) evaluated(T&& argument) {
  if constexpr (std::is_invocable_v<T>) {
    return argument();
  } else {
    return std::forward<T>(argument);
  }
}

/// A format for these arguments as they are shown, checked when compiled.
template <typename... Args>
using Format = fmt::format_string<std::remove_cvref_t<decltype(evaluated(std::declval<Args>()))>...>;

/// Like fmt::format, and also for a format given as fmt::runtime.
template <typename... Args>
std::string formatted(Format<Args...> format, Args&&... args) {
  fmt::string_view text;
  if constexpr (requires { format.get(); }) {  // since fmt 10; later versions deprecate the conversion
    text = format.get();
  } else {
    text = format;
  }
  const auto write = [text](auto&&... each) { return vformatted(text, fmt::make_format_args(each...)); };
  return write(evaluated(std::forward<Args>(args))...);
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
