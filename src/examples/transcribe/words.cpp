// SPDX-License-Identifier: Apache-2.0
#include "transcribe/words.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>
#include <string_view>

#include "base/printed.h"
#include "common/time_warp.h"

namespace transcribe {
namespace {

using torch::Tensor;

const std::set<std::string> kWithoutSpaces = {"zh", "ja", "th", "lo", "my", "yue"};
constexpr std::string_view kPunctuation = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";
constexpr std::string_view kOpening = "\"'“¡¿([{-";
constexpr std::string_view kClosing = "\"'.。,，!！?？:：”)]}、";

// The places in a text in UTF-8 that are not inside a character.
std::set<size_t> borders_of(std::string_view text) {
  std::set<size_t> borders = {0};
  for (size_t at = 0; at < text.size();) borders.insert(at += xattn::detail::first_character(text.substr(at)).bytes);
  return borders;
}

std::string_view trimmed(std::string_view text) {
  while (text.starts_with(' ')) text.remove_prefix(1);
  while (text.ends_with(' ')) text.remove_suffix(1);
  return text;
}

// Punctuation joins the word that it opens or closes, which keeps its own times.
void join_punctuation(Words& words) {
  const auto join = [](Word& word, Word& mark, bool in_front) {
    word.text.insert(in_front ? 0 : word.text.size(), mark.text);
    word.tokens.insert(in_front ? word.tokens.begin() : word.tokens.end(), mark.tokens.begin(), mark.tokens.end());
    mark.text.clear();
    mark.tokens.clear();
  };
  for (size_t i = words.size() - 1, next = i; i-- > 0;) {
    const bool opens = words[i].text.starts_with(' ') && kOpening.find(trimmed(words[i].text)) != std::string_view::npos;
    opens ? join(words[next], words[i], /*in_front=*/true) : void(next = i);
  }
  for (size_t i = 1, last = 0; i < words.size(); ++i) {
    const bool closes = !words[last].text.ends_with(' ') && kClosing.find(words[i].text) != std::string_view::npos;
    closes ? join(words[last], words[i], /*in_front=*/false) : void(last = i);
  }
  std::erase_if(words, [](const Word& word) { return word.tokens.empty(); });
}

// Adds the median of each `width` neighbours in a row of n numbers to the sums; what is beyond the row's ends is mirrored. All
// medians are found at once, by odd-even transposition sort of the shifted rows.
void add_medians(const float* row, int64_t n, int64_t width, float* sums) {
  const auto margin = n > width / 2 ? std::max<int64_t>(0, width / 2) : 0;
  std::vector<float> padded;
  for (auto j = -margin; j < n + margin; ++j) padded.push_back(row[std::min(std::abs(j), 2 * (n - 1) - std::abs(j))]);
  std::vector<std::vector<float>> sorted;
  for (int64_t i = 0; i <= 2 * margin; ++i) sorted.emplace_back(padded.begin() + i, padded.begin() + i + n);
  for (size_t round = 0; round < sorted.size(); ++round) {
    for (size_t i = round % 2; i + 1 < sorted.size(); i += 2) {
      auto *lower = sorted[i].data(), *upper = sorted[i + 1].data();
      for (int64_t j = 0; j < n; ++j) {
        const auto smaller = std::min(lower[j], upper[j]);
        upper[j] = std::max(lower[j], upper[j]);
        lower[j] = smaller;
      }
    }
  }
  for (int64_t j = 0; j < n; ++j) sums[j] += sorted[static_cast<size_t>(margin)][static_cast<size_t>(j)];
}

// The sum over heads of their attention: normalised along the tokens and smoothed along the sound. x: [A, T, Lk], overwritten.
Tensor smoothed(Tensor x, int64_t width) {
  const auto A = x.size(0), T = x.size(1), Lk = x.size(2);
  x -= x.mean(1, /*keepdim=*/true);
  x /= torch::linalg_vector_norm(x, 2, {1}, /*keepdim=*/true) / std::sqrt(static_cast<double>(T));
  x = x.nan_to_num_(0).contiguous();
  auto sum = torch::zeros({T, Lk});
  for (int64_t row = 0; row < A * T; ++row) {
    add_medians(x.const_data_ptr<float>() + row * Lk, Lk, width, sum.data_ptr<float>() + row % T * Lk);
  }
  return sum;
}

}  // namespace

Words split_words(const Tokens& text, const examples::ByteVocabulary& vocabulary, const std::string& language) {
  const bool with_spaces = !kWithoutSpaces.contains(language);
  Words words;
  const auto borders = borders_of(vocabulary.text(text));
  Tokens open;  // tokens that end inside a character
  size_t end = 0;
  for (const auto token : text) {
    open.push_back(token);
    end += vocabulary.text({token}).size();
    if (!borders.contains(end)) continue;
    const auto part = vocabulary.text(open);
    const bool begins = part.starts_with(' ') || kPunctuation.find(trimmed(part)) != std::string_view::npos;
    if (words.empty() || !with_spaces || begins) words.emplace_back();
    auto& word = words.back();
    word.text += part;
    word.tokens.insert(word.tokens.end(), open.begin(), open.end());
    open.clear();
  }
  return words;
}

Words align(const Whisper& whisper, const Contexts& sound, const Tokens& prompt, Words words, int64_t frames) {
  const auto& rules = whisper.rules;
  if (words.empty()) return words;
  Tokens tokens = prompt;
  tokens.push_back(rules.no_timestamps);
  for (const auto& word : words) tokens.insert(tokens.end(), word.tokens.begin(), word.tokens.end());
  const auto first = static_cast<int64_t>(prompt.size());  // it predicts the first token of the text, and the last one the end
  const auto rows = static_cast<int64_t>(tokens.size()) - first;
  if (first + rows < whisper.model.longest()) tokens.push_back(rules.end);
  auto weights =
      Decoding(whisper.model, sound).attention(torch::tensor(tokens).unsqueeze(0), rules.alignment_heads);  // [A, T, Lk]
  weights = weights.narrow(2, 0, std::max<int64_t>(1, frames / kFramesOfToken));
  weights /= weights.sum(2, /*keepdim=*/true);
  const auto attention = weights.mean(0).narrow(0, first, rows);
  const auto entered = examples::time_warp(-smoothed(weights, rules.median_width).narrow(0, first, rows) / weights.size(0));
  int64_t token = 0;
  for (auto& word : words) {
    const auto count = static_cast<int64_t>(word.tokens.size());
    const auto seconds = [&](int64_t row) { return static_cast<double>(entered.at(static_cast<size_t>(row))) * kTokenSeconds; };
    word.begin = seconds(token);
    word.end = seconds(token + count);
    word.attention = attention.narrow(0, token, count).mean(0);
    token += count;
  }
  join_punctuation(words);
  return words;
}

}  // namespace transcribe
