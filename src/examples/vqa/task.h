// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/trained_model.h"
#include "vqa/model.h"
#include "vqa/questions.h"

// Training and evaluating the model, and its checkpoints.
namespace vqa {

inline constexpr auto kProgram = "vqa";

/// A batch as the model takes it.
struct Tensors {
  torch::Tensor boards;   ///< float32 [B, 1, 24, 24]
  torch::Tensor words;    ///< int64 [B, Q, T]
  torch::Tensor answers;  ///< int64 [B, Q], places in kAnswers
};

/// With `hands` the digits are changed by `jitter`.
Tensors encode(const Batch& batch, const Digits& digits, const Vocabulary& vocabulary, Random* hands = nullptr);

/// The loss of the model on a batch, the mean over its questions.
TrainingStep learn_from(Model& model, const Tensors& batch);

/// A step of Trainer: a new batch of boards, changed by `jitter`. Each process learns from its part of the batch.
Trainer::Forward training_step(
    Model model, const Digits& digits, const Grammar& grammar, torch::Device device, const Processes& processes = {});

/// How well the model answers.
struct Score {
  std::vector<Rate> kinds;            ///< in the order of QuestionKind
  Confusion confusion;                ///< over kAnswers
  std::vector<double> best_constant;  ///< for each kind, the share of its most frequent answer
  double accuracy() const;            ///< the mean over kinds
};

/// Answers kQuestionsPerBoard questions about each of `boards` boards of these digits, the same ones for the same seed. If
/// `examples` is given, it gets some answered questions of each kind, right ones and wrong ones.
Score evaluate(Model& model,
               const Digits& digits,
               const Grammar& grammar,
               torch::Device device,
               int64_t boards,
               uint64_t seed,
               std::vector<Example>* examples = nullptr);

/// Question q about board b with its answer, to be shown. board [24, 24]; truth: the right answer, or empty.
Example make_example(const Model& model,
                     const torch::Tensor& board,
                     const Words& words,
                     const Answers& answers,
                     int64_t b,
                     int64_t q,
                     const std::string& truth);

/// A model, with the grammar and the curves of its training.
struct Trained {
  Model model = nullptr;
  Grammar grammar;
  std::vector<Curve> curves;
};

/// The metadata of the model's checkpoint, and its tensors beside the model's own: pretrained encoders.
std::map<std::string, std::string> metadata_of(const Model& model, const Grammar& grammar);
std::map<std::string, torch::Tensor> pretrained_of(const Model& model);

/// The model that a file describes, with fresh weights. Throws xattn::FileError, naming the file, also if it holds pretrained
/// encoders whose code may not be run.
Trained make_again(const TrainedModel& file, Code code);

/// The model of a checkpoint, on the device and in evaluation mode. Throws likewise.
Trained load_trained(const std::string& path, torch::Device device, Code code = Code::refuse);

}  // namespace vqa
