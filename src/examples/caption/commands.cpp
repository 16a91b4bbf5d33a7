// SPDX-License-Identifier: Apache-2.0
#include "caption/commands.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/printed.h"
#include "caption/captions.h"
#include "caption/task.h"
#include "common/board_program.h"

namespace caption {
namespace {

class Captioner : public BoardProgram {
 public:
  Captioner() : BoardProgram(kProgram, "captions", /*steps=*/5000, "captions.txt") {}

 private:
  void add_own(program::Program& app, program::Command& train, program::Command& evaluate) override {
    app.footer("Example: caption describe board.png --picture words.png");
    auto describe = add_board_command(app, "describe", "Describes a board in a sentence.", "board.png --beams 4");
    for (auto* command : {&train, &evaluate, &describe}) {
      command->option("--beams", beams_, "beginnings that the search keeps; 1 is greedy", {.range = {{1, 1000}}});
    }
  }

  std::shared_ptr<torch::nn::Module> make_model(const TrainedModel* file) override {
    trained_ = file != nullptr ? make_again(*file) : caption::make_model(read_grammar(options_.grammar, caption_rules()));
    return trained_->model.ptr();
  }

  std::vector<Curve> load_model(torch::Device device) override {
    trained_ = load_trained(options_.checkpoint, device);
    return trained_->curves;
  }

  Trainer::Forward training_step(const Digits& digits, torch::Device device, const Processes& processes) override {
    if (processes.size() > 1) {
      throw std::runtime_error(fmt::format("captions are learned in one process, but {} were started", processes.size()));
    }
    return caption::training_step(trained_->model, digits, trained_->grammar, device);
  }

  void describe_model(TrainingRun& run) const override { run.metadata = metadata_of(trained_->grammar); }

  Evaluation evaluate(const Digits& digits, torch::Device device, bool with_examples) override {
    std::vector<Example> shown;
    const auto score = caption::evaluate(trained_->model, digits, trained_->grammar, device, options_.boards, beams_,
                                         kEvaluationSeed, with_examples ? &shown : nullptr);
    const auto share = [&score](int64_t boards) { return static_cast<double>(boards) / static_cast<double>(score.boards); };
    const auto summary = fmt::format(
        "{:.1f} % of {} captions of held-out boards are correct throughout; the digit recogniser alone reads every cell of "
        "{:.1f} % "
        "of the boards correctly.",
        100 * share(score.right), score.boards, 100 * share(score.recognised));
    return {.text = summary + "\n",
            .json = {{"exact_match", share(score.right)},
                     {"recogniser", share(score.recognised)},
                     {"boards", score.boards},
                     {"beams", beams_}},
            .report = {.title = "Captions of boards of handwritten digits",
                       .summary = summary,
                       .facts = {{"boards", fmt::format("{}", options_.boards)},
                                 {"search", beams_ == 1 ? "greedy" : fmt::format("{} beams", beams_)}},
                       .rates = score.sizes,
                       .confusion = score.confusion,
                       .examples = std::move(shown)}};
  }

  std::pair<std::string, Example> look_at(const torch::Tensor& board, torch::Device device) override {
    const Vocabulary vocabulary(trained_->grammar.vocabulary());
    auto example = describe(trained_->model, board, vocabulary, device, beams_);
    return {xattn::detail::one_line(example.title), std::move(example)};  // a checkpoint may hold any words
  }

  std::optional<Trained> trained_;
  int64_t beams_ = 1;
};

}  // namespace

int run(int argc, char** argv) {
  return Captioner().run(argc, argv);
}

}  // namespace caption
