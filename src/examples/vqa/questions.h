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

using examples::Board;
using examples::Digits;
using examples::Grammar;
using examples::Random;
using examples::Words;

enum class Kind {
  place,     ///< what is in this cell
  relation,  ///< what stands next to this digit, of which there is one
  count,     ///< how many digits there are: on the board, in a line, or of this parity
  exist,     ///< whether there is such a digit, on the board or in a line
  compare,   ///< whether the digit in one cell is larger, or smaller, than the one in another
  largest,   ///< on the board or in a line
  smallest,  ///< likewise
};

/// In the order of Kind; the kinds of the grammar.
inline constexpr std::array<const char*, 7> kKinds = {"place", "relation", "count", "exist", "compare", "largest", "smallest"};

/// All answers there are. A count and a digit of the same number are the same answer.
inline constexpr std::array<const char*, 13> kAnswers = {"zero",  "one",   "two",  "three", "four", "five",   "six",
                                                         "seven", "eight", "nine", "yes",   "no",   "nothing"};
inline constexpr int64_t kYes = 10;
inline constexpr int64_t kNo = 11;
inline constexpr int64_t kNothing = 12;

/// What a question asks, whatever its words. What its kind and form do not need stays empty.
struct Meaning {
  Kind kind;
  std::optional<int64_t> cell = {};        ///< 0 to 8, row by row
  std::optional<int64_t> other_cell = {};  ///< of a comparison: the second
  std::optional<int64_t> line = {};        ///< rows 0 to 2, columns 3 to 5
  std::optional<int64_t> side = {};        ///< 0 left, 1 right, 2 above, 3 below
  std::optional<int64_t> digit = {};
  std::optional<int64_t> parity = {};  ///< 0 even, 1 odd
  std::optional<int64_t> order = {};   ///< 0 larger, 1 smaller
};

/// The answer, a place in kAnswers. REQUIRES: the question has one on this board: the digit of a relation is there once,
/// compared cells hold digits that differ, there is a digit to be the largest or smallest.
int64_t answer(const Board& board, const Meaning& meaning);

struct Question {
  Meaning meaning;
  Words words;
  int64_t answer;
};

/// What vqa understands of its grammar; see data/questions.txt.
const examples::GrammarRules& question_rules();

/// A question of this kind about the board, drawn at random; nothing if none has a sensible answer. Questions of yes or no get
/// the answer that is wanted, so that a batch can hold as many of either. Of places and neighbours one in eight is an empty
/// one.
std::optional<Question> draw_question(Kind kind, const Board& board, bool want_yes, const Grammar& grammar, Random& random);

/// The kinds of the questions about one board. Every second question of yes or no has the answer yes.
using Kinds = std::array<Kind, 14>;
inline constexpr int64_t kQuestionsPerBoard = std::tuple_size_v<Kinds>;

/// Two of every kind.
inline constexpr Kinds kEvenly = {Kind::place,   Kind::place,   Kind::relation, Kind::relation, Kind::count,
                                  Kind::count,   Kind::exist,   Kind::exist,    Kind::compare,  Kind::compare,
                                  Kind::largest, Kind::largest, Kind::smallest, Kind::smallest};

/// For training: more of those that take longest to learn, fewer of those that are learned with others.
inline constexpr Kinds kMoreRelations = {Kind::place,    Kind::place,   Kind::relation, Kind::relation, Kind::relation,
                                         Kind::relation, Kind::count,   Kind::count,    Kind::exist,    Kind::exist,
                                         Kind::compare,  Kind::compare, Kind::largest,  Kind::smallest};

/// B boards, and Q questions about each.
struct Batch {
  std::vector<Board> drawn;                      ///< B
  std::vector<std::vector<Question>> questions;  ///< B times Q
};

/// Boards of 2 to 6 digits, each number as often as the others, and questions of these kinds about each.
Batch draw_batch(const Digits& digits, const Grammar& grammar, int64_t boards, Random& random, const Kinds& kinds = kEvenly);

}  // namespace vqa
