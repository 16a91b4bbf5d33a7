// SPDX-License-Identifier: Apache-2.0
#include "train.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/nn/functional/loss.h>
#include <torch/optim/adam.h>
#include <torch/utils.h>

namespace vqa {
namespace {

// Falls in a straight line, from all of `rate` at the first step to almost nothing at the last.
void set_learning_rate(torch::optim::Adam& optimizer, double rate, int64_t step, int64_t steps) {
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(rate * static_cast<double>(steps - step) / static_cast<double>(steps));
  }
}

torch::Tensor is_right(const torch::Tensor& scores, const Batch& batch) {
  return scores.argmax(-1).eq(batch.answers);  // [B, Q, 10] -> [B, Q]
}

}  // namespace

void train(Model& model,
           const Digits& digits,
           const TrainOptions& options,
           const std::function<void(const Progress&)>& report) {
  constexpr int64_t kStepsPerReport = 10;  // on a GPU a report waits for the device
  auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  torch::optim::Adam optimizer(model->parameters(), options.learning_rate);
  model->train();
  for (int64_t step = 0; step < options.steps; ++step) {
    set_learning_rate(optimizer, options.learning_rate, step, options.steps);
    const auto batch = draw_batch(digits, options.boards, options.questions, generator).to(options.device);

    const auto scores = std::get<0>(model->forward(batch.boards, batch.words));           // [B, Q, 10]
    const auto loss = torch::nn::functional::cross_entropy(scores.flatten(0, 1),          // [B * Q, 10]
                                                           batch.answers.flatten(0, 1));  // [B * Q]
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();

    if ((step + 1) % kStepsPerReport == 0 || step + 1 == options.steps) {
      report({step + 1, loss.item<double>(), is_right(scores, batch).to(torch::kFloat32).mean().item<double>()});
    }
  }
}

Score evaluate(Model& model, const Digits& digits, torch::Device device) {
  constexpr uint64_t kSeed = 1;
  constexpr int64_t kBoards = 100;  // at a time
  constexpr int64_t kTimes = 10;
  const torch::NoGradGuard no_grad;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(kSeed);
  model->eval();
  auto sums = torch::zeros({2}, torch::TensorOptions(torch::kFloat64).device(device));
  for (int64_t i = 0; i < kTimes; ++i) {
    const auto batch = draw_batch(digits, kBoards, kCells, generator).to(device);
    const auto [scores, attention] = model->forward(batch.boards, batch.words);
    sums += torch::stack(
        {is_right(scores, batch).sum(torch::kFloat64), share_in_cell(attention, batch.cells).sum(torch::kFloat64)});
  }
  constexpr auto questions = kTimes * kBoards * kCells;
  return {sums[0].item<double>() / questions, sums[1].item<double>() / questions, questions};
}

}  // namespace vqa
