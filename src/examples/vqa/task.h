// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/digits.h"
#include "common/grammar.h"
#include "common/report.h"
#include "common/trainer.h"
#include "common/vocabulary.h"
#include "vqa/model.h"
#include "vqa/questions.h"

namespace vqa {

using examples::Vocabulary;

/// A batch as the model takes it.
struct Tensors {
  torch::Tensor boards;   ///< float32 [B, 1, 24, 24]
  torch::Tensor words;    ///< int64 [B, Q, T]
  torch::Tensor answers;  ///< int64 [B, Q], places in kAnswers
};

/// With `hands` the digits are written by other hands; see `jitter`.
Tensors encode(const Batch& batch, const Digits& digits, const Vocabulary& vocabulary, Random* hands = nullptr);

/// The loss of the model on a batch, the mean over its questions.
examples::Step learn_from(Model& model, const Tensors& batch);

/// What `examples::Trainer` does in each step: a new batch of boards, other hands; each process of a team
/// learns from its part of them.
examples::Trainer::Forward training_step(
    Model model, const Digits& digits, const Grammar& grammar, torch::Device device, const examples::Team& team = {});

/// How well the model answers.
struct Score {
  std::vector<examples::Rate> kinds;  ///< in the order of Kind
  examples::Confusion confusion;      ///< over kAnswers
  std::vector<double> best_constant;  ///< for each kind the share of its most frequent answer
  double accuracy() const;            ///< the plain mean over kinds
};

/// Answers `boards` boards of these digits, the same ones for the same seed, kQuestionsPerBoard questions about each.
/// If `examples` is given, up to `wanted` answered questions go there, wrong ones first, all kinds as evenly as possible.
Score evaluate(Model& model,
               const Digits& digits,
               const Grammar& grammar,
               torch::Device device,
               int64_t boards,
               uint64_t seed,
               std::vector<examples::Example>* examples = nullptr);

/// A question with its answer for the eye. scores [13], word_weights [T, Lk], answer_weights [Lk] are the model's of this
/// question.
examples::Example make_example(const Model& model,
                               const torch::Tensor& board,
                               const Words& words,
                               const Answers& answers,
                               int64_t b,
                               int64_t q,
                               const std::string& truth);

}  // namespace vqa
