// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/processes.h"
#include "common/random.h"
#include "common/report.h"

namespace c10d {
class Reducer;
}

namespace examples {

inline constexpr int64_t kMostSteps = 10'000'000;  ///< of a training

/// The result of one step on its batch.
struct TrainingStep {
  torch::Tensor loss;      ///< a scalar with its graph, the mean over the examples
  torch::Tensor accuracy;  ///< a scalar from 0 to 1
  int64_t examples;        ///< questions, or sentences
};

struct TrainerOptions {
  int64_t steps = 1500;
  double learning_rate = 2e-3;  ///< the highest: it grows over `warm_up` steps, then falls to zero along a cosine
  int64_t warm_up = 100;
  double weight_decay = 0.01;
  double largest_gradient = 1;  ///< the norm over all parameters is clipped to this
  uint64_t seed = 0;            ///< of the random numbers in `forward`
};

/// The state of a training after a step.
struct Progress {
  int64_t step;  ///< counted from 1
  int64_t steps;
  double loss;      ///< of this step
  double accuracy;  ///< likewise
  double examples_per_second;
  double seconds_left;
};

/// Trains a module with AdamW, and can stop and continue: a trainer made in the same way, with the state of one that stopped,
/// reaches the same bits on one thread as an uninterrupted training. Several processes train as one: each step covers the
/// examples of all. A training may continue with another number of processes.
class Trainer {
 public:
  /// Draws a batch and runs the model on it. All randomness must come from the given generator, which draws the same numbers in
  /// all processes; each process runs the model on its part of the batch.
  using Forward = std::function<TrainingStep(Random&)>;

  Trainer(std::shared_ptr<torch::nn::Module> model, const TrainerOptions& options, const Processes& processes = {});
  ~Trainer();

  /// Trains to the last step, or until `stop` returns true after a step. Returns whether the last step is done.
  bool run(const Forward& forward, const std::function<void(const Progress&)>& report, const std::function<bool()>& stop);

  int64_t step() const { return step_; }
  const TrainerOptions& options() const { return options_; }
  const Processes& processes() const { return processes_; }

  /// Loss and accuracy, about a hundred points each.
  const std::vector<Curve>& curves() const { return curves_; }

  /// Everything that `run` needs to continue, including the model's parameters and buffers, by name.
  std::map<std::string, torch::Tensor> state();

  /// Throws xattn::FileError if the state is of another model, incomplete or damaged, and then changes nothing.
  void load_state(const std::map<std::string, torch::Tensor>& state);

 private:
  TrainingStep learn(const Forward& forward);
  void backward(TrainingStep& step);

  std::shared_ptr<torch::nn::Module> model_;
  TrainerOptions options_;
  torch::optim::AdamW optimizer_;
  Random random_;
  Processes processes_;
  std::unique_ptr<c10d::Reducer> reducer_;  // averages gradients over the processes during backward; null in a single process
  int64_t step_ = 0;
  std::vector<Curve> curves_ = {{"loss", {}, {}}, {"accuracy", {}, {}}};
};

/// Curves as tensors "curve.NAME" [2, N] and back, for files.
std::map<std::string, torch::Tensor> pack(const std::vector<Curve>& curves);
/// Throws xattn::FileError if the curves are missing or malformed.
std::vector<Curve> unpack_curves(const std::map<std::string, torch::Tensor>& tensors);

}  // namespace examples
