// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <string_view>

// Printing of text that comes from files: names, metadata, words of a grammar, and errors that quote them. Printed text is
// short, stays on one line, and cannot control a terminal. Header only: programs use it without the library.
namespace xattn::detail {

inline constexpr size_t kMostOfName = 200;        ///< bytes that are printed of a name or other text from a file
inline constexpr size_t kMostOfMessage = 20'000;  ///< bytes of a whole message, which may list names

/// A character of a text in UTF-8. A byte that is not UTF-8 is an invalid character of one byte.
struct Character {
  char32_t code;
  size_t bytes;
  bool valid;
};

inline Character first_character(std::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<unsigned char>(text[i]); };
  const char32_t first = byte(0);
  if (first < 0x80) return {first, 1, true};
  const Character invalid = {first, 1, false};
  const size_t bytes = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || bytes > text.size()) return invalid;
  char32_t code = first & (0x7fU >> bytes);
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0U) != 0x80) return invalid;
    code = code << 6 | (byte(i) & 0x3fU);
  }
  constexpr std::array<char32_t, 5> kLeast = {0, 0, 0x80, 0x800, 0x10000};
  if (code < kLeast.at(bytes) || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return invalid;
  return {code, bytes, true};
}

/// Whether a character controls a terminal or reorders its output: C0, DEL, C1, ends of lines and paragraphs, and the
/// bidirectional controls of Unicode (UAX #9, section 2).
inline bool is_control(char32_t code) {
  return code < 0x20 || (code >= 0x7f && code <= 0x9f) || code == 0x61c || code == 0x200e || code == 0x200f ||
         (code >= 0x2028 && code <= 0x202e) || (code >= 0x2066 && code <= 0x206f);
}

/// The text with other texts in place of some characters: `instead(character)` is the other one, or empty to keep it.
template <class Instead>
std::string rewritten(std::string_view text, const Instead& instead) {
  std::string result;
  while (!text.empty()) {
    const auto character = first_character(text);
    const std::string other = instead(character);
    result += other.empty() ? text.substr(0, character.bytes) : std::string_view(other);
    text.remove_prefix(character.bytes);
  }
  return result;
}

/// The last digits of a code: "1b" for 27 and two digits.
inline std::string hexadecimal(char32_t code, int digits) {
  std::string text;
  for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4) text += "0123456789abcdef"[code >> shift & 0xfU];
  return text;
}

/// The longest prefix of at most `most` bytes that ends with a whole character.
inline std::string_view beginning(std::string_view text, size_t most) {
  if (text.size() <= most) return text;
  size_t size = most;
  const auto continues = [text](size_t i) { return (static_cast<unsigned char>(text[i]) & 0xc0U) == 0x80; };
  for (int i = 0; i < 3 && size > 0 && continues(size); ++i) --size;
  return text.substr(0, size);
}

/// The text itself if it has at most `most` bytes; else its beginning, its end, and the number of bytes left out between them.
inline std::string shortened(std::string_view text, size_t most) {
  if (text.size() <= most) return std::string(text);
  const auto head = beginning(text, most - most / 4);
  auto tail = text.substr(text.size() - most / 4);
  while (!tail.empty() && (static_cast<unsigned char>(tail[0]) & 0xc0U) == 0x80) tail.remove_prefix(1);
  return std::string(head) + " ... (" + std::to_string(text.size() - head.size() - tail.size()) + " bytes left out) ... " +
         std::string(tail);
}

/// A message as it is printed: shortened to kMostOfMessage, controls as "\x1b" or "\u202e", bytes that are not UTF-8 as "\xff".
inline std::string one_line(std::string_view text) {
  return rewritten(shortened(text, kMostOfMessage), [](const Character& character) -> std::string {
    const auto [code, bytes, valid] = character;
    if (!valid || (is_control(code) && code < 0x80)) return "\\x" + hexadecimal(code, 2);
    return is_control(code) ? "\\u" + hexadecimal(code, 4) : "";
  });
}

/// A name without quotes: shortened to `most` bytes, and escaped as by `one_line`.
inline std::string shown(std::string_view text, size_t most = kMostOfName) {
  return one_line(shortened(text, most));
}

/// A name as a JSON string with controls escaped; a long name is cut, with its length in bytes after the quotes.
inline std::string in_quotes(std::string_view text) {
  const auto escaped = rewritten(beginning(text, kMostOfName), [](const Character& character) -> std::string {
    constexpr std::string_view kEscaped = "\"\\\b\f\n\r\t";
    const auto [code, bytes, valid] = character;
    if (!valid) return "\xef\xbf\xbd";  // U+FFFD, the replacement character
    const auto escape = code < 0x80 ? kEscaped.find(static_cast<char>(code)) : std::string_view::npos;
    if (escape != std::string_view::npos) return {'\\', "\"\\bfnrt"[escape]};
    return is_control(code) ? "\\u" + hexadecimal(code, 4) : "";
  });
  const auto quoted = '"' + escaped + '"';
  return text.size() <= kMostOfName ? quoted : quoted + " (" + std::to_string(text.size()) + " bytes)";
}

/// A whole JSON document of the same value, with the controls in its strings escaped. REQUIRES: valid JSON in UTF-8.
inline std::string printed_json(std::string_view json) {
  return rewritten(json, [](const Character& character) {
    return is_control(character.code) && character.code >= 0x7f ? "\\u" + hexadecimal(character.code, 4) : "";
  });
}

}  // namespace xattn::detail
