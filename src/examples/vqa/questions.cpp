// SPDX-License-Identifier: Apache-2.0
#include "questions.h"

#include <algorithm>
#include <array>
#include <sstream>
#include <vector>

namespace vqa {
namespace {

// For each cell, ways to ask which digit is there. "Middle" means a row or a column, as the other words have it.
constexpr std::array<std::array<const char*, 4>, 9> kPhrases = {{
    {"top left", "upper left", "left of the top row", "top of the left column"},
    {"top middle", "upper centre", "middle of the top row", "top of the middle column"},
    {"top right", "upper right", "right of the top row", "top of the right column"},
    {"middle left", "left of centre", "left of the middle row", "middle of the left column"},
    {"middle", "centre", "middle of the middle row", "centre of the board"},
    {"middle right", "right of centre", "right of the middle row", "middle of the right column"},
    {"bottom left", "lower left", "left of the bottom row", "bottom of the left column"},
    {"bottom middle", "lower centre", "middle of the bottom row", "bottom of the middle column"},
    {"bottom right", "lower right", "right of the bottom row", "bottom of the right column"},
}};

constexpr int64_t kLongest = 5;  // words

struct PhraseBook {
  std::vector<std::string> vocabulary = {""};  // the words in the order of their first use, after the padding
  torch::Tensor words;                         // int64 [9, 4, 5]
};

int64_t word_number(const std::string& word, std::vector<std::string>& vocabulary) {
  const auto known = std::find(vocabulary.begin(), vocabulary.end(), word);
  const auto number = known - vocabulary.begin();
  if (known == vocabulary.end()) {
    vocabulary.push_back(word);
  }
  return number;
}

PhraseBook make_book() {
  PhraseBook book;
  book.words = torch::zeros({kPhrases.size(), kPhrases[0].size(), kLongest}, torch::kInt64);
  auto words = book.words.accessor<int64_t, 3>();
  for (size_t cell = 0; cell < kPhrases.size(); ++cell) {
    for (size_t phrase = 0; phrase < kPhrases[cell].size(); ++phrase) {
      std::istringstream stream(kPhrases[cell][phrase]);
      std::string word;
      for (int64_t place = 0; stream >> word; ++place) {
        words[cell][phrase][place] = word_number(word, book.vocabulary);
      }
    }
  }
  return book;
}

const PhraseBook& book() {
  static const auto made = make_book();
  return made;
}

}  // namespace

int64_t vocabulary_size() {
  return static_cast<int64_t>(book().vocabulary.size());
}

const torch::Tensor& question_words() {
  return book().words;
}

std::string question_text(const torch::Tensor& words) {
  std::string text;
  for (int64_t place = 0; place < words.size(0); ++place) {
    const auto& word = book().vocabulary.at(words[place].item<int64_t>());
    text += (text.empty() || word.empty() ? "" : " ") + word;
  }
  return text;
}

}  // namespace vqa
