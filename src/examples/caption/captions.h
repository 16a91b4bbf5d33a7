// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/board.h"
#include "common/grammar.h"
#include "common/random.h"

namespace caption {

using examples::Board;
using examples::Digits;
using examples::Grammar;
using examples::Random;
using examples::Words;

/// What caption understands of its grammar; see data/captions.txt.
const examples::GrammarRules& caption_rules();

/// A caption of the board, in forms and phrases drawn at random. It names all digits, row by row.
Words draw_caption(const Board& board, const Grammar& grammar, Random& random);

/// The words of the longest caption there can be.
int64_t longest_caption(const Grammar& grammar);

/// Understands captions.
class CaptionReader {
 public:
  /// The grammar must outlive this.
  explicit CaptionReader(const Grammar& grammar);

  /// What the caption says is in each cell, in any order, a digit or kEmpty; nothing if it is not in the grammar, or says two
  /// things of one cell.
  std::optional<std::array<int64_t, examples::kCells>> read(const Words& caption) const;

 private:
  struct Item {
    size_t form;
    int64_t digit;
    int64_t cell;
  };
  std::optional<Item> item_of(const Words& words) const;

  const Grammar& grammar_;
  std::vector<std::pair<Words, Words>> frames_;  // what stands before and behind the items
  std::vector<Words> between_;
  std::vector<Words> before_last_;
};

}  // namespace caption
