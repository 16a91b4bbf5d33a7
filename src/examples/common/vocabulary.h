// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/grammar.h"

namespace examples {

/// Words and their numbers.
class Vocabulary {
 public:
  static constexpr int64_t kPadding = 0;  ///< fills short sentences up
  static constexpr int64_t kEnd = 1;      ///< ends each sentence
  static constexpr int64_t kFirstWord = 2;

  explicit Vocabulary(Words words);

  /// Numbers below this are in use.
  int64_t size() const { return static_cast<int64_t>(words_.size()) + kFirstWord; }
  const Words& words() const { return words_; }

  /// Throws std::runtime_error for a word that is not known, with those known ones that are nearest to it.
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
