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

using namespace examples;  // the parts that the programs share

/// The slots and kinds of the grammar; see data/captions.txt.
const GrammarRules& caption_rules();

/// A caption of the board, with random forms and phrases. It names all digits, row by row.
Words draw_caption(const Board& board, const Grammar& grammar, Random& random);

/// The number of words of the longest possible caption.
int64_t longest_caption(const Grammar& grammar);

/// Parses captions.
class CaptionReader {
 public:
  /// The grammar must outlive this.
  explicit CaptionReader(const Grammar& grammar);

  /// The content of each cell according to the caption, a digit or kEmpty. Items may be in any order. Returns nothing if the
  /// caption is not in the grammar, or names a cell twice.
  std::optional<std::array<int64_t, kCells>> read(const Words& caption) const;

 private:
  struct CaptionItem {
    size_t form;
    int64_t digit;
    int64_t cell;
  };
  std::optional<CaptionItem> item_of(const Words& words) const;
  std::optional<std::array<int64_t, kCells>> read_items(const Words& words) const;

  const Grammar& grammar_;
  std::vector<std::pair<Words, Words>> frames_;  // the words before and after the items
  std::vector<Words> between_;
  std::vector<Words> before_last_;
};

}  // namespace caption
