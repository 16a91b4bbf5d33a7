// SPDX-License-Identifier: Apache-2.0
#include "files/json.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <system_error>
#include <utility>

#include "base/printed.h"

namespace xattn::detail {
namespace {

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxValues = 2'000'000;

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

// A parser by recursive descent.
class JsonReader {
 public:
  JsonReader(std::string_view text, const FileCheck& check, std::string_view what, JsonEvents& events)
      : text_(text), check_(check), what_(what), events_(events) {}

  void document() {
    if (text_.starts_with("\xef\xbb\xbf")) at_ = 3;  // a byte order mark
    value();
    skip_spaces();
    if (at_ != text_.size()) fail();
  }

 private:
  [[noreturn]] void fail() const { check_.fail("{}is not JSON in UTF-8, at its byte {}", what_, at_ + 1); }

  // Zero at the end, and a zero byte is nowhere allowed.
  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool skip(char c) {
    const bool found = next() == c;
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

  void value() {
    skip_spaces();
    switch (next()) {
      case '{': object(); break;
      case '[': list(); break;
      case '"': events_.string(string()); break;
      case 'n':
        word("null");
        events_.null();
        break;
      case 't':
        word("true");
        events_.boolean(true);
        break;
      case 'f':
        word("false");
        events_.boolean(false);
        break;
      default: events_.number(number());
    }
    skip_spaces();
  }

  void object() {
    take('{');
    events_.start_object();
    skip_spaces();
    for (bool first = true; !skip('}'); first = false) {
      if (!first) take(',');
      skip_spaces();
      events_.key(string());
      skip_spaces();
      take(':');
      value();
    }
    events_.end_object();
  }

  void list() {
    take('[');
    events_.start_list();
    skip_spaces();
    for (bool first = true; !skip(']'); first = false) {
      if (!first) take(',');
      value();
    }
    events_.end_list();
  }

  void word(std::string_view expected) {
    for (const char c : expected) take(c);
  }

  std::string_view number() {
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

  void digits() {
    if (!is_digit(next())) fail();
    while (is_digit(next())) ++at_;
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

  void append_escaped(std::string& value) {
    constexpr std::string_view kNames = R"("\/bfnrt)", kMeanings = "\"\\/\b\f\n\r\t";
    if (const auto i = kNames.find(next()); i != std::string_view::npos) {
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
      const char c = next(), small = static_cast<char>(c | 0x20);
      if (!is_digit(c) && (small < 'a' || small > 'f')) fail();
      unit = unit << 4 | static_cast<char32_t>(is_digit(c) ? c - '0' : small - 'a' + 10);
    }
    return unit;
  }

  std::string_view text_;
  FileCheck check_;
  std::string_view what_;
  JsonEvents& events_;
  size_t at_ = 0;
};

class JsonBuilder : public JsonEvents {
 public:
  explicit JsonBuilder(const FileCheck& check) : check_(check) {}

  Json document;

  void null() override { add(nullptr); }
  void boolean(bool value) override { add(value); }
  void number(std::string_view text) override { add(Json::Number{std::string(text)}); }
  void string(std::string value) override { add(std::move(value)); }
  void start_object() override { open(Json::Object()); }
  void start_list() override { open(Json::List()); }
  void end_object() override { open_.pop_back(); }
  void end_list() override { open_.pop_back(); }

  void key(std::string name) override {
    const auto [place, is_new] = std::get<Json::Object>(open_.back()->value).try_emplace(std::move(name));
    check_(is_new, "has the name {} twice in one object", in_quotes(place->first));
    value_ = &place->second;
  }

 private:
  void add(Json::Value value) {
    check_(++values_ <= kMaxValues, "has more than {} values", kMaxValues);
    if (!open_.empty()) {
      if (auto* list = std::get_if<Json::List>(&open_.back()->value)) value_ = &list->emplace_back();
    }
    value_->value = std::move(value);
  }

  void open(Json::Value container) {
    check_(open_.size() < kMaxDepth, "is nested deeper than {} levels", kMaxDepth);
    add(std::move(container));
    open_.push_back(value_);
  }

  FileCheck check_;
  size_t values_ = 0;
  std::vector<Json*> open_;  // objects and lists, from the outermost
  Json* value_ = &document;  // where the next value goes, unless that is the end of a list
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

void read_json(std::string_view text, const FileCheck& check, std::string_view what, JsonEvents& events) {
  JsonReader(text, check, what, events).document();
}

Json parse_json(std::string_view reader, const std::string& path, Bytes text, size_t most) {
  const FileCheck check(reader, path);
  check(text.size() <= most, "has {} bytes of JSON, more than the limit of {}", text.size(), most);
  JsonBuilder builder(check);
  read_json(as_text(text), check, "", builder);
  return std::move(builder.document);
}

}  // namespace xattn::detail
