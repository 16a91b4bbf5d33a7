// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace examples {

using Tokens = std::vector<int64_t>;

/// The byte-level vocabulary of a model: a token stands for some bytes of a text in UTF-8, or for a mark such as "<|en|>".
/// Texts are only read from tokens here, never made into tokens, so that the order of merges is not needed.
class ByteVocabulary {
 public:
  /// Reads the tokenizer.json in this folder, or else its vocab.json and added_tokens.json. Throws xattn::FileError if there is
  /// neither, or one is damaged.
  explicit ByteVocabulary(const std::string& folder);

  /// The bytes of the text of these tokens; marks have none.
  std::string text(const Tokens& tokens) const;

  /// The token of a mark, or of a text that is one token.
  std::optional<int64_t> find(const std::string& text) const;

  /// The same, or xattn::FileError, naming the file.
  int64_t at(const std::string& text) const;

  /// The marks with tokens between these two, by what is between their bars: "en".
  std::map<std::string, int64_t> marks_between(int64_t first, int64_t last) const;

 private:
  std::string path_;
  std::map<int64_t, std::string> texts_;
  std::map<std::string, int64_t> tokens_;
};

}  // namespace examples
