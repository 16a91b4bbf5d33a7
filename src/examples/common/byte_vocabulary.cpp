// SPDX-License-Identifier: Apache-2.0
#include "common/byte_vocabulary.h"

#include <fmt/format.h>
#include <xattn/file_error.h>

#include <nlohmann/json.hpp>
#include <string_view>

#include "base/printed.h"
#include "common/json_file.h"

namespace examples {
namespace {

bool is_mark(const std::string& text) {
  return text.starts_with("<|") && text.ends_with("|>");
}

// Byte-level vocabularies spell each byte as a printable character: those of Latin-1 as themselves, and the others, in their
// order, as the characters from U+0100 on.
std::map<char32_t, char> bytes_of_characters() {
  std::map<char32_t, char> bytes;
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 0x100; ++byte) {
    const bool printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
    bytes[printable ? byte : next++] = static_cast<char>(byte);
  }
  return bytes;
}

std::string from_spelling(std::string_view spelling) {
  static const auto bytes = bytes_of_characters();
  std::string text;
  while (!spelling.empty()) {
    const auto character = xattn::detail::first_character(spelling);
    const auto byte = bytes.find(character.code);
    text += byte != bytes.end() ? std::string(1, byte->second) : std::string(spelling.substr(0, character.bytes));
    spelling.remove_prefix(character.bytes);
  }
  return text;
}

}  // namespace

ByteVocabulary::ByteVocabulary(const std::string& folder) {
  using Spelled = std::map<std::string, int64_t>;
  Spelled spelled;
  const JsonFile tokenizer(folder, "tokenizer.json"), vocabulary(folder, "vocab.json"), added(folder, "added_tokens.json");
  path_ = tokenizer ? tokenizer.path() : vocabulary.path();
  tokenizer.read([&](const nlohmann::json& json) {
    json.at("model").at("vocab").get_to(spelled);
    for (const auto& mark : json.value("added_tokens", nlohmann::json::array())) spelled[mark.at("content")] = mark.at("id");
  });
  for (const auto* file : {&vocabulary, &added}) {
    if (!tokenizer) file->read([&](const nlohmann::json& json) { spelled.merge(json.get<Spelled>()); });
  }
  if (spelled.empty()) {
    throw xattn::FileError(fmt::format("{}: it must hold a tokenizer, tokenizer.json or vocab.json, but does not", folder));
  }
  for (const auto& [spelling, token] : spelled) {
    const auto text = is_mark(spelling) ? spelling : from_spelling(spelling);
    texts_[token] = text;
    tokens_[text] = token;
  }
}

std::string ByteVocabulary::text(const Tokens& tokens) const {
  std::string text;
  for (const auto token : tokens) {
    const auto found = texts_.find(token);
    if (found != texts_.end() && !is_mark(found->second)) text += found->second;
  }
  return text;
}

std::optional<int64_t> ByteVocabulary::find(const std::string& text) const {
  const auto found = tokens_.find(text);
  return found != tokens_.end() ? std::optional(found->second) : std::nullopt;
}

int64_t ByteVocabulary::at(const std::string& text) const {
  const auto token = find(text);
  if (!token) throw xattn::FileError(fmt::format("{}: it must have a token {}, but has none", path_, text));
  return *token;
}

std::map<std::string, int64_t> ByteVocabulary::marks_between(int64_t first, int64_t last) const {
  std::map<std::string, int64_t> marks;
  for (auto found = texts_.upper_bound(first); found != texts_.end() && found->first < last; ++found) {
    const auto& [token, text] = *found;
    if (is_mark(text)) marks[text.substr(2, text.size() - 4)] = token;
  }
  return marks;
}

}  // namespace examples
