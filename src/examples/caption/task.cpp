// SPDX-License-Identifier: Apache-2.0
#include "caption/task.h"

#include <fmt/format.h>
#include <torch/nn/functional/loss.h>

#include <algorithm>
#include <string>

namespace caption {
namespace {

constexpr int64_t kEmptyClass = kDigitKinds;  // of the recogniser

int64_t class_of(int64_t digit) {
  return digit == kEmpty ? kEmptyClass : digit;
}

torch::Tensor loss_of(const torch::Tensor& scores, const torch::Tensor& truth, int64_t ignored) {
  namespace functional = torch::nn::functional;
  return functional::cross_entropy(scores.flatten(0, -2), truth.flatten(),
                                   functional::CrossEntropyFuncOptions().ignore_index(ignored));
}

}  // namespace

Tensors encode(const std::vector<Board>& boards,
               const std::vector<Words>& captions,
               const Digits& digits,
               const Vocabulary& vocabulary,
               Random* hands) {
  const auto B = static_cast<int64_t>(boards.size());
  const auto next = vocabulary.encode(captions);  // [B, T]
  const auto begin = torch::full({B, 1}, Vocabulary::kEnd, torch::kInt64);
  // Shifted by one word. The kEnd of the longest caption drops out; the others' kEnd is ignored like padding.
  const auto words = torch::cat({begin, next.slice(1, 0, -1)}, 1);  // [B, T]
  auto truth = torch::empty({B, kCells}, torch::kInt64);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t cell = 0; cell < kCells; ++cell) {
      truth[b][cell] = class_of(boards[static_cast<size_t>(b)].digits.at(static_cast<size_t>(cell)));
    }
  }
  return {paint(boards, digits, hands), words.unsqueeze(1), next.unsqueeze(1), truth};
}

std::vector<Board> draw_boards(const Digits& digits, int64_t count, Random& random) {
  std::vector<Board> boards;
  for (int64_t i = 0; i < count; ++i) {
    boards.push_back(draw_board(digits, kFewestDigits + random.below(kMostDigits - kFewestDigits + 1), random));
  }
  return boards;
}

TrainingStep learn_from(Model& model, const Tensors& batch) {
  const auto features = model->encode(batch.boards);
  const auto scores = std::get<0>(model->predict(batch.words, model->contexts(features)));  // [B, 1, T, vocabulary]
  const auto loss = loss_of(scores, batch.next, /*ignored=*/Vocabulary::kPadding) +
                    loss_of(model->recognise(features), batch.digits, /*ignored=*/-100);
  const auto real = batch.next.ne(Vocabulary::kPadding);
  const auto right = scores.argmax(-1).eq(batch.next).logical_and(real).sum();
  return {loss, right / real.sum(), batch.boards.size(0)};
}

Trainer::Forward training_step(Model model, const Digits& digits, const Grammar& grammar, torch::Device device) {
  constexpr int64_t kBoards = 32;
  return [=, vocabulary = Vocabulary(grammar.vocabulary())](Random& random) mutable {
    const auto boards = draw_boards(digits, kBoards, random);
    std::vector<Words> captions;
    for (const auto& board : boards) captions.push_back(draw_caption(board, grammar, random));
    const auto [images, words, next, truth] = encode(boards, captions, digits, vocabulary, &random);
    return learn_from(model, {images.to(device), words.to(device), next.to(device), truth.to(device)});
  };
}

namespace {

// words [T] as `decode` returns them, of one image.
Example make_example(Model& model,
                     const torch::Tensor& board,
                     const torch::Tensor& words,
                     const std::vector<ImageContext>& image,
                     const Vocabulary& vocabulary) {
  constexpr int64_t kZoom = 12;
  const auto caption = vocabulary.decode(words.cpu());
  const auto begin = torch::full({1}, Vocabulary::kEnd, words.options());
  const auto given =
      torch::cat({begin, words.slice(0, 0, static_cast<int64_t>(caption.size()))}).view({1, 1, -1});  // [1, 1, T]
  // The attention weights for each word; the last row is for the end.
  const auto weights = std::get<1>(model->predict(given, image)).cpu().view({-1, kCellsPerSide, kCellsPerSide});
  Example example = {.right = true, .title = join(caption), .picture = board_picture(board, kZoom)};
  for (size_t i = 0; i < caption.size(); ++i) example.words.push_back({caption[i], weights[static_cast<int64_t>(i)]});
  return example;
}

}  // namespace

