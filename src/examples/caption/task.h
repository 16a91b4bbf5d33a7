// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <vector>

#include "caption/captions.h"
#include "caption/decode.h"
#include "caption/model.h"
#include "common/digits.h"
#include "common/report.h"
#include "common/trainer.h"
#include "common/vocabulary.h"

namespace caption {

using examples::Vocabulary;

/// B boards with a caption each, as the model takes them.
struct Tensors {
  torch::Tensor boards;  ///< float32 [B, 1, 24, 24]
  torch::Tensor words;   ///< int64 [B, 1, T]: kEnd, then the caption
  torch::Tensor next;    ///< int64 [B, 1, T]: the caption, then kEnd
  torch::Tensor digits;  ///< int64 [B, 9]: 0 to 9, and 10 for an empty cell
};

/// With `hands` the digits are written by other hands; see `jitter`.
Tensors encode(const std::vector<Board>& boards,
               const std::vector<Words>& captions,
               const Digits& digits,
               const Vocabulary& vocabulary,
               Random* hands = nullptr);

/// Boards of 2 to 6 digits, each number as often as the others.
std::vector<Board> draw_boards(const Digits& digits, int64_t count, Random& random);

/// Teacher forcing: the loss of each next word, given the true words before it, and that of the recogniser.
examples::Step learn_from(Model& model, const Tensors& batch);

/// What `examples::Trainer` does in each step: a new batch of boards, other hands.
examples::Trainer::Forward training_step(Model model, const Digits& digits, const Grammar& grammar, torch::Device device);

/// How many captions are right from the first word to the last: in the grammar, and true of every cell.
struct Score {
  int64_t boards = 0;
  int64_t right = 0;
  int64_t recognised = 0;             ///< boards of which the recogniser alone reads every cell rightly
  std::vector<examples::Rate> sizes;  ///< right captions, by the number of digits on the board
  examples::Confusion confusion;      ///< of the cells in captions that are in the grammar
};

/// Describes boards of these digits, the same ones for the same seed. If `examples` is given, some go there.
Score evaluate(Model& model,
               const Digits& digits,
               const Grammar& grammar,
               torch::Device device,
               int64_t boards,
               int64_t beams,
               uint64_t seed,
               std::vector<examples::Example>* examples = nullptr);

/// One board [1, 24, 24] described, with where the model looked for every word.
examples::Example describe(
    Model& model, const torch::Tensor& board, const Vocabulary& vocabulary, torch::Device device, int64_t beams);

}  // namespace caption
