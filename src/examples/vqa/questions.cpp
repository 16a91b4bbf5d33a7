// SPDX-License-Identifier: Apache-2.0
#include "vqa/questions.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace vqa {
namespace {

using Places = std::vector<int64_t>;

int64_t digit_in(const Board& board, int64_t cell) {
  return board.digits.at(static_cast<size_t>(cell));
}

Places all_cells() {
  Places cells(kCells);
  std::iota(cells.begin(), cells.end(), 0);
  return cells;
}

// The cells of a line, or of the whole board.
Places cells_of(std::optional<int64_t> line) {
  if (!line) return all_cells();
  const auto& cells = board_lines().at(static_cast<size_t>(*line));
  return {cells.begin(), cells.end()};
}

Places filled(const Board& board, Places cells) {
  std::erase_if(cells, [&](int64_t cell) { return digit_in(board, cell) == kEmpty; });
  return cells;
}

Places digits_in(const Board& board, std::optional<int64_t> line) {
  auto digits = filled(board, cells_of(line));
  for (auto& digit : digits) digit = digit_in(board, digit);
  return digits;
}

int64_t count(const Places& places, int64_t value) {
  return std::ranges::count(places, value);
}

// The cell on this side; nothing at the edge.
std::optional<int64_t> neighbour(int64_t cell, int64_t side) {
  constexpr std::array<std::pair<int64_t, int64_t>, 4> kSteps = {{{0, -1}, {0, 1}, {-1, 0}, {1, 0}}};  // rows, columns
  const auto [down, right] = kSteps.at(static_cast<size_t>(side));
  const auto row = cell / kCellsPerSide + down;
  const auto column = cell % kCellsPerSide + right;
  if (std::min(row, column) < 0 || std::max(row, column) >= kCellsPerSide) return std::nullopt;
  return row * kCellsPerSide + column;
}

int64_t digit_or_nothing(const Board& board, std::optional<int64_t> cell) {
  return cell && digit_in(board, *cell) != kEmpty ? digit_in(board, *cell) : kNothing;
}

int64_t yes_or_no(bool yes) {
  return yes ? kYes : kNo;
}

Places non_empty_lines(const Board& board) {
  Places lines = {0, 1, 2, 3, 4, 5};
  std::erase_if(lines, [&](int64_t line) { return digits_in(board, line).empty(); });
  return lines;
}

std::optional<Meaning> draw_place(const Board& board, Random& random) {
  const bool empty = random.once_in(8);
  auto cells = all_cells();
  std::erase_if(cells, [&](int64_t cell) { return (digit_in(board, cell) == kEmpty) != empty; });
  return Meaning{.kind = QuestionKind::place, .cell = random.pick(cells)};
}

std::optional<Meaning> draw_relation(const Board& board, Random& random) {
  const auto digits = digits_in(board, {});
  std::vector<Meaning> with_neighbour;
  std::vector<Meaning> without;
  for (const auto cell : filled(board, all_cells())) {
    const auto digit = digit_in(board, cell);
    if (count(digits, digit) > 1) continue;
    for (int64_t side = 0; side < 4; ++side) {
      const bool found = digit_or_nothing(board, neighbour(cell, side)) != kNothing;
      (found ? with_neighbour : without).push_back({.kind = QuestionKind::relation, .side = side, .digit = digit});
    }
  }
  if (with_neighbour.empty() && without.empty()) return std::nullopt;
  if (with_neighbour.empty()) return random.pick(without);
  return random.pick(random.once_in(8) && !without.empty() ? without : with_neighbour);
}

std::optional<Meaning> draw_exist(const Board& board, bool with_line, bool want_yes, Random& random) {
  Meaning meaning = {.kind = QuestionKind::exist};
  if (with_line) meaning.line = want_yes ? random.pick(non_empty_lines(board)) : random.below(6);
  const auto here = digits_in(board, meaning.line);
  const auto anywhere = digits_in(board, {});
  if (want_yes) {
    meaning.digit = random.pick(here);
    return meaning;
  }
  Places elsewhere = anywhere;
  std::erase_if(elsewhere, [&](int64_t digit) { return count(here, digit) > 0; });
  Places nowhere = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  std::erase_if(nowhere, [&](int64_t digit) { return count(anywhere, digit) > 0; });
  meaning.digit = random.pick(!elsewhere.empty() && random.once_in(2) ? elsewhere : nowhere);
  return meaning;
}

std::optional<Meaning> draw_compare(const Board& board, bool want_yes, Random& random) {
  const auto cells = filled(board, all_cells());
  std::vector<Meaning> wanted;
  for (const auto cell : cells) {
    for (const auto other : cells) {
      if (digit_in(board, cell) == digit_in(board, other)) continue;
      for (int64_t order = 0; order < 2; ++order) {
        const Meaning meaning = {.kind = QuestionKind::compare, .cell = cell, .other_cell = other, .order = order};
        if (answer(board, meaning) == yes_or_no(want_yes)) wanted.push_back(meaning);
      }
    }
  }
  if (wanted.empty()) return std::nullopt;
  return random.pick(wanted);
}

bool has(const Grammar::Form& form, const std::string& slot) {
  return std::ranges::count(form.slots, slot) > 0;
}

std::optional<Meaning> draw_meaning(
    QuestionKind kind, const Board& board, bool want_yes, const Grammar::Form& form, Random& random) {
  const bool has_line = has(form, "line");
  Meaning meaning = {.kind = kind};
  switch (kind) {
    case QuestionKind::place: return draw_place(board, random);
    case QuestionKind::relation: return draw_relation(board, random);
    case QuestionKind::count:
      if (has_line) meaning.line = random.below(6);
      if (has(form, "parity")) meaning.parity = random.below(2);
      return meaning;
    case QuestionKind::exist: return draw_exist(board, has_line, want_yes, random);
    case QuestionKind::compare: return draw_compare(board, want_yes, random);
    case QuestionKind::largest:
    case QuestionKind::smallest:
      if (has_line) meaning.line = random.pick(non_empty_lines(board));
      return meaning;
  }
  return std::nullopt;
}

// The value of each slot of the form, in order.
std::vector<int64_t> values_of(const Grammar::Form& form, const Meaning& meaning) {
  std::vector<int64_t> values;
  bool first_cell = true;
  for (const auto& slot : form.slots) {
    if (slot == "cell") {
      values.push_back((std::exchange(first_cell, false) ? meaning.cell : meaning.other_cell).value());
    } else {
      values.push_back((slot == "line"     ? meaning.line
                        : slot == "side"   ? meaning.side
                        : slot == "digit"  ? meaning.digit
                        : slot == "parity" ? meaning.parity
                                           : meaning.order)
                           .value());
    }
  }
  return values;
}

}  // namespace