Score evaluate(Model& model,
               const Digits& digits,
               const Grammar& grammar,
               torch::Device device,
               int64_t boards,
               int64_t beams,
               uint64_t seed,
               std::vector<Example>* examples) {
  constexpr int64_t kAtOnce = 100;   // boards
  constexpr int64_t kExamples = 12;  // of right and of wrong captions
  const torch::NoGradGuard no_grad;
  model->eval();
  const Vocabulary vocabulary(grammar.vocabulary());
  const CaptionReader reader(grammar);
  Random random(seed);
  Score score;
  for (int64_t n = kFewestDigits; n <= kMostDigits; ++n) score.sizes.push_back({fmt::format("{} digits", n), 0, 0});
  score.confusion = {{"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "empty"},
                     torch::zeros({kEmptyClass + 1, kEmptyClass + 1}, torch::kInt64)};
  auto* confused = score.confusion.counts.mutable_data_ptr<int64_t>();
  int64_t right_shown = 0;
  int64_t wrong_shown = 0;
  for (int64_t first = 0; first < boards; first += kAtOnce) {
    const auto drawn = draw_boards(digits, std::min(kAtOnce, boards - first), random);
    std::vector<Words> truths;
    for (const auto& board : drawn) truths.push_back(draw_caption(board, grammar, random));
    const auto batch = encode(drawn, truths, digits, vocabulary);
    const auto features = model->encode(batch.boards.to(device));
    const auto decoded = decode(model, model->contexts(features), beams).words.cpu();  // [B, T]
    score.recognised += model->recognise(features).argmax(-1).cpu().eq(batch.digits).all(1).sum().item<int64_t>();
    score.boards += decoded.size(0);
    for (int64_t b = 0; b < decoded.size(0); ++b) {
      const auto& truth = drawn[static_cast<size_t>(b)].digits;
      const auto said = reader.read(vocabulary.decode(decoded[b]));
      const bool right = said == truth;
      auto& size = score.sizes.at(static_cast<size_t>(kCells - std::ranges::count(truth, kEmpty) - kFewestDigits));
      ++size.total;
      size.right += right;
      score.right += right;
      if (said) {
        for (size_t cell = 0; cell < truth.size(); ++cell) {
          ++confused[class_of(truth.at(cell)) * (kEmptyClass + 1) + class_of(said->at(cell))];
        }
      }
      if (examples != nullptr && (right ? right_shown : wrong_shown)++ < kExamples) {
        auto example = make_example(model, batch.boards[b][0], decoded[b].to(device), model->contexts(features.narrow(0, b, 1)),
                                    vocabulary);
        example.right = right;
        if (!right) example.truth = join(truths[static_cast<size_t>(b)]);
        examples->push_back(std::move(example));
      }
    }
  }
  return score;
}

Example describe(Model& model, const torch::Tensor& board, const Vocabulary& vocabulary, torch::Device device, int64_t beams) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const auto image = model->contexts(model->encode(board.unsqueeze(0).to(device)));  // of [1, 1, 24, 24]
  const auto decoded = decode(model, image, beams);
  return make_example(model, board[0], decoded.words[0], image, vocabulary);
}

Trained make_model(Grammar grammar) {
  const ModelOptions options = {.vocabulary = Vocabulary(grammar.vocabulary()).size(), .longest = longest_caption(grammar)};
  return {Model(options), std::move(grammar), {}};
}

std::map<std::string, std::string> metadata_of(const Grammar& grammar) {
  return {{"program", kProgram}, {"grammar", grammar.text()}};
}

Trained make_again(const TrainedModel& file) {
  return make_model({file.text("grammar"), "the grammar in " + file.path, caption_rules()});
}

Trained load_trained(const std::string& path, torch::Device device) {
  const auto file = read_trained_model(path, kProgram);
  auto trained = make_again(file);
  trained.curves = load_weights(*trained.model, file, device);
  trained.model->freeze();
  return trained;
}

}  // namespace caption
