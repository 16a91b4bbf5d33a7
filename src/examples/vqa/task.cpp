// SPDX-License-Identifier: Apache-2.0
#include "vqa/task.h"

#include <fmt/format.h>
#include <torch/nn/functional/loss.h>
#include <xattn/file_error.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

namespace vqa {
namespace {

std::string answer_text(int64_t answer) {
  return kAnswers.at(static_cast<size_t>(answer));
}

int64_t at(const torch::Tensor& x, int64_t b, int64_t q) {
  return x[b][q].item<int64_t>();
}

constexpr auto kImageEncoder = "pretrained.image_encoder";
constexpr auto kTextEncoder = "pretrained.text_encoder";

Pretrained pretrained(const TrainedModel& file, const char* name, Code code) {
  const auto bytes = file.tensors.find(name);
  if (bytes == file.tensors.end()) return nullptr;
  if (code == Code::refuse) {
    throw xattn::FileError(
        fmt::format("{}: holds a pretrained encoder, {}, which is code that would be run; give --trust-code if "
                    "you trust whoever made the file",
                    file.path, name));
  }
  return Pretrained(bytes->second, fmt::format("{} in {}", name, file.path));
}

}  // namespace

Tensors encode(const Batch& batch, const Digits& digits, const Vocabulary& vocabulary, Random* hands) {
  std::vector<Words> sentences;
  std::vector<int64_t> answers;
  for (const auto& questions : batch.questions) {
    for (const auto& question : questions) {
      sentences.push_back(question.words);
      answers.push_back(question.answer);
    }
  }
  const auto B = static_cast<int64_t>(batch.drawn.size());
  return {paint(batch.drawn, digits, hands), vocabulary.encode(sentences).unflatten(0, {B, -1}),
          torch::tensor(answers, torch::kInt64).view({B, -1})};
}

TrainingStep learn_from(Model& model, const Tensors& batch) {
  const auto scores = model->forward(batch.boards, batch.words).scores;  // [B, Q, 13]
  const auto loss = torch::nn::functional::cross_entropy(scores.flatten(0, 1), batch.answers.flatten());
  return {loss, scores.argmax(-1).eq(batch.answers).to(torch::kFloat32).mean(), batch.answers.numel()};
}

Trainer::Forward training_step(
    Model model, const Digits& digits, const Grammar& grammar, torch::Device device, const Processes& processes) {
  constexpr int64_t kBoards = 16;
  return [=, vocabulary = Vocabulary(grammar.vocabulary())](Random& random) mutable {
    const auto batch = draw_batch(digits, grammar, kBoards, random, kMoreRelations);
    const auto [boards, words, answers] = encode(batch, digits, vocabulary, &random);
    const auto own = [&](const torch::Tensor& x) { return processes.part_of(x).to(device); };
    return learn_from(model, {own(boards), own(words), own(answers)});
  };
}

double Score::accuracy() const {
  double sum = 0;
  for (const auto& kind : kinds) sum += kind.share();
  return sum / static_cast<double>(kinds.size());
}

Example make_example(const Model& model,
                     const torch::Tensor& board,
                     const Words& words,
                     const Answers& answers,
                     int64_t b,
                     int64_t q,
                     const std::string& truth) {
  constexpr int64_t kZoom = 12;
  const auto grid = [&](const torch::Tensor& weights) { return weights.cpu().view({model->rows, model->columns}); };
  const auto given = answer_text(answers.scores[b][q].argmax().item<int64_t>());
  Example example = {.right = given == truth,
                     .title = join(words) + "?",
                     .answer = given,
                     .truth = truth,
                     .picture = board_picture(board, kZoom),
                     .map = grid(answers.answer_weights[b][q])};
  for (size_t i = 0; i < words.size(); ++i) {
    example.words.push_back({words[i], grid(answers.word_weights[b][q][static_cast<int64_t>(i)])});
  }
  return example;
}

Score evaluate(Model& model,
               const Digits& digits,
               const Grammar& grammar,
               torch::Device device,
               int64_t boards,
               uint64_t seed,
               std::vector<Example>* examples) {
  constexpr int64_t kAtOnce = 50;          // boards
  constexpr int64_t kExamplesPerKind = 4;  // of right and of wrong answers
  const torch::NoGradGuard no_grad;
  model->eval();
  const Vocabulary vocabulary(grammar.vocabulary());
  Random random(seed);
  const auto K = static_cast<int64_t>(kKinds.size());
  const auto A = static_cast<int64_t>(kAnswers.size());
  auto answered = torch::zeros({K, A, A}, torch::kInt64);  // by kind, truth and answer
  auto* counts = answered.mutable_data_ptr<int64_t>();
  auto shown = std::vector<std::array<int64_t, 2>>(kKinds.size(), {0, 0});
  for (int64_t first = 0; first < boards; first += kAtOnce) {
    const auto batch = draw_batch(digits, grammar, std::min(kAtOnce, boards - first), random);
    const auto tensors = encode(batch, digits, vocabulary);
    const auto answers = model->forward(tensors.boards.to(device), tensors.words.to(device));
    const auto given = answers.scores.argmax(-1).cpu();  // [B, Q]
    for (int64_t b = 0; b < given.size(0); ++b) {
      for (int64_t q = 0; q < given.size(1); ++q) {
        const auto& question = batch.questions[static_cast<size_t>(b)][static_cast<size_t>(q)];
        const auto kind = static_cast<size_t>(question.meaning.kind);
        const bool right = at(given, b, q) == question.answer;
        ++counts[(static_cast<int64_t>(kind) * A + question.answer) * A + at(given, b, q)];
        if (examples != nullptr && shown[kind][right]++ < kExamplesPerKind) {
          examples->push_back(
              make_example(model, tensors.boards[b][0], question.words, answers, b, q, answer_text(question.answer)));
        }
      }
    }
  }

  Score score;
  for (int64_t kind = 0; kind < K; ++kind) {
    const auto of_kind = answered[kind];  // [13, 13]
    const auto total = of_kind.sum().item<int64_t>();
    score.kinds.push_back({kKinds.at(static_cast<size_t>(kind)), of_kind.trace().item<int64_t>(), total});
    score.best_constant.push_back(of_kind.sum(1).max().item<double>() / static_cast<double>(total));
  }
  score.confusion = {{kAnswers.begin(), kAnswers.end()}, answered.sum(0)};
  return score;
}

std::map<std::string, std::string> metadata_of(const Model& model, const Grammar& grammar) {
  const nlohmann::json made = {{"text", model->options.text}, {"attention", model->options.attention}};
  return {{"program", kProgram}, {"model", made.dump()}, {"grammar", grammar.text()}};
}

std::map<std::string, torch::Tensor> pretrained_of(const Model& model) {
  std::map<std::string, torch::Tensor> tensors;
  if (const auto& encoder = model->options.image_encoder) tensors.emplace(kImageEncoder, encoder->bytes());
  if (const auto& encoder = model->options.text_encoder) tensors.emplace(kTextEncoder, encoder->bytes());
  return tensors;
}

Trained make_again(const TrainedModel& file, Code code) {
  constexpr auto kModel = "model";
  Grammar grammar(file.text("grammar"), "the grammar in " + file.path, question_rules());
  const ModelOptions options = {.vocabulary = Vocabulary(grammar.vocabulary()).size(),
                                .text = file.value(kModel, "text", &nlohmann::json::is_string, "a string"),
                                .attention = file.value(kModel, "attention", &nlohmann::json::is_boolean, "true or false"),
                                .image_encoder = pretrained(file, kImageEncoder, code),
                                .text_encoder = pretrained(file, kTextEncoder, code)};
  Trained trained{nullptr, std::move(grammar), {}};
  naming_file(file.path, [&] { trained.model = Model(options); });
  return trained;
}

Trained load_trained(const std::string& path, torch::Device device, Code code) {
  const auto file = read_trained_model(path, kProgram);
  auto trained = make_again(file, code);
  trained.curves = load_weights(*trained.model, file, device);
  trained.model->freeze();
  return trained;
}

}  // namespace vqa
