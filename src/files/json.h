// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "files/mapped_file.h"

// JSON (RFC 8259), so that the library needs no other for it.
namespace xattn::detail {

/// A number of a document as int64_t, uint64_t or double; nothing if T does not hold it, as an integer type does not hold one
/// with a point or an exponent.
template <class T>
std::optional<T> json_number(std::string_view text);

/// Appends a character in UTF-8.
void append_utf8(std::string& text, char32_t code);

/// The text as a JSON string, with its quotes; nothing if it is not UTF-8.
std::optional<std::string> json_string(std::string_view text);

/// A value of a document.
struct Json {
  using List = std::vector<Json>;
  using Object = std::map<std::string, Json, std::less<>>;
  struct Number {
    std::string text;
  };
  using Value = std::variant<std::nullptr_t, bool, Number, std::string, List, Object>;

  Value value = nullptr;

  const List* list() const { return std::get_if<List>(&value); }
  const Object* object() const { return std::get_if<Object>(&value); }

  /// The value as bool, int64_t, uint64_t, double or std::string; nothing if it is none.
  template <class T>
  std::optional<T> as() const {
    if constexpr (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>) {
      const auto* number = std::get_if<Number>(&value);
      return number ? json_number<T>(number->text) : std::nullopt;
    } else {
      const auto* found = std::get_if<T>(&value);
      return found ? std::optional<T>(*found) : std::nullopt;
    }
  }

  /// The value at a place in objects and lists, as in "outer/inner/0"; null if there is none.
  const Json* find(std::string_view place) const;

  /// As a document without spaces, the names of each object in order.
  std::string text() const;
};

inline constexpr size_t kMaxJson = 100'000'000;  ///< bytes: the index of a sharded set of a million tensors

/// Parses a JSON document from a file. Throws FileError, with "[reader] path: reason", unless it is valid JSON in UTF-8 of at
/// most `most` bytes, two million values and 32 levels, in which no object has a name twice. Takes up to about thirty times its
/// length in memory, and about 200 bytes for each value besides the texts.
XATTN_API Json parse_json(std::string_view reader, const std::string& path, Bytes text, size_t most = kMaxJson);

}  // namespace xattn::detail
