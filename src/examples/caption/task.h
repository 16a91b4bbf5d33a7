// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "caption/captions.h"
#include "caption/model.h"
#include "common/trained_model.h"

// Training and evaluating the model, and its checkpoints.
namespace caption {

inline constexpr auto kProgram = "caption";

/// B boards with a caption each, as the model takes them.
struct Tensors {
  torch::Tensor boards;  ///< float32 [B, 1, 24, 24]
  torch::Tensor words;   ///< int64 [B, 1, T]: kEnd, then the caption
  torch::Tensor next;    ///< int64 [B, 1, T]: the caption, then kEnd
  torch::Tensor digits;  ///< int64 [B, 9]: 0 to 9, and 10 for an empty cell
};

/// With `hands` the digits are changed by `jitter`.
Tensors encode(const std::vector<Board>& boards,
               const std::vector<Words>& captions,
               const Digits& digits,
               const Vocabulary& vocabulary,
               Random* hands = nullptr);

/// Boards of 2 to 6 digits, each number equally often.
std::vector<Board> draw_boards(const Digits& digits, int64_t count, Random& random);

/// Teacher forcing: the loss of each next word, given the true words before it, and the loss of the recogniser.
TrainingStep learn_from(Model& model, const Tensors& batch);

/// A step of Trainer: a new batch of boards, changed by `jitter`.
Trainer::Forward training_step(Model model, const Digits& digits, const Grammar& grammar, torch::Device device);

/// A caption is right if it is in the grammar and true of every cell.
struct Score {
  int64_t boards = 0;
  int64_t right = 0;
  int64_t recognised = 0;   ///< boards on which the recogniser alone reads every cell correctly
  std::vector<Rate> sizes;  ///< right captions, by the number of digits on the board
  Confusion confusion;      ///< of the cells in captions that are in the grammar
};

/// Describes boards of these digits, the same ones for the same seed. If `examples` is given, it gets some of them.
Score evaluate(Model& model,
               const Digits& digits,
               const Grammar& grammar,
               torch::Device device,
               int64_t boards,
               int64_t beams,
               uint64_t seed,
               std::vector<Example>* examples = nullptr);

/// The caption of one board [1, 24, 24], with the attention map of every word.
Example describe(Model& model, const torch::Tensor& board, const Vocabulary& vocabulary, torch::Device device, int64_t beams);

/// A model, with the grammar and the curves of its training.
struct Trained {
  Model model = nullptr;
  Grammar grammar;
  std::vector<Curve> curves;
};

/// A model with fresh weights for this grammar.
Trained make_model(Grammar grammar);

/// The metadata of the model's checkpoint.
std::map<std::string, std::string> metadata_of(const Grammar& grammar);

/// The model that a file describes, with fresh weights.
Trained make_again(const TrainedModel& file);

/// The model of a checkpoint, on the device and in evaluation mode. Throws xattn::FileError, naming the file.
Trained load_trained(const std::string& path, torch::Device device);

}  // namespace caption
