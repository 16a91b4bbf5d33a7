// SPDX-License-Identifier: Apache-2.0

// Training that stops and goes on.
#include "common/trainer.h"

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/file_error.h>

#include <string>
#include <vector>

#include "one_thread.h"
#include "test_util.h"

namespace examples {
namespace {

using xattn::test::error_of;
using xattn::test::OneThread;

constexpr TrainerOptions kOptions = {.steps = 24, .warm_up = 4, .seed = 7};

// Learns the sum of its inputs; with dropout, which draws from LibTorch's own generator, and a norm, which has buffers.
torch::nn::Sequential make_model() {
  torch::manual_seed(1);
  return torch::nn::Sequential(torch::nn::Linear(4, 16), torch::nn::BatchNorm1d(16), torch::nn::Dropout(0.2),
                               torch::nn::Linear(16, 1));
}

Trainer::Forward step_of(torch::nn::Sequential model) {
  return [model](Random& random) mutable -> Step {
    const auto x = torch::rand({8, 4}, random.generator());
    const auto error = model->forward(x).squeeze(1) - x.sum(1);
    return {error.square().mean(), error.abs().lt(0.5).to(torch::kFloat32).mean(), 8};
  };
}

const auto kNoReport = [](const Progress&) {};
const auto kNever = [] { return false; };

TEST(TrainerTest, GoesOnAsIfItHadNotStopped) {
  const OneThread one_thread;
  auto model = make_model();
  Trainer uninterrupted(model.ptr(), kOptions);
  EXPECT_TRUE(uninterrupted.run(step_of(model), kNoReport, kNever));
  const auto expected = uninterrupted.state();

  auto first = make_model();
  Trainer stopped(first.ptr(), kOptions);
  EXPECT_FALSE(stopped.run(step_of(first), kNoReport, [&] { return stopped.step() == 9; }));
  auto state = stopped.state();
  for (auto& [name, tensor] : state) tensor = tensor.clone();  // as a file would

  torch::rand({100});  // another process has drawn other numbers by then
  auto second = make_model();
  torch::manual_seed(99);
  Trainer resumed(second.ptr(), kOptions);
  resumed.load_state(state);
  EXPECT_EQ(resumed.step(), 9);
  EXPECT_TRUE(resumed.run(step_of(second), kNoReport, kNever));
  for (const auto& [name, tensor] : resumed.state()) EXPECT_TRUE(tensor.equal(expected.at(name))) << name;
  EXPECT_EQ(expected.at("curve.loss").size(1), 24);
}

TEST(TrainerTest, Learns) {
  const OneThread one_thread;
  auto model = make_model();
  Trainer trainer(model.ptr(), {.steps = 300, .warm_up = 10});
  trainer.run(step_of(model), kNoReport, kNever);
  const auto& losses = trainer.curves().at(0).values;
  EXPECT_LT(losses.back(), 0.3 * losses.front());
}

TEST(TrainerTest, ReportsWhereItStands) {
  auto model = make_model();
  Trainer trainer(model.ptr(), {.steps = 25, .warm_up = 4});
  std::vector<int64_t> steps;
  trainer.run(
      step_of(model),
      [&](const Progress& progress) {
        steps.push_back(progress.step);
        EXPECT_EQ(progress.steps, 25);
        EXPECT_GT(progress.examples_per_second, 0);
        EXPECT_GE(progress.seconds_left, 0);
      },
      kNever);
  EXPECT_EQ(steps.size(), 25u);  // short trainings report, and record, every step
  EXPECT_EQ(steps.back(), 25);
}

TEST(TrainerTest, RefusesTheStateOfAnotherModelAndKeepsItsOwn) {
  auto model = make_model();
  Trainer trainer(model.ptr(), kOptions);
  const auto before = model->parameters().at(0).clone();
  auto other = torch::nn::Sequential(torch::nn::Linear(4, 3));
  auto state = Trainer(other.ptr(), kOptions).state();
  EXPECT_EQ(error_of<xattn::FileError>([&] { trainer.load_state(state); }),
            "the state of the training has no optimizer.mean.0.weight of the model's shape");
  state = Trainer(make_model().ptr(), kOptions).state();
  state.erase("step");
  EXPECT_EQ(error_of<xattn::FileError>([&] { trainer.load_state(state); }), "the state of the training has no step");
  EXPECT_TRUE(model->parameters().at(0).equal(before));
}

}  // namespace
}  // namespace examples
