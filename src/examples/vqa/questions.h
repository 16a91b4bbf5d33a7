// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/board.h"
#include "common/grammar.h"
#include "common/random.h"

namespace vqa {

using namespace examples;  // the parts that the programs share

enum class QuestionKind {
  place,     ///< the content of this cell
  relation,  ///< the neighbour of this digit, which occurs once
  count,     ///< the number of digits: on the board, in a line, or of this parity
  exist,     ///< whether this digit is on the board or in a line
  compare,   ///< whether the digit in one cell is larger, or smaller, than that in another
  largest,   ///< on the board or in a line
  smallest,  ///< likewise
};

/// The names of the kinds in the grammar, in the order of QuestionKind.
inline constexpr std::array<const char*, 7> kKinds = {"place", "relation", "count", "exist", "compare", "largest", "smallest"};

/// All possible answers. A count and a digit of the same number are the same answer.
inline constexpr std::array<const char*, 13> kAnswers = {"zero",  "one",   "two",  "three", "four", "five",   "six",
                                                         "seven", "eight", "nine", "yes",   "no",   "nothing"};
inline constexpr int64_t kYes = 10;
inline constexpr int64_t kNo = 11;
inline constexpr int64_t kNothing = 12;

/// The meaning of a question, independent of its words. Fields that its kind and form do not need are empty.
struct Meaning {
  QuestionKind kind;
  std::optional<int64_t> cell = {};        ///< 0 to 8, row by row
  std::optional<int64_t> other_cell = {};  ///< of a comparison: the second
  std::optional<int64_t> line = {};        ///< rows 0 to 2, columns 3 to 5
  std::optional<int64_t> side = {};        ///< 0 left, 1 right, 2 above, 3 below
  std::optional<int64_t> digit = {};
  std::optional<int64_t> parity = {};  ///< 0 even, 1 odd
  std::optional<int64_t> order = {};   ///< 0 larger, 1 smaller
};

/// The answer, a place in kAnswers. REQUIRES: the question has one on this board: the digit of a relation occurs once, compared
/// cells hold different digits, and there is a digit to be the largest or smallest.
int64_t answer(const Board& board, const Meaning& meaning);

struct Question {
  Meaning meaning;
  Words words;
  int64_t answer;
};

/// The slots and kinds of the grammar; see data/questions.txt.
const GrammarRules& question_rules();

/// A random question of this kind about the board; nothing if no such question has an answer. A yes-or-no question has the
/// requested answer, so that a batch can have equally many of both. One in eight places and neighbours is empty.
std::optional<Question> draw_question(
    QuestionKind kind, const Board& board, bool want_yes, const Grammar& grammar, Random& random);

/// The kinds of the questions about one board. Every second yes-or-no question has the answer yes.
using Kinds = std::array<QuestionKind, 14>;
inline constexpr int64_t kQuestionsPerBoard = std::tuple_size_v<Kinds>;

/// Two of every kind.
inline constexpr Kinds kEvenly = {QuestionKind::place,    QuestionKind::place,   QuestionKind::relation, QuestionKind::relation,
                                  QuestionKind::count,    QuestionKind::count,   QuestionKind::exist,    QuestionKind::exist,
                                  QuestionKind::compare,  QuestionKind::compare, QuestionKind::largest,  QuestionKind::largest,
                                  QuestionKind::smallest, QuestionKind::smallest};

/// For training: more questions of the kinds that take longest to learn.
inline constexpr Kinds kMoreRelations = {
    QuestionKind::place,    QuestionKind::place,   QuestionKind::relation, QuestionKind::relation, QuestionKind::relation,
    QuestionKind::relation, QuestionKind::count,   QuestionKind::count,    QuestionKind::exist,    QuestionKind::exist,
    QuestionKind::compare,  QuestionKind::compare, QuestionKind::largest,  QuestionKind::smallest};

/// B boards, with Q questions about each.
struct Batch {
  std::vector<Board> drawn;                      ///< B
  std::vector<std::vector<Question>> questions;  ///< B times Q
};

/// Boards of 2 to 6 digits, each number equally often, with questions of these kinds about each.
Batch draw_batch(const Digits& digits, const Grammar& grammar, int64_t boards, Random& random, const Kinds& kinds = kEvenly);

}  // namespace vqa
