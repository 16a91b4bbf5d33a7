// SPDX-License-Identifier: Apache-2.0

// Visual question answering in its smallest honest form: which digit is at this place of the board?
// Start reading with model.h, then train.cpp.
#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <torch/utils.h>

#include <chrono>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "board.h"
#include "canvas.h"
#include "digits.h"
#include "model.h"
#include "picture.h"
#include "program.h"
#include "progress.h"
#include "questions.h"
#include "train.h"

namespace {

// What the program promises; it fails when the model does worse.
constexpr double kWantedAccuracy = 0.95;
constexpr double kWantedShare = 0.8;

struct Options : program::CommonOptions {
  // The products are small: on a busy machine two threads wait for each other at every one (68 s were measured in place of 11).
  // And so the result does not depend on the number of cores.
  Options() { threads = 1; }

  int64_t steps = vqa::TrainOptions().steps;
  std::string digits = XATTN_EXAMPLE_DATA "/digits.safetensors";
  std::string picture = "vqa.png";
};

// Found out now rather than after the training.
void check_files(const Options& options) {
  if (!std::filesystem::exists(options.digits)) {
    throw std::runtime_error(fmt::format("there is no file {}; say where the digits are with --digits FILE", options.digits));
  }
  const auto folder = std::filesystem::path(options.picture).parent_path();
  if (!folder.empty() && !std::filesystem::is_directory(folder)) {
    throw std::runtime_error(
        fmt::format("there is no folder {} for the picture; choose another with --picture FILE", folder.string()));
  }
}

// Asks one question about each of `count` new boards.
std::vector<vqa::Answered> ask(vqa::Model& model, const vqa::Digits& digits, int64_t count, const Options& options) {
  const torch::NoGradGuard no_grad;
  model->eval();
  auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  const auto batch = vqa::draw_batch(digits, count, /*questions=*/1, generator);
  const auto on_device = batch.to(torch::Device(options.device));
  const auto [scores, attention] = model->forward(on_device.boards, on_device.words);  // [B, 1, 10], [B, 1, 36]
  const auto answers = scores.argmax(-1).cpu();                                        // [B, 1]
  const auto looked = attention.cpu();

  std::vector<vqa::Answered> answered;
  for (int64_t i = 0; i < count; ++i) {
    answered.push_back({vqa::question_text(batch.words[i][0]), batch.cells[i][0].item<int64_t>(), answers[i][0].item<int64_t>(),
                        batch.answers[i][0].item<int64_t>(), batch.boards[i][0], looked[i][0]});
  }
  return answered;
}

void print(const std::vector<vqa::Answered>& answered) {
  std::cout << "\nFive questions about boards of held-out digits:\n";
  for (const auto& one : answered) {
    std::cout << fmt::format("  {:<28} answer {}   truth {}   {}\n", one.question + "?", one.answer, one.truth,
                             one.answer == one.truth ? "right" : "WRONG");
  }
}

void train_and_show(const Options& options) {
  check_files(options);
  const auto device = program::apply(options);
  const auto digits = vqa::load_digits(options.digits);
  std::cout << fmt::format("Training on boards of {} handwritten digits; {} others are held out.\n",
                           digits.training.labels.size(0), digits.held_out.labels.size(0));

  vqa::Model model;
  model->to(device);
  vqa::ProgressBar bar(options.steps);
  const auto begin = std::chrono::steady_clock::now();
  vqa::train(model, digits.training, {.steps = options.steps, .seed = options.seed, .device = device},
             [&bar](const vqa::Progress& progress) { bar.show(progress); });
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
  std::cout << fmt::format("Trained in {:.1f} s.\n", passed.count());

  const auto answered = ask(model, digits.held_out, /*count=*/5, options);
  print(answered);
  vqa::write_png(options.picture, vqa::draw_answers(answered));
  std::cout << "They are drawn in " << options.picture << ".\n";

  const auto score = vqa::evaluate(model, digits.held_out, device);
  const auto figures = fmt::format(
      "{:.1f} % of {} questions about held-out boards answered rightly, {:.1f} % of the attention in the asked cell",
      100 * score.accuracy, score.questions, 100 * score.share_in_cell);
  std::cout << "\n" << figures << ".\n";
  if (score.accuracy < kWantedAccuracy || score.share_in_cell < kWantedShare) {
    throw std::runtime_error(
        fmt::format("{}; at least {:.0f} % and {:.0f} % are wanted", figures, 100 * kWantedAccuracy, 100 * kWantedShare));
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Trains visual question answering on boards of handwritten digits, then shows what it answers and where it looks.",
      "vqa");
  app.footer("Example: vqa --seed 1 --threads 2 --picture answers.png");
  Options options;
  app.add_option("--steps", options.steps, "training steps")->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--digits", options.digits, "the handwritten digits, as scripts/make_digits.py writes them")
      ->capture_default_str();
  app.add_option("--picture", options.picture, "where to draw five answers, as PNG")->capture_default_str();
  program::add_common_options(app, options);
  return program::run(app, argc, argv, [&] { train_and_show(options); });
}
