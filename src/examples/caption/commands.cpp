// SPDX-License-Identifier: Apache-2.0
#include "caption/commands.h"

#include <fmt/format.h>

#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/printed.h"
#include "caption/captions.h"
#include "caption/task.h"
#include "caption/trained.h"
#include "common/board.h"
#include "common/digits.h"
#include "common/png.h"
#include "common/report.h"
#include "common/tiles.h"
#include "common/trained_model.h"
#include "common/write_file.h"
#include "programs/launch.h"
#include "programs/program.h"

namespace caption {
namespace {

struct Options : program::CommonOptions {
  // The products are small: two threads gain little, and on a busy machine they wait for each other at every one. And so the
  // result does not depend on the number of cores.
  Options() { threads = 1; }

  std::string digits = XATTN_EXAMPLE_DATA "/digits.safetensors";
  std::string checkpoint = XATTN_EXAMPLE_DATA "/caption.safetensors";
  std::string report = {};
  int64_t boards = 1000;
  int64_t beams = 1;

  // train
  std::string output = "caption.safetensors";
  std::string grammar = XATTN_EXAMPLE_DATA "/captions.txt";
  bool resume = false;
  bool restart = false;
  int64_t steps = 5000;

  // describe
  std::string board = {};
  std::string picture = {};

  // evaluate
  bool json = false;
};

constexpr uint64_t kEvaluationSeed = 12345;  // always the same boards

double share(int64_t part, int64_t whole) {
  return static_cast<double>(part) / static_cast<double>(whole);
}

std::string summary(const caption::Score& score) {
  return fmt::format(
      "{:.1f} % of {} captions of held-out boards wholly right; the digit recogniser alone reads every cell of {:.1f} % "
      "rightly",
      100 * share(score.right, score.boards), score.boards, 100 * share(score.recognised, score.boards));
}

// Describes held-out boards, and writes the report if there is to be one.
caption::Score evaluate(caption::Trained& trained,
                        const caption::Digits& held_out,
                        torch::Device device,
                        const Options& options) {
  std::vector<examples::Example> shown;
  const auto score = caption::evaluate(trained.model, held_out, trained.grammar, device, options.boards, options.beams,
                                       kEvaluationSeed, options.report.empty() ? nullptr : &shown);
  if (!options.report.empty()) {
    examples::write_report(options.report,
                           {.title = "Captions of boards of handwritten digits",
                            .summary = summary(score) + ".",
                            .facts = {{"boards", fmt::format("{}", options.boards)},
                                      {"search", options.beams == 1 ? "greedy" : fmt::format("{} beams", options.beams)}},
                            .curves = trained.curves,
                            .rates = score.sizes,
                            .confusion = score.confusion,
                            .examples = std::move(shown)});
  }
  return score;
}

void train(const Options& options) {
  const auto device = program::apply(options);
  if (const auto place = launch::find_place(); place && place->size > 1) {
    throw std::runtime_error(fmt::format("the captions are learned in one process, but {} were started", place->size));
  }
  examples::TrainingRun run = {
      .program = caption::kProgram, .output = options.output, .unit = "captions", .metadata = {}, .extra = {}};
  run.check_outputs(examples::start_of(options.resume, options.restart));
  examples::check_output(options.report);
  const auto digits = examples::load_digits(options.digits);

  std::optional<examples::Checkpoint> state;
  if (options.resume) state = examples::read_checkpoint(run.state_path(), caption::kProgram);
  auto trained = state ? caption::make_again(*state)
                       : caption::make_model(examples::read_grammar(options.grammar, caption::caption_rules()));
  const auto training =
      state ? examples::training_of(*state) : examples::TrainerOptions{.steps = options.steps, .seed = options.seed};
  trained.model->to(device);
  examples::Trainer trainer(trained.model.ptr(), training);
  if (state) examples::naming_file(state->path, [&] { trainer.load_state(state->tensors); });

  run.metadata = caption::metadata_of(trained.grammar);
  std::cout << fmt::format("Training on boards of {} handwritten digits; {} others are held out.\n",
                           digits.training.labels.size(0), digits.held_out.labels.size(0));
  run.run(trainer, caption::training_step(trained.model, digits.training, trained.grammar, device));
  trained.curves = trainer.curves();
  std::cout << "Trained; the checkpoint is " << options.output << ".\n";
  std::cout << summary(evaluate(trained, digits.held_out, device, options)) << ".\n";
}

void describe(const Options& options) {
  const auto device = program::apply(options);
  examples::check_output(options.picture);
  auto trained = caption::load_trained(options.checkpoint, device);
  const caption::Vocabulary vocabulary(trained.grammar.vocabulary());
  const auto example = caption::describe(trained.model, examples::read_board(options.board), vocabulary, device, options.beams);
  std::cout << xattn::detail::one_line(example.title) << "\n";  // the words are the checkpoint's
  if (!options.picture.empty()) {
    examples::write_png(options.picture, examples::draw_example(example));
    std::cout << "Where it looked for each word is drawn in " << options.picture << ".\n";
  }
}

void evaluate(const Options& options) {
  const auto device = program::apply(options);
  examples::check_output(options.report);
  auto trained = caption::load_trained(options.checkpoint, device);
  const auto score = evaluate(trained, examples::load_digits(options.digits).held_out, device, options);
  if (options.json) {
    std::cout << nlohmann::json({{"exact_match", share(score.right, score.boards)},
                                 {"recogniser", share(score.recognised, score.boards)},
                                 {"boards", score.boards},
                                 {"beams", options.beams}})
                     .dump()
              << "\n";
  } else {
    std::cout << summary(score) << ".\n";
  }
}

}  // namespace

int run(int argc, char** argv) {
  program::Program app("caption", "Image captioning on boards of handwritten digits.");
  app.footer("Example: caption describe board.png --picture words.png");
  Options options;
  const auto add_command = [&](const char* name, const char* text, const char* example, void (*job)(const Options&)) {
    auto command = app.subcommand(name, text, [&options, job] { job(options); });
    command.footer(std::string("Example: ") + example);
    program::add_common_options(command, options);
    command.option("--beams", options.beams, "beginnings that the search keeps; 1 is greedy").range(1, 1000).shows_default();
    return command;
  };
  const auto add_digits = [&](program::Command& command) {
    command.option("--digits", options.digits, "the handwritten digits, as scripts/make_digits.py writes them").shows_default();
    command.option("--report", options.report, "write an HTML page here that shows the evaluation");
    command.option("--boards", options.boards, "boards to evaluate on").range(1, 1000000).shows_default();
  };
  const auto add_checkpoint = [&](program::Command& command) {
    command.option("--checkpoint", options.checkpoint, "what `caption train` wrote").shows_default();
  };

  auto train_command = add_command("train", "Trains a model and evaluates it on boards of held-out digits.",
                                   "caption train --output my.safetensors --report my.html", train);
  train_command.option("--output", options.output, "the checkpoint to write").shows_default();
  const auto resume = train_command.flag("--resume", options.resume, "go on with the training of --output that was stopped");
  train_command.flag("--restart", options.restart, "begin anew although a training of --output was stopped").excludes(resume);
  train_command.option("--steps", options.steps, "training steps")
      .range(1, examples::kMostSteps)
      .shows_default()
      .excludes(resume);
  train_command.option("--grammar", options.grammar, "the sentences").shows_default().excludes(resume);
  add_digits(train_command);

  auto describe_command =
      add_command("describe", "Describes a board in a sentence.", "caption describe board.png --beams 4", describe);
  describe_command.option("BOARD.png", options.board, "3 x 3 cells; a square picture, its side a multiple of 24 pixels")
      .required();
  describe_command.option("--picture", options.picture, "draw here, as PNG, where the model looked for each word");
  add_checkpoint(describe_command);

  auto evaluate_command = add_command("evaluate", "Describes boards of held-out digits, always the same ones.",
                                      "caption evaluate --report evaluation.html", evaluate);
  add_checkpoint(evaluate_command);
  add_digits(evaluate_command);
  evaluate_command.flag("--json", options.json, "print one JSON object");

  return app.run_subcommand(argc, argv, "A subcommand is required");
}

}  // namespace caption
