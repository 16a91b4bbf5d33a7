// SPDX-License-Identifier: Apache-2.0
#include "common/vocabulary.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "base/printed.h"

namespace examples {
namespace {

// Letters to add, drop or change to make one word of the other (Levenshtein, 1966).
size_t distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);  // distances from the letters of `a` so far to each beginning of `b`
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 0; i < a.size(); ++i) {
    auto diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const auto changed = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = std::exchange(row[j + 1], std::min({changed, row[j] + 1, row[j + 1] + 1}));
    }
  }
  return row.back();
}

}  // namespace

Vocabulary::Vocabulary(Words words) : words_(std::move(words)) {
  for (const auto& word : words_) numbers_.emplace(word, static_cast<int64_t>(numbers_.size()) + kFirstWord);
}

int64_t Vocabulary::number(const std::string& word) const {
  if (const auto known = numbers_.find(word); known != numbers_.end()) return known->second;
  constexpr size_t kNamed = 3;
  auto nearest = words_;
  std::ranges::stable_sort(nearest, {}, [&word](const std::string& known) { return distance(word, known); });
  nearest.resize(std::min(nearest.size(), kNamed));
  throw std::runtime_error(fmt::format("the word '{}' is not known; the nearest known words are {}", xattn::detail::shown(word),
                                       fmt::join(nearest, ", ")));
}

torch::Tensor Vocabulary::encode(const std::vector<Words>& sentences) const {
  size_t longest = 0;
  for (const auto& sentence : sentences) longest = std::max(longest, sentence.size());
  auto numbers =
      torch::full({static_cast<int64_t>(sentences.size()), static_cast<int64_t>(longest) + 1}, kPadding, torch::kInt64);
  auto* row = numbers.mutable_data_ptr<int64_t>();
  for (const auto& sentence : sentences) {
    auto* next = row;
    for (const auto& word : sentence) *next++ = number(word);
    *next = kEnd;
    row += longest + 1;
  }
  return numbers;
}

Words Vocabulary::decode(const torch::Tensor& numbers) const {
  Words words;
  for (int64_t i = 0; i < numbers.size(0) && numbers[i].item<int64_t>() >= kFirstWord; ++i) {
    words.push_back(word(numbers[i].item<int64_t>()));
  }
  return words;
}

}  // namespace examples
