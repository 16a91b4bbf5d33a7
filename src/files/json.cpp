// SPDX-License-Identifier: Apache-2.0
#include "files/json.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <system_error>
#include <utility>

#include "base/printed.h"
#include "files/json_reader.h"

namespace xattn::detail {
namespace {

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxValues = 2'000'000;

// Builds the tree of a document.
class JsonBuilder {
 public:
  JsonBuilder(std::string_view text, const FileCheck& check) : check_(check), reader_(text, check) {}

  Json document() {
    auto json = value(0);
    reader_.end();
    return json;
  }

 private:
  Json value(size_t depth) {
    const char first = reader_.next();
    check_(depth < kMaxDepth || (first != '{' && first != '['), "is nested deeper than {} levels", kMaxDepth);
    check_(++values_ <= kMaxValues, "has more than {} values", kMaxValues);
    switch (first) {
      case '{': return {object(depth)};
      case '[': return {list(depth)};
      case '"': return {reader_.string()};
      case 'n': return reader_.word("null"), Json{nullptr};
      case 't': return reader_.word("true"), Json{true};
      case 'f': return reader_.word("false"), Json{false};
      default: return {Json::Number{std::string(reader_.number())}};
    }
  }

  Json::Object object(size_t depth) {
    Json::Object object;
    reader_.object([&](std::string name) {
      const auto [place, is_new] = object.try_emplace(std::move(name));
      check_(is_new, "has the name {} twice in one object", [&own = place] { return in_quotes(own->first); });
      place->second = value(depth + 1);
    });
    return object;
  }

  Json::List list(size_t depth) {
    Json::List list;
    reader_.list([&] { list.push_back(value(depth + 1)); });
    return list;
  }

  const FileCheck& check_;
  JsonReader reader_;
  size_t values_ = 0;
};

// Whether a number beyond the range of double is too close to 0, rather than too large.
bool is_tiny(std::string_view text) {
  const auto end = std::min(text.find_first_of("eE"), text.size());
  const auto point = std::min(text.find('.'), end), first = text.find_first_of("123456789");
  const auto digits = static_cast<int64_t>(point) - static_cast<int64_t>(first);  // before the point; below 0, zeros behind it
  auto exponent = text.substr(std::min(end + 1, text.size()));
  if (exponent.starts_with('+')) exponent.remove_prefix(1);
  const auto power = exponent.empty() ? 0 : json_number<int64_t>(exponent);
  return power ? *power < -digits : exponent.starts_with('-');
}

}  // namespace

void append_utf8(std::string& text, char32_t code) {
  const auto put = [&text](char32_t byte) { text += static_cast<char>(byte); };
  if (code < 0x80) return put(code);
  const int following = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  put((0xff00U >> (following + 1) & 0xffU) | code >> 6 * following);  // as many leading ones as bytes
  for (int i = following - 1; i >= 0; --i) put(0x80U | (code >> 6 * i & 0x3fU));
}

template <class T>
std::optional<T> json_number(std::string_view text) {
  T number{};
  const auto *begin = text.data(), *end = begin + text.size();
  const auto [parsed, error] = std::from_chars(begin, end, number);
  const bool becomes_zero = std::is_same_v<T, double> && error == std::errc::result_out_of_range && is_tiny(text);
  return parsed == end && (error == std::errc() || becomes_zero) ? std::optional(number) : std::nullopt;
}

template std::optional<int64_t> json_number(std::string_view text);
template std::optional<uint64_t> json_number(std::string_view text);
template std::optional<double> json_number(std::string_view text);

std::optional<std::string> json_string(std::string_view text) {
  bool is_valid = true;
  const auto escaped = rewritten(text, [&is_valid](const Character& character) -> std::string {
    is_valid = is_valid && character.valid;
    const auto code = character.code;
    if (code == '"' || code == '\\') return {'\\', static_cast<char>(code)};
    return code < 0x20 ? "\\u" + hexadecimal(code, 4) : "";
  });
  return is_valid ? std::optional('"' + escaped + '"') : std::nullopt;
}

const Json* Json::find(std::string_view place) const {
  const auto* found = this;
  while (found && !place.empty()) {
    const auto name = place.substr(0, place.find('/'));
    place.remove_prefix(std::min(place.size(), name.size() + 1));
    const Json* inner = nullptr;
    if (const auto* names = found->object()) {
      const auto entry = names->find(name);
      if (entry != names->end()) inner = &entry->second;
    } else if (const auto* elements = found->list()) {
      const auto i = json_number<uint64_t>(name);
      if (i && *i < elements->size()) inner = &(*elements)[*i];
    }
    found = inner;
  }
  return found;
}

std::string Json::text() const {
  const auto quoted = [](const std::string& string) { return json_string(string).value(); };
  if (const auto* truth = std::get_if<bool>(&value)) return *truth ? "true" : "false";
  if (const auto* number = std::get_if<Number>(&value)) return number->text;
  if (const auto* string = std::get_if<std::string>(&value)) return quoted(*string);
  std::vector<std::string> parts;
  if (list()) {
    for (const auto& element : *list()) parts.push_back(element.text());
    return formatted("[{}]", joined(parts, ","));
  }
  if (!object()) return "null";
  for (const auto& [name, element] : *object()) parts.push_back(formatted("{}:{}", quoted(name), element.text()));
  return formatted("{{{}}}", joined(parts, ","));
}

Json parse_json(std::string_view reader, const std::string& path, Bytes text, size_t most) {
  const FileCheck check(reader, path);
  check(text.size() <= most, "has {} bytes of JSON, more than the limit of {}", text.size(), most);
  return JsonBuilder(as_text(text), check).document();
}

}  // namespace xattn::detail
