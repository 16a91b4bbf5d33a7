// SPDX-License-Identifier: Apache-2.0
#include "common/grammar.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <cctype>
#include <iterator>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "base/printed.h"
#include "files/mapped_file.h"

namespace examples {
namespace {

using xattn::detail::shown;

Words split_at_spaces(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

std::vector<Words> split_phrases(const std::string& text) {
  std::vector<Words> phrases;
  std::istringstream stream(text);
  for (std::string phrase; std::getline(stream, phrase, '|');) phrases.push_back(split_at_spaces(phrase));
  return phrases;
}

std::string slot_name(const std::string& word) {
  return word.substr(1, word.size() - 2);
}

template <typename Map>
std::string names(const Map& map) {
  std::vector<std::string> all;
  for (const auto& [name, value] : map) all.push_back(name);
  return fmt::format("{}", fmt::join(all, ", "));
}

std::string meanings(const std::vector<std::vector<std::string>>& all) {
  std::vector<std::string> each;
  for (const auto& slots : all) each.push_back(slots.empty() ? "none" : fmt::format("{{{}}}", fmt::join(slots, "} {")));
  return fmt::format("{}", fmt::join(each, ", or "));
}

// The number of letters to add, drop or change to turn one word into the other (Levenshtein, 1966).
size_t distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);  // distances between the letters of `a` so far and each prefix of `b`
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

bool is_slot(const std::string& word) {
  return word.starts_with('{') && word.ends_with('}');
}

Words split(const std::string& text) {
  std::string spaced;
  for (const char c : text) {
    const auto character = static_cast<unsigned char>(c);
    if (c == ',') {
      spaced += " , ";
    } else if (std::isspace(character) || std::isalnum(character) || character >= 0x80) {
      spaced += static_cast<char>(std::tolower(character));
    } else {
      spaced += ' ';
    }
  }
  return split_at_spaces(spaced);
}

std::string join(const Words& words) {
  std::string text;
  for (const auto& word : words) text += (text.empty() || word == "," ? "" : " ") + word;
  return text;
}

Grammar::Grammar(std::string text, const std::string& name, const GrammarRules& rules) : text_(std::move(text)) {
  for (const auto& [slot, values] : rules.slots) phrases_[slot].resize(values.size());
  for (const auto& [kind, allowed] : rules.kinds) forms_[kind];

  Words of_phrases;
  Words of_forms;
  int64_t number = 0;
  const auto check = [&](bool ok, const std::string& message) {
    if (!ok) throw xattn::FileError(fmt::format("{}:{}: {}", name, number, message));
  };
  check(text_.size() <= kMostBytes, fmt::format("has {} bytes, more than the limit of {}", text_.size(), kMostBytes));
  const auto check_words = [&](const Words& words) {
    check(words.size() <= kMostWords,
          fmt::format("may have {} words in a phrase or form, but has {}", kMostWords, words.size()));
    for (const auto& word : words) {
      check(word.size() <= kLongestWord,
            fmt::format("a word may have {} bytes, but '{}' has {}", kLongestWord, shown(word), word.size()));
    }
  };

  const auto add_phrases = [&](const Words& head, const std::string& body) {
    const auto slot = rules.slots.find(head[1]);
    check(slot != rules.slots.end(),
          fmt::format("the slot must be one of {}, but is '{}'", names(rules.slots), shown(head[1])));
    const auto value = std::ranges::find(slot->second, head[2]);
    check(value != slot->second.end(), fmt::format("the value of {} must be one of {}, but is '{}'", head[1],
                                                   fmt::join(slot->second, ", "), shown(head[2])));
    for (auto& phrase : split_phrases(body)) {
      check(!phrase.empty(), "a phrase is empty");
      check_words(phrase);
      of_phrases.insert(of_phrases.end(), phrase.begin(), phrase.end());
      phrases_[head[1]].at(static_cast<size_t>(value - slot->second.begin())).push_back(std::move(phrase));
    }
  };

  const auto add_form = [&](const std::string& kind, const std::string& body) {
    const auto rule = rules.kinds.find(kind);
    check(rule != rules.kinds.end(), fmt::format("the kind must be one of {}, but is '{}'", names(rules.kinds), shown(kind)));
    Form form = {split_at_spaces(body), {}};
    check(!form.words.empty(), "the form is empty");
    check_words(form.words);
    for (const auto& word : form.words) {
      is_slot(word) ? form.slots.push_back(slot_name(word)) : of_forms.push_back(word);
    }
    auto sorted = form.slots;
    std::ranges::sort(sorted);
    check(std::ranges::count(rule->second, sorted) > 0, fmt::format("a form of {} must have these slots: {}; but it has {}",
                                                                    kind, meanings(rule->second), shown(meanings({sorted}))));
    forms_[kind].push_back(std::move(form));
  };

  std::istringstream lines(text_);
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.empty() || line.starts_with('#')) continue;
    const auto colon = line.find(':');
    const auto head = split_at_spaces(line.substr(0, colon));
    const bool slot = head.size() == 3 && head[0] == "slot";
    check(colon != std::string::npos && (slot || head.size() == 1),
          fmt::format("a line must be 'slot NAME VALUE: PHRASE | PHRASE' or 'KIND: FORM', but is '{}'", shown(line)));
    const auto body = line.substr(colon + 1);
    slot ? add_phrases(head, body) : add_form(head[0], body);
  }

  for (const auto& [slot, values] : rules.slots) {
    for (size_t i = 0; i < values.size(); ++i) {
      check(!phrases_[slot][i].empty(), fmt::format("there is no line 'slot {} {}: PHRASE'", slot, values[i]));
    }
  }
  for (const auto& [kind, forms] : forms_) check(!forms.empty(), fmt::format("there is no line '{}: FORM'", kind));

  std::set<std::string> known;
  for (const auto* words : {&of_phrases, &of_forms}) {
    for (const auto& word : *words) {
      if (known.insert(word).second) vocabulary_.push_back(word);
    }
  }
  check(known.size() <= kMostKnown, fmt::format("may have {} words in all, but has {}", kMostKnown, known.size()));
}

Words Grammar::say(const Form& form, const std::vector<int64_t>& values, Random& random) const {
  Words words;
  size_t slot = 0;
  for (const auto& word : form.words) {
    if (is_slot(word)) {
      const auto& phrase = random.pick(phrases(form.slots.at(slot), values.at(slot)));
      words.insert(words.end(), phrase.begin(), phrase.end());
      ++slot;
    } else {
      words.push_back(word);
    }
  }
  return words;
}

Grammar read_grammar(const std::string& path, const GrammarRules& rules) {
  const xattn::detail::MappedFile file(path, Grammar::kMostBytes);
  return {std::string(xattn::detail::as_text(file.bytes())), path, rules};
}

Vocabulary::Vocabulary(Words words) : words_(std::move(words)) {
  for (const auto& word : words_) numbers_.emplace(word, static_cast<int64_t>(numbers_.size()) + kFirstWord);
}

int64_t Vocabulary::number(const std::string& word) const {
  if (const auto known = numbers_.find(word); known != numbers_.end()) return known->second;
  constexpr size_t kNamed = 3;
  auto nearest = words_;
  std::ranges::stable_sort(nearest, {}, [&word](const std::string& known) { return distance(word, known); });
  nearest.resize(std::min(nearest.size(), kNamed));
  throw std::runtime_error(
      fmt::format("the word '{}' is not known; the nearest known words are {}", shown(word), fmt::join(nearest, ", ")));
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
