// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/random.h"

// Sentences from an editable file. Its two kinds of lines, besides empty ones and comments (#):
//
//   slot cell 2: top right | upper right      what a phrase stands for
//   place: what is in the {cell}              one form of a kind; {cell} is any phrase of that slot
namespace examples {

using Words = std::vector<std::string>;

/// Whether a word of a form stands for any phrase of a slot: "{cell}".
bool is_slot(const std::string& word);

/// "What is left of the Seven?" -> {what, is, left, of, the, seven}. Commas are words, other marks are dropped.
Words split(const std::string& text);

/// The words with spaces between, but none before a comma.
std::string join(const Words& words);

/// What a program understands: anything else in its grammar is an error.
struct GrammarRules {
  /// The values of each slot, in order. The phrases of a value are asked for by its number in this order.
  std::map<std::string, std::vector<std::string>> slots;
  /// For each kind of form the slots that it may have together, sorted, one entry for each meaning.
  std::map<std::string, std::vector<std::vector<std::string>>> kinds;
};

class Grammar {
 public:
  struct Form {
    Words words;                     // "{cell}" is one word
    std::vector<std::string> slots;  // their names, in order
  };

  static constexpr size_t kMostBytes = 1'000'000;  ///< of the text
  static constexpr size_t kMostKnown = 10'000;     ///< words in all: a model has weights for each
  static constexpr size_t kMostWords = 32;         ///< of a phrase or form
  static constexpr size_t kLongestWord = 100;      ///< in bytes

  /// Throws xattn::FileError with `name` (of the file) and the number of the line for a line that is neither a slot nor a
  /// form, a slot, value, kind or meaning that the rules do not have, for a value or kind of the rules that the text does not
  /// have, and for a text over the limits.
  Grammar(std::string text, const std::string& name, const GrammarRules& rules);

  const std::vector<Form>& forms(const std::string& kind) const { return forms_.at(kind); }
  const std::vector<Words>& phrases(const std::string& slot, int64_t value) const {
    return phrases_.at(slot).at(static_cast<size_t>(value));
  }
  /// Each word once: those of the phrases, then those of the forms, in the order of the text.
  const Words& vocabulary() const { return vocabulary_; }
  const std::string& text() const { return text_; }

  /// The form with its slots filled, in order, by phrases drawn at random for these values.
  Words say(const Form& form, const std::vector<int64_t>& values, Random& random) const;

 private:
  std::string text_;
  std::map<std::string, std::vector<std::vector<Words>>> phrases_;  // slot, value, phrases
  std::map<std::string, std::vector<Form>> forms_;                  // by kind
  Words vocabulary_;
};

/// Throws xattn::FileError, naming the file, if it is no regular file that can be read.
Grammar read_grammar(const std::string& path, const GrammarRules& rules);

}  // namespace examples
