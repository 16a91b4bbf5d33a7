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

/// What one step found on its batch.
struct Step {
  torch::Tensor loss;      ///< a scalar with its graph, the mean over the examples
  torch::Tensor accuracy;  ///< a scalar from 0 to 1
  int64_t examples;        ///< questions, or sentences
};

struct TrainerOptions {
  int64_t steps = 1500;
  double learning_rate = 2e-3;  ///< its highest: it grows over `warm_up` steps, then falls to zero along a cosine
  int64_t warm_up = 100;
  double weight_decay = 0.01;
  double largest_gradient = 1;  ///< longer ones, in the norm of all parameters together, are cut to this
  uint64_t seed = 0;            ///< of the draws that `forward` makes
};

/// Where the training stands.
struct Progress {
  int64_t step;  ///< counted from 1
  int64_t steps;
  double loss;      ///< of this step
  double accuracy;  ///< likewise
  double examples_per_second;
  double seconds_left;
};

/// Trains a module by AdamW, and can stop and go on: a trainer made in the same way, with the state of one that stopped, comes
/// on one thread to the same bits as if there had been no stop. The processes of a team train as one: each step is that of all
/// their examples together, and only their number may differ where a training goes on.
class Trainer {
 public:
  /// Draws a batch and runs the model on it. Everything random in it must come from the generator given, which draws the same in
  /// all processes of a team; each runs the model on its part of the batch.
  using Forward = std::function<Step(Random&)>;

  Trainer(std::shared_ptr<torch::nn::Module> model, const TrainerOptions& options, const Team& team = {});
  ~Trainer();

  /// Goes on to the last step, or until `stop` says so after a step. True if the last step is done.
  bool run(const Forward& forward, const std::function<void(const Progress&)>& report, const std::function<bool()>& stop);

  int64_t step() const { return step_; }
  const TrainerOptions& options() const { return options_; }
  const Team& team() const { return team_; }

  /// Loss and accuracy, about a hundred points each.
  const std::vector<Curve>& curves() const { return curves_; }

  /// All that `run` needs to go on, parameters and buffers of the model included, by name.
  std::map<std::string, torch::Tensor> state();

  /// Throws xattn::FileError if the state is of another model, incomplete or damaged. Then nothing has changed.
  void load_state(const std::map<std::string, torch::Tensor>& state);

 private:
  Step learn(const Forward& forward);
  void backward(Step& step);

  std::shared_ptr<torch::nn::Module> model_;
  TrainerOptions options_;
  torch::optim::AdamW optimizer_;
  Random random_;
  Team team_;
  std::unique_ptr<c10d::Reducer> reducer_;  // averages gradients over the team while they are made; none alone
  int64_t step_ = 0;
  std::vector<Curve> curves_ = {{"loss", {}, {}}, {"accuracy", {}, {}}};
};

/// Curves as tensors "curve.NAME" [2, N] and back, for files.
std::map<std::string, torch::Tensor> pack(const std::vector<Curve>& curves);
/// Throws xattn::FileError if they are not there, or something else.
std::vector<Curve> unpack_curves(const std::map<std::string, torch::Tensor>& tensors);

}  // namespace examples
