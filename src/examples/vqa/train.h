// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <functional>

#include "board.h"
#include "model.h"

namespace vqa {

struct TrainOptions {
  int64_t steps = 300;
  int64_t boards = 32;    ///< in each step
  int64_t questions = 9;  ///< about each board
  double learning_rate = 2e-3;
  uint64_t seed = 0;  ///< of boards and questions
  torch::Device device = torch::kCPU;
};

/// Of the batch of one step.
struct Progress {
  int64_t step;  ///< counted from 1
  double loss;
  double accuracy;
};

/// Trains encoder, embedding, cross attention and classifier together, with the answers alone: no loss sees the attention.
/// Calls `report` every tenth step and after the last.
void train(Model& model, const Digits& digits, const TrainOptions& options, const std::function<void(const Progress&)>& report);

struct Score {
  double accuracy;       ///< share of questions answered rightly
  double share_in_cell;  ///< mean share of the attention that falls into the asked cell
  int64_t questions;
};

/// Asks about 1,000 boards of these digits, the same ones at each call.
Score evaluate(Model& model, const Digits& digits, torch::Device device);

}  // namespace vqa
