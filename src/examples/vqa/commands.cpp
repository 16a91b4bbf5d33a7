// SPDX-License-Identifier: Apache-2.0
#include "vqa/commands.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/board.h"
#include "common/digits.h"
#include "common/png.h"
#include "common/report.h"
#include "common/tiles.h"
#include "common/trained_model.h"
#include "common/write_file.h"
#include "programs/program.h"
#include "vqa/model.h"
#include "vqa/questions.h"
#include "vqa/task.h"
#include "vqa/trained.h"

namespace vqa {
namespace {

struct Options : program::CommonOptions {
  // The products are small: two threads gain little, and on a busy machine they wait for each other at every one. And so the
  // result does not depend on the number of cores.
  Options() { threads = 1; }

  std::string digits = XATTN_EXAMPLE_DATA "/digits.safetensors";
  std::string checkpoint = XATTN_EXAMPLE_DATA "/vqa.safetensors";
  std::string report = {};
  int64_t boards = 1000;

  // train
  std::string output = "vqa.safetensors";
  std::string text = "rnn";
  std::string grammar = XATTN_EXAMPLE_DATA "/questions.txt";
  std::string image_encoder = {};
  std::string text_encoder = {};
  bool mean_pooling = false;
  bool resume = false;
  bool restart = false;
  int64_t steps = 8000;

  // ask and draw
  std::string board = {};
  std::string question = {};
  std::string picture = {};
  std::string cells = {};

  // evaluate
  bool json = false;

