// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <torch/torch.h>
#include <xattn/load.h>
#include <xattn/safetensors.h>

#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <string>

#include "common/trainer.h"
#include "ranks/processes.h"

// One of the processes that distributed_test.cpp starts: continues the training whose state is in a file, if there is one, up
// to a step, and writes the state back. With a third argument the last process dies at that step, before its backward pass, and
// the others must report it. Runs in float64, where the rounding of another order of sums stays far from any threshold.
namespace xattn::test::trainee {
namespace {

int run(int argc, char** argv) {
  try {
    const bool one_dies = argc == 4;
    if (argc != 3 && !one_dies) {
      std::cerr << "usage: trainee STATE STEP [dies]\n";
      return 2;
    }
    const std::string file = argv[1];
    const auto last = std::stoll(argv[2]);
    torch::set_num_threads(1);
    torch::manual_seed(1);
    torch::nn::Sequential model(torch::nn::Linear(4, 16), torch::nn::Tanh(), torch::nn::Linear(16, 1));
    model->to(torch::kDouble);
    const auto processes = examples::Processes::from_environment(torch::kCPU);
    examples::Trainer trainer(model.ptr(), {.steps = 24, .warm_up = 4, .seed = 7}, processes);
    if (std::filesystem::exists(file)) trainer.load_state(xattn::load_tensors(file));
    const auto forward = [&](examples::Random& random) -> examples::TrainingStep {
      if (one_dies && trainer.step() == last && processes.rank() == processes.size() - 1) std::_Exit(0);
      const auto x = processes.part_of(torch::rand({11, 4}, random.generator(), torch::kDouble));
      const auto error = model->forward(x).squeeze(1) - x.sum(1);
      return {error.square().mean(), error.abs().lt(0.5).to(torch::kDouble).mean(), x.size(0)};
    };
    try {
      trainer.run(forward, [](const auto&) {}, [&] { return !one_dies && trainer.step() == last; });
    } catch (const examples::LostProcess& error) {
      const auto expected = fmt::format("process {} of {} lost the others", processes.rank(), processes.size());
      if (one_dies && std::string(error.what()).starts_with(expected)) std::_Exit(0);  // the group cannot be left in order
      throw;
    }
    if (trainer.step() != last) throw std::runtime_error(fmt::format("stands at step {}", trainer.step()));
    if (processes.leads()) xattn::save_safetensors(file, trainer.state());
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}

const bool is_known = processes().emplace("trainee", run).second;

}  // namespace
}  // namespace xattn::test::trainee