int64_t answer(const Board& board, const Meaning& meaning) {
  const auto digits = digits_in(board, meaning.line);
  switch (meaning.kind) {
    case QuestionKind::place: return digit_or_nothing(board, meaning.cell);
    case QuestionKind::relation: {
      const auto found = std::ranges::find(board.digits, meaning.digit.value());
      return digit_or_nothing(board, neighbour(found - board.digits.begin(), meaning.side.value()));
    }
    case QuestionKind::count:
      return std::ranges::count_if(digits, [&](int64_t digit) { return !meaning.parity || digit % 2 == *meaning.parity; });
    case QuestionKind::exist: return yes_or_no(count(digits, meaning.digit.value()) > 0);
    case QuestionKind::compare: {
      const auto difference = digit_in(board, meaning.cell.value()) - digit_in(board, meaning.other_cell.value());
      return yes_or_no(meaning.order == 0 ? difference > 0 : difference < 0);
    }
    case QuestionKind::largest: return std::ranges::max(digits);
    case QuestionKind::smallest: return std::ranges::min(digits);
  }
  return kNothing;
}

const GrammarRules& question_rules() {
  static const GrammarRules rules = {
      .slots = {{"cell", {"0", "1", "2", "3", "4", "5", "6", "7", "8"}},
                {"line", {"0", "1", "2", "3", "4", "5"}},
                {"side", {"left", "right", "above", "below"}},
                {"digit", {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"}},
                {"parity", {"even", "odd"}},
                {"order", {"larger", "smaller"}}},
      .kinds = {{"place", {{"cell"}}},
                {"relation", {{"digit", "side"}}},
                {"count", {{}, {"line"}, {"parity"}}},
                {"exist", {{"digit"}, {"digit", "line"}}},
                {"compare", {{"cell", "cell", "order"}}},
                {"largest", {{}, {"line"}}},
                {"smallest", {{}, {"line"}}}},
  };
  return rules;
}

std::optional<Question> draw_question(
    QuestionKind kind, const Board& board, bool want_yes, const Grammar& grammar, Random& random) {
  const auto& form = random.pick(grammar.forms(kKinds.at(static_cast<size_t>(kind))));
  const auto meaning = draw_meaning(kind, board, want_yes, form, random);
  if (!meaning) return std::nullopt;
  return Question{*meaning, grammar.say(form, values_of(form, *meaning), random), answer(board, *meaning)};
}

Batch draw_batch(const Digits& digits, const Grammar& grammar, int64_t boards, Random& random, const Kinds& kinds) {
  Batch batch;
  while (static_cast<int64_t>(batch.drawn.size()) < boards) {
    const auto count = kFewestDigits + random.below(kMostDigits - kFewestDigits + 1);
    // On a few boards, such as one with two equal digits, a kind has no question with an answer. Then another board of as many
    // digits is drawn.
    for (bool complete = false; !complete;) {
      const auto board = draw_board(digits, count, random);
      std::vector<Question> questions;
      bool want_yes = true;
      for (const auto kind : kinds) {
        auto question = draw_question(kind, board, std::exchange(want_yes, !want_yes), grammar, random);
        if (question) questions.push_back(std::move(*question));
      }
      complete = questions.size() == kinds.size();
      if (!complete) continue;
      batch.drawn.push_back(board);
      batch.questions.push_back(std::move(questions));
    }
  }
  return batch;
}

}  // namespace vqa