  bool trust_code = false;
  examples::Code code() const { return trust_code ? examples::Code::run : examples::Code::refuse; }
};

constexpr uint64_t kEvaluationSeed = 12345;  // always the same boards and questions

// The share of right answers for each kind, and their mean.
void print(const vqa::Score& score) {
  for (size_t kind = 0; kind < score.kinds.size(); ++kind) {
    const auto& [name, right, total] = score.kinds[kind];
    std::cout << fmt::format("  {:<10} {:5.1f} %   of {}; always the same answer: {:.1f} %\n", name,
                             100.0 * static_cast<double>(right) / static_cast<double>(total), total,
                             100 * score.best_constant[kind]);
  }
  std::cout << fmt::format("  {:<10} {:5.1f} %\n", "mean", 100 * score.accuracy());
}

nlohmann::json as_json(const vqa::Score& score) {
  nlohmann::json kinds;
  for (const auto& [name, right, total] : score.kinds) {
    kinds[name] = {{"accuracy", static_cast<double>(right) / static_cast<double>(total)}, {"questions", total}};
  }
  return {{"accuracy", score.accuracy()}, {"kinds", kinds}};
}

// Answers questions about held-out boards, and writes the report if there is to be one.
vqa::Score evaluate(vqa::Trained& trained, const vqa::Digits& held_out, torch::Device device, const Options& options) {
  std::vector<examples::Example> shown;
  const auto score = vqa::evaluate(trained.model, held_out, trained.grammar, device, options.boards, kEvaluationSeed,
                                   options.report.empty() ? nullptr : &shown);
  if (!options.report.empty()) {
    const auto& model = trained.model->options;
    examples::write_report(
        options.report,
        {.title = "Visual question answering on boards of handwritten digits",
         .summary = fmt::format("{:.1f} % of questions about held-out boards answered rightly, as the mean over {} kinds.",
                                100 * score.accuracy(), score.kinds.size()),
         .facts = {{"text encoder", model.text_encoder ? model.text_encoder->file_name() : model.text},
                   {"image encoder", model.image_encoder ? model.image_encoder->file_name() : "CNN, trained with the rest"},
                   {"attention", model.attention ? "cross-attention" : "none: mean pooling"},
                   {"boards", fmt::format("{}", options.boards)}},
         .curves = trained.curves,
         .rates = score.kinds,
         .confusion = score.confusion,
         .examples = std::move(shown)});
  }
  return score;
}

examples::Pretrained read_image_encoder(const std::string& path) {
  if (path.empty()) return nullptr;
  return examples::Pretrained(path);
}

examples::Pretrained read_text_encoder(const std::string& path, const vqa::Grammar& grammar) {
  if (path.empty()) return nullptr;
  examples::Pretrained encoder(path);
  if (const auto words = examples::split(encoder->extra_file("vocabulary.txt")); words != grammar.vocabulary()) {
    throw std::runtime_error(
        fmt::format("{}: must know the {} words of the grammar in their order, but has other words: {} in its "
                    "vocabulary.txt",
                    path, grammar.vocabulary().size(), words.size()));
  }
  return encoder;
}

vqa::Trained make_model(const Options& options) {
  auto grammar = examples::read_grammar(options.grammar, vqa::question_rules());
  const vqa::ModelOptions model = {.vocabulary = vqa::Vocabulary(grammar.vocabulary()).size(),
                                   .text = options.text,
                                   .attention = !options.mean_pooling,
                                   .image_encoder = read_image_encoder(options.image_encoder),
                                   .text_encoder = read_text_encoder(options.text_encoder, grammar)};
  return {vqa::Model(model), std::move(grammar), {}};
}

void train(const Options& options) {
  const auto device = examples::Team::device_of(program::apply(options));
  examples::TrainingRun run = {
      .program = vqa::kProgram, .output = options.output, .unit = "questions", .metadata = {}, .extra = {}};
  run.check_outputs(examples::start_of(options.resume, options.restart));
  examples::check_output(options.report);
  const auto digits = examples::load_digits(options.digits);

  std::optional<examples::Checkpoint> state;
  if (options.resume) state = examples::read_checkpoint(run.state_path(), vqa::kProgram);
  auto trained = state ? vqa::make_again(*state, options.code()) : make_model(options);
  const auto training =
      state ? examples::training_of(*state) : examples::TrainerOptions{.steps = options.steps, .seed = options.seed};
  trained.model->to(device);
  const auto team = examples::Team::from_environment(device);
  examples::Trainer trainer(trained.model.ptr(), training, team);
  if (state) examples::naming_file(state->path, [&] { trainer.load_state(state->tensors); });

  run.metadata = vqa::metadata_of(trained.model, trained.grammar);
  run.extra = vqa::pretrained_of(trained.model);
  if (!run.extra.empty()) run.resume_options = " --trust-code";
  if (team.leads()) {
    std::cout << fmt::format("Training on boards of {} handwritten digits; {} others are held out.\n",
                             digits.training.labels.size(0), digits.held_out.labels.size(0));
  }
  run.run(trainer, vqa::training_step(trained.model, digits.training, trained.grammar, device, team));
  if (!team.leads()) return;
  std::cout << "Trained; the checkpoint is " << options.output << ". On boards of held-out digits:\n";
  trained.curves = trainer.curves();
  print(evaluate(trained, digits.held_out, device, options));
}

void ask(const Options& options) {
  const auto device = program::apply(options);
  examples::check_output(options.picture);
  auto trained = vqa::load_trained(options.checkpoint, device, options.code());
  const auto board = examples::read_board(options.board);  // [1, 24, 24]
  const auto words = examples::split(options.question);
  if (words.empty()) throw std::runtime_error("the question has no words");
  const auto numbers = examples::Vocabulary(trained.grammar.vocabulary()).encode({words});  // [1, T]

  const torch::NoGradGuard no_grad;
  const auto answers = trained.model->forward(board.unsqueeze(0).to(device), numbers.unsqueeze(0).to(device));
  const auto example = vqa::make_example(trained.model, board[0], words, answers, 0, 0, /*truth=*/"");
  const auto certainty = answers.scores.softmax(-1).max().item<double>();
  std::cout << fmt::format("{} ({:.0f} %)\n", example.answer, 100 * certainty);
  if (!options.picture.empty()) {
    examples::write_png(options.picture, examples::draw_example(example));
    std::cout << "Where it looked is drawn in " << options.picture << ".\n";
  }
}

void evaluate(const Options& options) {
  const auto device = program::apply(options);
  examples::check_output(options.report);
  auto trained = vqa::load_trained(options.checkpoint, device, options.code());
  const auto score = evaluate(trained, examples::load_digits(options.digits).held_out, device, options);
  if (options.json) {
    std::cout << as_json(score).dump() << "\n";
  } else {
    print(score);
  }
}

void draw(const Options& options) {
  const auto digits = examples::load_digits(options.digits).held_out;
  vqa::Random random(options.seed);
  const auto board = examples::board_of(options.cells, digits, random);
  constexpr int64_t kZoom = 12;
  examples::write_png(options.board, examples::board_picture(examples::paint({board}, digits)[0][0], kZoom));
}

}  // namespace

int run(int argc, char** argv) {
  program::Program app("vqa", "Visual question answering on boards of handwritten digits.");
  app.footer("Example: vqa ask board.png \"what is left of the seven\" --picture answer.png");
  Options options;
  const auto add_command = [&](const char* name, const char* text, const char* example, void (*job)(const Options&)) {
    auto command = app.subcommand(name, text, [&options, job] { job(options); });
    command.footer(std::string("Example: ") + example);
    program::add_common_options(command, options);
    command.option("--digits", options.digits, "the handwritten digits, as scripts/make_digits.py writes them").shows_default();
    return command;
  };
  const auto add_checkpoint = [&](program::Command& command) {
    command.option("--checkpoint", options.checkpoint, "what `vqa train` wrote").shows_default();
  };
  const auto add_trust = [&](program::Command& command) {
    return command.flag("--trust-code", options.trust_code,
                        "run the code of pretrained encoders that the checkpoint holds: give it for files that you trust");
  };
  const auto add_report = [&](program::Command& command) {
    command.option("--report", options.report, "write an HTML page here that shows the evaluation");
    command.option("--boards", options.boards, fmt::format("boards to evaluate on, {} questions each", kQuestionsPerBoard))
        .range(1, 1000000)
        .shows_default();
  };

  auto train_command = add_command("train", "Trains a model and evaluates it on boards of held-out digits.",
                                   "vqa train --text transformer --output my.safetensors --report my.html", train);
  train_command.option("--output", options.output, "the checkpoint to write").shows_default();
  const auto resume = train_command.flag("--resume", options.resume, "go on with the training of --output that was stopped");
  train_command.flag("--restart", options.restart, "begin anew although a training of --output was stopped").excludes(resume);
  add_trust(train_command).needs(resume);
  train_command.option("--text", options.text, "the text encoder: rnn or transformer")
      .one_of({"rnn", "transformer"})
      .shows_default()
      .excludes(resume);
  train_command.option("--steps", options.steps, "training steps")
      .range(1, examples::kMostSteps)
      .shows_default()
      .excludes(resume);
  train_command.option("--grammar", options.grammar, "the questions").shows_default().excludes(resume);
  train_command
      .option("--image-encoder", options.image_encoder,
              "a TorchScript module to use frozen in place of the CNN; its code is run, so trust it")
      .excludes(resume);
  train_command.option("--text-encoder", options.text_encoder, "the same in place of the text encoder").excludes(resume);
  train_command.flag("--mean-pooling", options.mean_pooling, "give every place of the image the same weight, to compare")
      .excludes(resume);
  add_report(train_command);

  auto ask_command =
      add_command("ask", "Answers a question about a board.", "vqa ask board.png \"how many digits are there\"", ask);
  ask_command.option("BOARD.png", options.board, "3 x 3 cells; a square picture, its side a multiple of 24 pixels").required();
  ask_command.option("QUESTION", options.question, "in the words of the grammar").required();
  ask_command.option("--picture", options.picture, "draw here, as PNG, where the model looked");
  add_checkpoint(ask_command);
  add_trust(ask_command);

  auto evaluate_command = add_command("evaluate", "Answers questions about boards of held-out digits, always the same ones.",
                                      "vqa evaluate --report evaluation.html", evaluate);
  add_checkpoint(evaluate_command);
  add_trust(evaluate_command);
  add_report(evaluate_command);
  evaluate_command.flag("--json", options.json, "print one JSON object");

  auto draw_command =
      add_command("draw", "Draws a board of held-out digits to ask about.", "vqa draw 7.3...1.. board.png", draw);
  draw_command.option("CELLS", options.cells, "nine, row by row, each a digit or a point").required();
  draw_command.option("BOARD.png", options.board, "the picture to write").required();

  return app.run_subcommand(argc, argv, "A subcommand is required");
}

}  // namespace vqa
