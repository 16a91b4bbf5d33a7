// SPDX-License-Identifier: Apache-2.0
#include "caption/captions.h"

#include <algorithm>
#include <set>
#include <string>

namespace caption {
namespace {

constexpr auto kItems = "{items}";

void append(Words& words, const Words& more) {
  words.insert(words.end(), more.begin(), more.end());
}

// The values of an item's slots, in the order of its form.
std::vector<int64_t> values_of(const Grammar::Form& form, int64_t digit, int64_t cell) {
  return form.slots.at(0) == "digit" ? std::vector{digit, cell} : std::vector{cell, digit};
}

// The words before and after the items in a form of caption.
std::pair<Words, Words> frame_of(const Grammar::Form& form) {
  const auto items = std::ranges::find(form.words, kItems);
  return {{form.words.begin(), items}, {items + 1, form.words.end()}};
}

std::vector<Words> words_of(const std::vector<Grammar::Form>& forms) {
  std::vector<Words> words;
  for (const auto& form : forms) words.push_back(form.words);
  return words;
}

// The number of words of the phrase in `all` that begins at this place; 0 if there is none.
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

// The number of words of the longest item in this form: all pairs of digits and cells occur, so each slot has its longest
// phrase.
size_t longest_item(const Grammar::Form& form, const Grammar& grammar) {
  size_t words = form.words.size() - form.slots.size();
  for (const auto& slot : form.slots) {
    const int64_t values = slot == "digit" ? kDigitKinds : kCells;
    size_t most = 0;
    for (int64_t value = 0; value < values; ++value) most = std::max(most, longest(grammar.phrases(slot, value)));
    words += most;
  }
  return words;
}

// Whether these words say in this form that the digit is in the cell.
bool says(const Words& words, const Grammar::Form& form, int64_t digit, int64_t cell, const Grammar& grammar) {
  const auto values = values_of(form, digit, cell);
  const auto stands_at = [&words](size_t place, const Words& phrase) {
    return place + phrase.size() <= words.size() &&
           std::equal(phrase.begin(), phrase.end(), words.begin() + static_cast<int64_t>(place));
  };
  std::set<size_t> ends = {0};  // where the form so far may end in the words
  size_t slot = 0;
  for (const auto& word : form.words) {
    std::set<size_t> further;
    const bool fills = is_slot(word);
    for (const auto end : ends) {
      if (!fills && end < words.size() && words[end] == word) further.insert(end + 1);
      if (!fills) continue;
      for (const auto& phrase : grammar.phrases(form.slots.at(slot), values.at(slot))) {
        if (stands_at(end, phrase)) further.insert(end + phrase.size());
      }
    }
    slot += fills ? 1 : 0;
    ends = std::move(further);
    if (ends.empty()) return false;
  }
  return ends.contains(words.size());
}

}  // namespace

const GrammarRules& caption_rules() {
  static const GrammarRules rules = {
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
  for (const auto& form : grammar.forms("item")) item = std::max(item, longest_item(form, grammar));
  const auto between = std::max(longest(words_of(grammar.forms("between"))), longest(words_of(grammar.forms("before_last"))));
  const auto frame = longest(words_of(grammar.forms("caption"))) - 1;
  return static_cast<int64_t>(frame + kMostDigits * item + (kMostDigits - 1) * between);
}

CaptionReader::CaptionReader(const Grammar& grammar)
    : grammar_(grammar), between_(words_of(grammar.forms("between"))), before_last_(words_of(grammar.forms("before_last"))) {
  for (const auto& form : grammar.forms("caption")) frames_.push_back(frame_of(form));
}

// Returns nothing if the words are not an item. Items are not listed in advance: a grammar of a few pages has billions.
std::optional<CaptionReader::CaptionItem> CaptionReader::item_of(const Words& words) const {
  const auto& forms = grammar_.forms("item");
  for (size_t form = 0; form < forms.size(); ++form) {
    for (int64_t digit = 0; digit < kDigitKinds; ++digit) {
      for (int64_t cell = 0; cell < kCells; ++cell) {
        if (says(words, forms[form], digit, cell, grammar_)) return CaptionItem{form, digit, cell};
      }
    }
  }
  return {};
}

// The cells according to items with separators between them: before_last before the last item, between before the others.
std::optional<std::array<int64_t, kCells>> CaptionReader::read_items(const Words& words) const {
  std::vector<Words> items(1);
  std::vector<bool> are_last;  // whether each separator is a before_last
  for (size_t place = 0; place < words.size();) {
    const auto last = length_at(words, place, before_last_);
    const auto separator = last > 0 ? last : length_at(words, place, between_);
    if (separator > 0) {
      items.emplace_back();
      are_last.push_back(last > 0);
      place += separator;
    } else {
      items.back().push_back(words[place++]);
    }
  }
  if (std::ranges::count(are_last, true) != (are_last.empty() ? 0 : 1) || (!are_last.empty() && !are_last.back())) return {};
  std::array<int64_t, kCells> digits;
  digits.fill(kEmpty);
  std::optional<size_t> form;  // all items have one form
  for (const auto& words_of_item : items) {
    const auto item = item_of(words_of_item);
    if (!item || item->form != form.value_or(item->form)) return {};
    auto& digit = digits.at(static_cast<size_t>(item->cell));
    if (digit != kEmpty) return {};
    digit = item->digit;
    form = item->form;
  }
  return digits;
}

std::optional<std::array<int64_t, kCells>> CaptionReader::read(const Words& caption) const {
  for (const auto& [before, after] : frames_) {
    if (caption.size() < before.size() + after.size()) continue;
    const auto begin = caption.begin() + static_cast<int64_t>(before.size());
    const auto end = caption.end() - static_cast<int64_t>(after.size());
    const bool fits = std::equal(before.begin(), before.end(), caption.begin()) && std::equal(after.begin(), after.end(), end);
    if (const auto digits = fits ? read_items({begin, end}) : std::nullopt) return digits;
  }
  return std::nullopt;
}

}  // namespace caption
