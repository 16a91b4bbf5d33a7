// SPDX-License-Identifier: Apache-2.0

// Training that stops and continues.
#include "common/trainer.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/torch.h>
#include <xattn/checkpoint.h>
#include <xattn/file_error.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "common/trained_model.h"
#include "one_thread.h"
#include "programs/program.h"
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
  return [model](Random& random) mutable -> TrainingStep {
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

TEST(TrainerTest, RefusesAStateThatIsDamagedAndKeepsItsOwn) {
  auto model = make_model();
  Trainer trainer(model.ptr(), kOptions);
  const auto before = model->parameters().at(0).clone();
  const auto refused = [&](const std::string& name, const torch::Tensor& tensor) {
    auto other = make_model();
    auto state = Trainer(other.ptr(), kOptions).state();
    other->parameters().at(0).detach().zero_();
    state[name] = tensor;
    const auto message = error_of<xattn::FileError>([&] { trainer.load_state(state); });
    EXPECT_TRUE(model->parameters().at(0).equal(before)) << name;
    EXPECT_EQ(trainer.step(), 0) << name;
    return message;
  };
  const std::string step = "the state of the training must have a step from 0 to 24, int64 []";
  EXPECT_EQ(refused("step", torch::tensor(25)), step);
  EXPECT_EQ(refused("step", torch::tensor(-1)), step);
  EXPECT_EQ(refused("step", torch::zeros({2}, torch::kInt64)), step);
  EXPECT_EQ(refused("step", torch::tensor(1.5)), step);
  EXPECT_EQ(refused("random.batches", torch::zeros({3}, torch::kUInt8)),
            "random.batches in the state of the training must be the state of a random generator");
  EXPECT_EQ(refused("random.default", torch::zeros({5056})),
            "random.default in the state of the training must be the state of a random generator");
  EXPECT_EQ(refused("curve.loss", torch::zeros({2, 3})), "must hold curve.loss, float64 [2, N]");
}

// ---- Files that cannot be written -------------------------------------------------------------------------------------------

class TrainingRunTest : public testing::Test {
 protected:
  // Trains to the end. Returns what is printed on standard error meanwhile.
  std::string train(const TrainingRun& run) {
    auto model = make_model();
    Trainer trainer(model.ptr(), kOptions);
    std::ostringstream out, err;
    auto* const out_before = std::cout.rdbuf(out.rdbuf());
    auto* const err_before = std::cerr.rdbuf(err.rdbuf());
    try {
      run.run(trainer, step_of(model));
    } catch (const xattn::FileError& error) {
      error_ = error.what();
    }
    std::cout.rdbuf(out_before);
    std::cerr.rdbuf(err_before);
    return err.str();
  }

  const xattn::test::TempDir dir_;
  TrainingRun run_ = {.program = "vqa",
                      .output = dir_.file("x"),
                      .unit = "questions",
                      .metadata = {},
                      .extra = {},
                      .between_saves = std::chrono::milliseconds(-1)};
  std::string error_;
};

TEST_F(TrainingRunTest, AStateThatCannotBeSavedIsAWarningAndTheTrainingGoesOn) {
  std::filesystem::create_directory(run_.state_path());  // as if the disk were full
  const auto warnings = train(run_);
  EXPECT_EQ(error_, "");
  const auto warning = "vqa: warning: the training goes on, but its state is not saved: [safetensors] " + run_.state_path() +
                       ": exists, but is not a regular file\n";
  EXPECT_TRUE(warnings.starts_with(warning)) << warnings;
  EXPECT_EQ(xattn::load_tensors(run_.output).count("model.0.weight"), 1U);
}

// A file that may not grow stands for a full disk: the old state must be kept.
TEST_F(TrainingRunTest, AFullDiskKeepsTheStateThatWasSavedBefore) {
  xattn::test::write_bytes(run_.state_path(), "the old state");
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit full{512, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
  const auto warnings = train(run_);
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(
      warnings.find("its state is not saved: [safetensors] " + run_.state_path() + ": cannot be written: File too large\n"),
      std::string::npos)
      << warnings;
  EXPECT_EQ(error_, "[safetensors] " + run_.output +
                        ": cannot be written: File too large; make room, and go on with: vqa train " + "--resume --output " +
                        run_.output);
  EXPECT_EQ(xattn::test::read_bytes(run_.state_path()), "the old state");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir_.path()), {}), 1);
}

TEST_F(TrainingRunTest, ACheckpointThatCannotBeWrittenAtTheEndIsKeptAsAState) {
  std::filesystem::create_directory(run_.output);
  EXPECT_EQ(train(run_), "");
  EXPECT_EQ(error_, "[safetensors] " + run_.output + ": exists, but is not a regular file; the training is done and saved in " +
                        run_.state_path() + "; go on with: vqa train --resume --output " + run_.output);
  auto model = make_model();
  Trainer trainer(model.ptr(), kOptions);
  trainer.load_state(xattn::load_tensors(run_.state_path()));
  EXPECT_EQ(trainer.step(), kOptions.steps);
}

TEST_F(TrainingRunTest, ToldBeforehandWhatCannotBeWrittenOrWouldBeLost) {
  EXPECT_NO_THROW(run_.check_outputs(Start::fresh));
  EXPECT_TRUE(std::filesystem::is_empty(dir_.path()));
  xattn::test::write_bytes(run_.state_path(), "a state");
  EXPECT_NO_THROW(run_.check_outputs(Start::resume));
  EXPECT_NO_THROW(run_.check_outputs(Start::restart));
  EXPECT_EQ(error_of<program::UsageError>([&] { run_.check_outputs(Start::fresh); }),
            run_.state_path() + " holds a training that was stopped; continue it with --resume, or start again with --restart");
  std::filesystem::create_directory(run_.output);
  EXPECT_EQ(error_of<xattn::FileError>([&] { run_.check_outputs(Start::resume); }),
            "[output] " + run_.output + ": exists, but is not a regular file");
}

}  // namespace
}  // namespace examples
