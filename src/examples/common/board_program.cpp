// SPDX-License-Identifier: Apache-2.0
#include "common/board_program.h"

#include <fmt/format.h>

#include <iostream>
#include <optional>

#include "common/board.h"
#include "common/drawing.h"
#include "common/png.h"
#include "common/write_file.h"

namespace examples {
namespace {

constexpr auto kData = XATTN_EXAMPLE_DATA "/";

void add_digits(program::Command& command, BoardOptions& options) {
  command.option("--digits", options.digits, "the handwritten digits, as scripts/make_digits.py writes them");
  command.option("--report", options.report, "write an HTML page that shows the evaluation");
  command.option("--boards", options.boards, "boards to evaluate on", {.range = {{1, 1'000'000}}});
}

}  // namespace

BoardProgram::BoardProgram(std::string name, std::string unit, int64_t steps, const std::string& grammar)
    : name_(std::move(name)), unit_(std::move(unit)) {
  // The products are small, so a second thread gains little; with one, the result does not depend on the number of cores.
  options_.threads = 1;
  options_.digits = std::string(kData) + "digits.safetensors";
  options_.checkpoint = kData + name_ + ".safetensors";
  options_.output = name_ + ".safetensors";
  options_.grammar = kData + grammar;
  options_.steps = steps;
}

program::Command BoardProgram::add_command(program::Command& app,
                                           const std::string& name,
                                           const std::string& about,
                                           const std::string& example,
                                           std::function<void()> job) {
  auto command = app.subcommand(name, about, std::move(job));
  command.footer(fmt::format("Example: {} {} {}", name_, name, example));
  program::add_common_options(command, options_);
  return command;
}

program::Command BoardProgram::add_board_command(program::Command& app,
                                                 const std::string& name,
                                                 const std::string& about,
                                                 const std::string& example) {
  auto command = add_command(app, name, about, example, [this] { show_board(); });
  command.option("BOARD.png", options_.board, "3 x 3 cells: a square picture whose side is a multiple of 24 pixels",
                 {.required = true});
  command.option("--picture", options_.picture, "draw where the model looked, as PNG");
  command.option("--checkpoint", options_.checkpoint, fmt::format("a checkpoint of `{} train`", name_));
  return command;
}

int BoardProgram::run(int argc, char** argv) {
  program::Program app(name_,
                       fmt::format("Trains and runs a model that produces {} about boards of handwritten digits.", unit_));
  auto train = add_command(app, "train", "Trains a model, and evaluates it on boards of held-out digits.",
                           "--output my.safetensors --report my.html", [this] { this->train(); });
  train.option("--output", options_.output, "the checkpoint to write");
  train.flag("--resume", options_.resume, "continue the training of --output that was stopped");
  train.flag("--restart", options_.restart, "start again although a training of --output was stopped",
             {.excludes = "--resume"});
  train.option("--steps", options_.steps, "training steps", {.range = {{1, kMostSteps}}, .excludes = "--resume"});
  train.option("--grammar", options_.grammar, fmt::format("the grammar of the {}", unit_), {.excludes = "--resume"});
  add_digits(train, options_);

  auto evaluate = add_command(app, "evaluate", "Evaluates a checkpoint on boards of held-out digits, always the same ones.",
                              "--report evaluation.html", [this] { evaluate_checkpoint(); });
  evaluate.option("--checkpoint", options_.checkpoint, fmt::format("a checkpoint of `{} train`", name_));
  evaluate.flag("--json", options_.json, "print one JSON object");
  add_digits(evaluate, options_);

  add_own(app, train, evaluate);
  return app.run_subcommand(argc, argv, "A subcommand is required");
}

void BoardProgram::train() {
  const auto device = Processes::device_of(program::apply(options_));
  TrainingRun run = {.program = name_, .output = options_.output, .unit = unit_};
  run.check_outputs(options_.resume ? Start::resume : options_.restart ? Start::restart : Start::fresh);
  check_output(options_.report);
  const auto digits = load_digits(options_.digits);

  std::optional<TrainedModel> state;
  if (options_.resume) state = read_trained_model(run.state_path(), name_);
  const auto model = make_model(state ? &*state : nullptr);
  const auto training = state ? training_of(*state) : TrainerOptions{.steps = options_.steps, .seed = options_.seed};
  model->to(device);
  const auto processes = Processes::from_environment(device);
  Trainer trainer(model, training, processes);
  if (state) naming_file(state->path, [&] { trainer.load_state(state->tensors); });

  describe_model(run);
  if (processes.leads()) {
    std::cout << fmt::format("Training on boards of {} handwritten digits; {} others are held out.\n",
                             digits.training.labels.size(0), digits.held_out.labels.size(0));
  }
  run.run(trainer, training_step(digits.training, device, processes));
  if (!processes.leads()) return;
  std::cout << fmt::format("Trained; the checkpoint is {}. On boards of held-out digits:\n", options_.output);
  std::cout << evaluate_and_report(digits.held_out, device, trainer.curves()).text;
}

void BoardProgram::evaluate_checkpoint() {
  const auto device = program::apply(options_);
  check_output(options_.report);
  auto curves = load_model(device);
  const auto evaluation = evaluate_and_report(load_digits(options_.digits).held_out, device, std::move(curves));
  std::cout << (options_.json ? evaluation.json.dump() + "\n" : evaluation.text);
}

Evaluation BoardProgram::evaluate_and_report(const Digits& digits, torch::Device device, std::vector<Curve> curves) {
  auto evaluation = evaluate(digits, device, /*with_examples=*/!options_.report.empty());
  evaluation.report.curves = std::move(curves);
  if (!options_.report.empty()) write_report(options_.report, evaluation.report);
  return evaluation;
}

void BoardProgram::show_board() {
  const auto device = program::apply(options_);
  check_output(options_.picture);
  load_model(device);
  const torch::NoGradGuard no_grad;
  const auto [text, example] = look_at(read_board(options_.board), device);
  std::cout << text << "\n";
  if (options_.picture.empty()) return;
  write_png(options_.picture, draw_example(example));
  std::cout << "Where it looked is drawn in " << options_.picture << ".\n";
}

}  // namespace examples
