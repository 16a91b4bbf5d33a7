// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "base/printed.h"
#include "files/check_file.h"
#include "files/json.h"

namespace xattn::detail {

/// Reads a document value by value, and keeps none of them. `next` shows which kind comes next, and the caller reads one of that
/// kind; so the caller limits the depth. Each function throws through `check` where the text is not JSON in UTF-8; `what` begins
/// the reason, as in "header ".
class JsonReader {
 public:
  JsonReader(std::string_view text, const FileCheck& check, std::string_view what = "")
      : text_(text), check_(check), what_(what) {
    if (text_.starts_with("\xef\xbb\xbf")) at_ = 3;  // a byte order mark
  }

  /// The first character of the next value.
  char next() {
    skip_spaces();
    if (std::string_view("{[\"-0123456789ntf").find(here()) == std::string_view::npos) fail();
    return here();
  }

  /// Reads an object: `value(name)` must read the value of each name.
  template <class Value>
  void object(const Value& value) {
    items('{', '}', [&] {
      skip_spaces();
      auto name = string();
      skip_spaces();
      take(':');
      value(std::move(name));
    });
  }

  /// Reads a list: `value()` must read each element.
  template <class Value>
  void list(const Value& value) {
    items('[', ']', value);
  }

  void word(std::string_view expected) {
    for (const char c : expected) take(c);
  }

  std::string_view number() {  ///< see `json_number`
    const auto begin = at_;
    skip('-');
    if (!skip('0')) digits();
    if (skip('.')) digits();
    if (skip('e') || skip('E')) {
      if (!skip('+')) skip('-');
      digits();
    }
    const auto text = text_.substr(begin, at_ - begin);
    if (!json_number<double>(text)) {
      --at_;
      fail();
    }
    return text;
  }

  std::string string() {
    take('"');
    std::string value;
    while (!skip('"')) {
      if (skip('\\')) {
        append_escaped(value);
        continue;
      }
      const auto rest = text_.substr(at_);
      if (rest.empty()) fail();
      const auto [code, bytes, valid] = first_character(rest);
      if (!valid || code < 0x20) fail();
      value += rest.substr(0, bytes);
      at_ += bytes;
    }
    return value;
  }

  /// Throws if anything but spaces follows.
  void end() {
    skip_spaces();
    if (at_ != text_.size()) fail();
  }

 private:
  [[noreturn]] void fail() const { check_.fail("{}is not JSON in UTF-8, at its byte {}", what_, at_ + 1); }

  // Zero at the end, and a zero byte is nowhere allowed.
  char here() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool skip(char c) {
    const bool found = here() == c;
    if (found) ++at_;
    return found;
  }

  void take(char c) {
    if (!skip(c)) fail();
  }

  void skip_spaces() {
    while (skip(' ') || skip('\n') || skip('\r') || skip('\t')) {
    }
  }

  template <class Item>
  void items(char open, char close, const Item& item) {
    take(open);
    skip_spaces();
    for (bool first = true; !skip(close); first = false) {
      if (!first) take(',');
      item();
      skip_spaces();
    }
  }

  static bool is_digit(char c) { return c >= '0' && c <= '9'; }

  void digits() {
    if (!is_digit(here())) fail();
    while (is_digit(here())) ++at_;
  }

  void append_escaped(std::string& value) {
    constexpr std::string_view kNames = R"("\/bfnrt)", kMeanings = "\"\\/\b\f\n\r\t";
    if (const auto i = kNames.find(here()); i != std::string_view::npos) {
      value += kMeanings[i];
      ++at_;
      return;
    }
    auto code = utf16_unit();
    if (code >= 0xdc00 && code < 0xe000) fail();
    if (code >= 0xd800 && code < 0xdc00) {
      take('\\');
      const auto low = utf16_unit();
      if (low < 0xdc00 || low >= 0xe000) fail();
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    append_utf8(value, code);
  }

  char32_t utf16_unit() {
    take('u');
    char32_t unit = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = here(), small = static_cast<char>(c | 0x20);
      if (!is_digit(c) && (small < 'a' || small > 'f')) fail();
      unit = unit << 4 | static_cast<char32_t>(is_digit(c) ? c - '0' : small - 'a' + 10);
    }
    return unit;
  }

  std::string_view text_;
  const FileCheck& check_;
  std::string_view what_;
  size_t at_ = 0;
};

}  // namespace xattn::detail
