// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/random.h"

// Sentences from an editable file. Beside empty lines and comments (#) it has two kinds of lines:
//
//   slot cell 2: top right | upper right      the phrases for a value of a slot
//   place: what is in the {cell}              a form of a kind of sentence; {cell} is any phrase of that slot
namespace examples {

using Words = std::vector<std::string>;

/// Whether a word of a form stands for any phrase of a slot: "{cell}".
bool is_slot(const std::string& word);

/// "What is left of the Seven?" -> {what, is, left, of, the, seven}. Commas are words, other marks are dropped.
Words split(const std::string& text);

/// The words with spaces between, but none before a comma.
std::string join(const Words& words);

/// The slots and kinds that a program understands; anything else in its grammar is an error.
struct GrammarRules {
  /// The values of each slot, numbered in this order.
  std::map<std::string, std::vector<std::string>> slots;
  /// For each kind of form, the sets of slots that it may have, each sorted.
  std::map<std::string, std::vector<std::vector<std::string>>> kinds;
};

class Grammar {
 public:
  struct Form {
    Words words;                     // "{cell}" is one word
    std::vector<std::string> slots;  // their names, in order
  };

  static constexpr size_t kMostBytes = 1'000'000;  ///< of the text
  static constexpr size_t kMostKnown = 10'000;     ///< different words: a model has weights for each
  static constexpr size_t kMostWords = 32;         ///< of a phrase or form
  static constexpr size_t kLongestWord = 100;      ///< in bytes

  /// Throws xattn::FileError with `name` (of the file) and the line number if a line is neither a slot nor a form, or has a
  /// slot, value, kind or set of slots that is not in the rules; if the text lacks a value or kind of the rules; and if it
  /// exceeds the limits.
  Grammar(std::string text, const std::string& name, const GrammarRules& rules);

  const std::vector<Form>& forms(const std::string& kind) const { return forms_.at(kind); }
  const std::vector<Words>& phrases(const std::string& slot, int64_t value) const {
    return phrases_.at(slot).at(static_cast<size_t>(value));
  }
  /// Every word once: the words of the phrases, then those of the forms, in the order of the text.
  const Words& vocabulary() const { return vocabulary_; }
  const std::string& text() const { return text_; }

  /// The form with its slots filled, in order, with random phrases for these values.
  Words say(const Form& form, const std::vector<int64_t>& values, Random& random) const;

 private:
  std::string text_;
  std::map<std::string, std::vector<std::vector<Words>>> phrases_;  // slot, value, phrases
  std::map<std::string, std::vector<Form>> forms_;                  // by kind
  Words vocabulary_;
};

/// Throws xattn::FileError, naming the file, unless it is a regular file that can be read.
Grammar read_grammar(const std::string& path, const GrammarRules& rules);

/// Words and their numbers.
class Vocabulary {
 public:
  static constexpr int64_t kPadding = 0;  ///< fills up short sentences
  static constexpr int64_t kEnd = 1;      ///< ends each sentence
  static constexpr int64_t kFirstWord = 2;

  explicit Vocabulary(Words words);

  /// All numbers are below this.
  int64_t size() const { return static_cast<int64_t>(words_.size()) + kFirstWord; }
  const Words& words() const { return words_; }

  /// Throws std::runtime_error for an unknown word, naming the nearest known ones.
  int64_t number(const std::string& word) const;
  const std::string& word(int64_t number) const { return words_.at(static_cast<size_t>(number - kFirstWord)); }

  /// Sentences, each with kEnd behind its words, padded to the longest: int64 [N, T].
  torch::Tensor encode(const std::vector<Words>& sentences) const;

  /// The words of [T] numbers up to kEnd or kPadding.
  Words decode(const torch::Tensor& numbers) const;

 private:
  Words words_;
  std::map<std::string, int64_t> numbers_;
};

}  // namespace examples
