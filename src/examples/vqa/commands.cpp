// SPDX-License-Identifier: Apache-2.0
#include "vqa/commands.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/board.h"
#include "common/board_program.h"
#include "common/png.h"
#include "vqa/model.h"
#include "vqa/questions.h"
#include "vqa/task.h"

namespace vqa {
namespace {

std::string text_of(const Score& score) {
  std::string text;
  for (size_t kind = 0; kind < score.kinds.size(); ++kind) {
    const auto& rate = score.kinds[kind];
    text += fmt::format("  {:<10} {:5.1f} %   of {}; always the same answer: {:.1f} %\n", rate.name, 100 * rate.share(),
                        rate.total, 100 * score.best_constant[kind]);
  }
  return text + fmt::format("  {:<10} {:5.1f} %\n", "mean", 100 * score.accuracy());
}

nlohmann::json json_of(const Score& score) {
  nlohmann::json kinds;
  for (const auto& rate : score.kinds) kinds[rate.name] = {{"accuracy", rate.share()}, {"questions", rate.total}};
  return {{"accuracy", score.accuracy()}, {"kinds", kinds}};
}

Pretrained read_encoder(const std::string& path) {
  return path.empty() ? Pretrained(nullptr) : Pretrained(path);
}

class Vqa : public BoardProgram {
 public:
  Vqa() : BoardProgram(kProgram, "questions", /*steps=*/8000, "questions.txt") {}

 private:
  void add_own(program::Program& app, program::Command& train, program::Command& evaluate) override {
    app.footer("Example: vqa ask board.png \"what is left of the seven\" --picture answer.png");
    const auto* trust = "run the code of pretrained encoders in the checkpoint: only for files that you trust";
    train.flag("--trust-code", trust_code_, trust, {.needs = "--resume"});
    train.option("--text", text_, "the text encoder: rnn or transformer",
                 {.one_of = {"rnn", "transformer"}, .excludes = "--resume"});
    train.option("--image-encoder", image_encoder_,
                 "a TorchScript module to use instead of the CNN, not trained; its code is run, so trust it",
                 {.excludes = "--resume"});
    train.option("--text-encoder", text_encoder_, "the same instead of the text encoder", {.excludes = "--resume"});
    train.flag("--mean-pooling", mean_pooling_, "give every place of the image the same weight, to compare",
               {.excludes = "--resume"});
    evaluate.flag("--trust-code", trust_code_, trust);

    auto ask = add_board_command(app, "ask", "Answers a question about a board.", "board.png \"how many digits are there\"");
    ask.option("QUESTION", question_, "in the words of the grammar", {.required = true});
    ask.flag("--trust-code", trust_code_, trust);

    auto draw = add_command(app, "draw", "Draws a board of held-out digits to ask about.", "7.3...1.. board.png",
                            [this] { draw_board(); });
    draw.option("CELLS", cells_, "nine cells, row by row, each a digit or a point", {.required = true});
    draw.option("BOARD.png", options_.board, "the picture to write", {.required = true});
    draw.option("--digits", options_.digits, "the handwritten digits, as scripts/make_digits.py writes them");
  }

  std::shared_ptr<torch::nn::Module> make_model(const TrainedModel* file) override {
    trained_ = file != nullptr ? make_again(*file, code()) : make_fresh();
    return trained_->model.ptr();
  }

  Trained make_fresh() const {
    auto grammar = read_grammar(options_.grammar, question_rules());
    const ModelOptions options = {.vocabulary = Vocabulary(grammar.vocabulary()).size(),
                                  .text = text_,
                                  .attention = !mean_pooling_,
                                  .image_encoder = read_encoder(image_encoder_),
                                  .text_encoder = read_encoder(text_encoder_)};
    if (options.text_encoder) {
      const auto words = split(options.text_encoder->extra_file("vocabulary.txt"));
      if (words != grammar.vocabulary()) {
        throw std::runtime_error(
            fmt::format("{}: its vocabulary.txt must have the {} words of the grammar in their order, but has {} other words",
                        text_encoder_, grammar.vocabulary().size(), words.size()));
      }
    }
    return {Model(options), std::move(grammar), {}};
  }

  std::vector<Curve> load_model(torch::Device device) override {
    trained_ = load_trained(options_.checkpoint, device, code());
    return trained_->curves;
  }

  Trainer::Forward training_step(const Digits& digits, torch::Device device, const Processes& processes) override {
    return vqa::training_step(trained_->model, digits, trained_->grammar, device, processes);
  }

  void describe_model(TrainingRun& run) const override {
    run.metadata = metadata_of(trained_->model, trained_->grammar);
    run.extra = pretrained_of(trained_->model);
    if (!run.extra.empty()) run.resume_options = " --trust-code";
  }

  Evaluation evaluate(const Digits& digits, torch::Device device, bool with_examples) override {
    std::vector<Example> shown;
    const auto score = vqa::evaluate(trained_->model, digits, trained_->grammar, device, options_.boards, kEvaluationSeed,
                                     with_examples ? &shown : nullptr);
    const auto& model = trained_->model->options;
    return {
        .text = text_of(score),
        .json = json_of(score),
        .report = {
            .title = "Visual question answering on boards of handwritten digits",
            .summary = fmt::format("{:.1f} % of questions about held-out boards answered correctly, as the mean over {} kinds.",
                                   100 * score.accuracy(), score.kinds.size()),
            .facts = {{"text encoder", model.text_encoder ? model.text_encoder->file_name() : model.text},
                      {"image encoder", model.image_encoder ? model.image_encoder->file_name() : "CNN, trained with the rest"},
                      {"attention", model.attention ? "cross-attention" : "none: mean pooling"},
                      {"boards", fmt::format("{}", options_.boards)}},
            .rates = score.kinds,
            .confusion = score.confusion,
            .examples = std::move(shown)}};
  }

  std::pair<std::string, Example> look_at(const torch::Tensor& board, torch::Device device) override {
    const auto words = split(question_);
    if (words.empty()) throw std::runtime_error("the question has no words");
    const auto numbers = Vocabulary(trained_->grammar.vocabulary()).encode({words});  // [1, T]
    const auto answers = trained_->model->forward(board.unsqueeze(0).to(device), numbers.unsqueeze(0).to(device));
    auto example = make_example(trained_->model, board[0], words, answers, 0, 0, /*truth=*/"");
    const auto certainty = answers.scores.softmax(-1).max().item<double>();
    return {fmt::format("{} ({:.0f} %)", example.answer, 100 * certainty), std::move(example)};
  }

  void draw_board() const {
    constexpr int64_t kZoom = 12;
    const auto digits = load_digits(options_.digits).held_out;
    Random random(options_.seed);
    const auto board = board_of(cells_, digits, random);
    write_png(options_.board, board_picture(paint({board}, digits)[0][0], kZoom));
  }

  Code code() const { return trust_code_ ? Code::run : Code::refuse; }

  std::optional<Trained> trained_;
  std::string text_ = "rnn";
  std::string image_encoder_;
  std::string text_encoder_;
  std::string question_;
  std::string cells_;
  bool mean_pooling_ = false;
  bool trust_code_ = false;
};

}  // namespace

int run(int argc, char** argv) {
  return Vqa().run(argc, argv);
}

}  // namespace vqa
