// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "common/board.h"
#include "common/report.h"
#include "common/trained_model.h"
#include "common/trainer.h"
#include "programs/program.h"

namespace examples {

inline constexpr uint64_t kEvaluationSeed = 12345;  ///< an evaluation always has the same boards

/// The options that the programs share.
struct BoardOptions : program::CommonOptions {
  std::string digits;
  std::string checkpoint;
  std::string report;
  std::string output;
  std::string grammar;
  std::string board;
  std::string picture;
  bool resume = false;
  bool restart = false;
  bool json = false;
  int64_t steps = 0;
  int64_t boards = 1000;
};

/// The result of an evaluation: as lines of text, as JSON, and as a page without its curves.
struct Evaluation {
  std::string text;
  nlohmann::json json;
  Report report;
};

/// A program that trains a model on boards of digits, evaluates it, and runs it on one board. The virtual functions are the
/// parts in which vqa and caption differ.
class BoardProgram {
 public:
  virtual ~BoardProgram() = default;

  /// Parses the arguments and runs a subcommand. Returns the exit status.
  int run(int argc, char** argv);

 protected:
  /// name: the program's, in its checkpoints and their file names; unit: the unit that training counts, "questions"; steps: the
  /// default length of a training; grammar: the default grammar, a file of examples/data.
  BoardProgram(std::string name, std::string unit, int64_t steps, const std::string& grammar);

  program::Command add_command(program::Command& app,
                               const std::string& name,
                               const std::string& about,
                               const std::string& example,
                               std::function<void()> job);
  /// A subcommand that runs `look_at`, with the options for it.
  program::Command add_board_command(program::Command& app,
                                     const std::string& name,
                                     const std::string& about,
                                     const std::string& example);

  // ---- The parts that differ between programs ------------------------------------------------------------------------------

  /// Adds the program's own options and subcommands.
  virtual void add_own(program::Program& app, program::Command& train, program::Command& evaluate) = 0;

  /// Makes the model that the file describes or, without a file, the options; its weights are fresh.
  virtual std::shared_ptr<torch::nn::Module> make_model(const TrainedModel* file) = 0;
  /// Reads the model of the checkpoint, and returns the curves of its training.
  virtual std::vector<Curve> load_model(torch::Device device) = 0;

  virtual Trainer::Forward training_step(const Digits& digits, torch::Device device, const Processes& processes) = 0;
  /// Adds to the run the metadata and tensors that the checkpoint holds beside the weights.
  virtual void describe_model(TrainingRun& run) const = 0;

  /// Evaluates on boards of these digits. with_examples: whether the report needs examples.
  virtual Evaluation evaluate(const Digits& digits, torch::Device device, bool with_examples) = 0;

  /// Runs the model on one board [1, 24, 24]. Returns a line of text, and the example to draw.
  virtual std::pair<std::string, Example> look_at(const torch::Tensor& board, torch::Device device) = 0;

  BoardOptions options_;

 private:
  void train();
  void evaluate_checkpoint();
  void show_board();
  Evaluation evaluate_and_report(const Digits& digits, torch::Device device, std::vector<Curve> curves);

  std::string name_;
  std::string unit_;
};

}  // namespace examples
