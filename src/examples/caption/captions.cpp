// SPDX-License-Identifier: Apache-2.0
#include "caption/captions.h"

#include <algorithm>
#include <string>

namespace caption {
namespace {

using examples::kCells;
using examples::kEmpty;
using examples::kMostDigits;

constexpr auto kItems = "{items}";

void append(Words& words, const Words& more) {
  words.insert(words.end(), more.begin(), more.end());
}

// The values of an item's slots, in the order of its form.
std::vector<int64_t> values_of(const Grammar::Form& form, int64_t digit, int64_t cell) {
  return form.slots.at(0) == "digit" ? std::vector{digit, cell} : std::vector{cell, digit};
}

// What stands before and behind the items in a form of caption.
std::pair<Words, Words> frame_of(const Grammar::Form& form) {
  const auto items = std::ranges::find(form.words, kItems);
  return {{form.words.begin(), items}, {items + 1, form.words.end()}};
}

// All ways to say an item in this form.
std::vector<Words> all_ways(const Grammar::Form& form, int64_t digit, int64_t cell, const Grammar& grammar) {
  const auto values = values_of(form, digit, cell);
  std::vector<Words> ways = {{}};
  size_t slot = 0;
  for (const auto& word : form.words) {
    const bool is_slot = word.starts_with('{');
    const auto phrases = is_slot ? grammar.phrases(form.slots.at(slot), values.at(slot)) : std::vector<Words>{{word}};
    slot += is_slot ? 1 : 0;
    std::vector<Words> longer;
    for (const auto& way : ways) {
      for (const auto& phrase : phrases) append(longer.emplace_back(way), phrase);
    }
    ways = std::move(longer);
  }
  return ways;
}

std::vector<Words> words_of(const std::vector<Grammar::Form>& forms) {
  std::vector<Words> words;
  for (const auto& form : forms) words.push_back(form.words);
  return words;
}

// Whether one of `all` stands at this place; its number of words.
size_t length_at(const Words& words, size_t place, const std::vector<Words>& all) {
  for (const auto& one : all) {
    if (place + one.size() <= words.size() && std::equal(one.begin(), one.end(), words.begin() + static_cast<int64_t>(place))) {
      return one.size();
    }
  }
  return 0;
}

size_t longest(const std::vector<Words>& all) {
  return std::ranges::max(all, {}, &Words::size).size();
}

}  // namespace

const examples::GrammarRules& caption_rules() {
  static const examples::GrammarRules rules = {
      .slots = {{"cell", {"0", "1", "2", "3", "4", "5", "6", "7", "8"}},
                {"digit", {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"}}},
      .kinds = {{"caption", {{"items"}}}, {"item", {{"cell", "digit"}}}, {"between", {{}}}, {"before_last", {{}}}},
  };
  return rules;
}

Words draw_caption(const Board& board, const Grammar& grammar, Random& random) {
  auto [caption, ending] = frame_of(random.pick(grammar.forms("caption")));
  const auto& form = random.pick(grammar.forms("item"));
  auto left = kCells - std::ranges::count(board.digits, kEmpty);
  const auto all = left;
  for (int64_t cell = 0; cell < kCells; ++cell) {
    const auto digit = board.digits.at(static_cast<size_t>(cell));
    if (digit == kEmpty) continue;
    if (left < all) append(caption, random.pick(grammar.forms(left == 1 ? "before_last" : "between")).words);
    append(caption, grammar.say(form, values_of(form, digit, cell), random));
    --left;
  }
  append(caption, ending);
  return caption;
}

int64_t longest_caption(const Grammar& grammar) {
  size_t item = 0;
  for (const auto& form : grammar.forms("item")) {
    for (int64_t digit = 0; digit < 10; ++digit) {
      for (int64_t cell = 0; cell < kCells; ++cell) item = std::max(item, longest(all_ways(form, digit, cell, grammar)));
    }
  }
  const auto between = std::max(longest(words_of(grammar.forms("between"))), longest(words_of(grammar.forms("before_last"))));
  const auto frame = longest(words_of(grammar.forms("caption"))) - 1;
  return static_cast<int64_t>(frame + kMostDigits * item + (kMostDigits - 1) * between);
}

CaptionReader::CaptionReader(const Grammar& grammar)
    : between_(words_of(grammar.forms("between"))), before_last_(words_of(grammar.forms("before_last"))) {
  for (const auto& form : grammar.forms("caption")) frames_.push_back(frame_of(form));
  const auto& forms = grammar.forms("item");
  for (size_t form = 0; form < forms.size(); ++form) {
    for (int64_t digit = 0; digit < 10; ++digit) {
      for (int64_t cell = 0; cell < kCells; ++cell) {
        for (auto& way : all_ways(forms[form], digit, cell, grammar)) items_.emplace(std::move(way), Item{form, digit, cell});
      }
    }
  }
}

std::optional<std::array<int64_t, kCells>> CaptionReader::read(const Words& caption) const {
  for (const auto& [before, behind] : frames_) {
    if (caption.size() < before.size() + behind.size() || !std::equal(before.begin(), before.end(), caption.begin()) ||
        !std::equal(behind.begin(), behind.end(), caption.end() - static_cast<int64_t>(behind.size()))) {
      continue;
    }
    const Words middle(caption.begin() + static_cast<int64_t>(before.size()),
                       caption.end() - static_cast<int64_t>(behind.size()));
    std::array<int64_t, kCells> said;
    said.fill(kEmpty);
    std::optional<size_t> form;
    Words item;
    bool sound = true;
    bool last = false;  // behind before_last
    const auto finish_item = [&] {
      const auto found = items_.find(item);
      sound = sound && found != items_.end() && (!form || *form == found->second.form) &&
              said.at(static_cast<size_t>(found->second.cell)) == kEmpty;
      if (!sound) return;
      form = found->second.form;
      said.at(static_cast<size_t>(found->second.cell)) = found->second.digit;
      item.clear();
    };
    size_t items = 1;
    for (size_t place = 0; place < middle.size() && sound;) {
      const auto last_begins = length_at(middle, place, before_last_);
      const auto next_begins = length_at(middle, place, between_);
      if (last_begins + next_begins == 0) {
        item.push_back(middle[place++]);
        continue;
      }
      finish_item();
      sound = sound && !last;
      last = last_begins > 0;
      place += last ? last_begins : next_begins;
      ++items;
    }
    finish_item();
    if (sound && last == (items > 1)) return said;
  }
  return std::nullopt;
}

}  // namespace caption
