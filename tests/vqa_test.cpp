// SPDX-License-Identifier: Apache-2.0

// The parts of the program vqa: its questions, its models, its evaluation.
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>
#include <xattn/file_error.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/board.h"
#include "common/png.h"
#include "one_thread.h"
#include "run_program.h"
#include "test_util.h"
#include "vqa/commands.h"
#include "vqa/model.h"
#include "vqa/questions.h"
#include "vqa/task.h"
#include "vqa/text_encoder.h"

namespace vqa {
namespace {

using examples::kEmpty;
using xattn::test::error_of;
using xattn::test::OneThread;
using xattn::test::TempDir;

constexpr double kPublishedAccuracy = 0.988;  // of the shipped checkpoint, in src/examples/README.md

const examples::DigitSets& digits() {
  static const auto sets = examples::load_digits(XATTN_EXAMPLE_DATA "/digits.safetensors");
  return sets;
}

const Grammar& grammar() {
  static const auto read = examples::read_grammar(XATTN_EXAMPLE_DATA "/questions.txt", question_rules());
  return read;
}

Vocabulary vocabulary() {
  return Vocabulary(grammar().vocabulary());
}

//   7 . 3
//   . 7 .
//   1 9 .
Board board_of_five() {
  Random random(0);
  return examples::board_of("7.3.7.19.", digits().held_out, random);
}

ModelOptions options_of(const std::string& text) {
  return {.vocabulary = vocabulary().size(), .text = text};
}

TEST(VqaQuestionsTest, AnswersAreTrueOfTheBoard) {
  const auto board = board_of_five();
  const auto said = [&](const Meaning& meaning) {
    return std::string(kAnswers.at(static_cast<size_t>(answer(board, meaning))));
  };
  EXPECT_EQ(said({.kind = QuestionKind::place, .cell = 2}), "three");
  EXPECT_EQ(said({.kind = QuestionKind::place, .cell = 1}), "nothing");
  EXPECT_EQ(said({.kind = QuestionKind::relation, .side = 0, .digit = 9}), "one");
  EXPECT_EQ(said({.kind = QuestionKind::relation, .side = 2, .digit = 9}), "seven");
  EXPECT_EQ(said({.kind = QuestionKind::relation, .side = 1, .digit = 9}), "nothing");
  EXPECT_EQ(said({.kind = QuestionKind::relation, .side = 1, .digit = 3}), "nothing") << "right of the right column";
  EXPECT_EQ(said({.kind = QuestionKind::relation, .side = 3, .digit = 1}), "nothing") << "below the bottom row";
  EXPECT_EQ(said({.kind = QuestionKind::count}), "five");
  EXPECT_EQ(said({.kind = QuestionKind::count, .line = 0}), "two");
  EXPECT_EQ(said({.kind = QuestionKind::count, .line = 5}), "one");
  EXPECT_EQ(said({.kind = QuestionKind::count, .parity = 0}), "zero");
  EXPECT_EQ(said({.kind = QuestionKind::count, .parity = 1}), "five");
  EXPECT_EQ(said({.kind = QuestionKind::exist, .digit = 9}), "yes");
  EXPECT_EQ(said({.kind = QuestionKind::exist, .digit = 8}), "no");
  EXPECT_EQ(said({.kind = QuestionKind::exist, .line = 0, .digit = 9}), "no");
  EXPECT_EQ(said({.kind = QuestionKind::compare, .cell = 0, .other_cell = 2, .order = 0}), "yes");
  EXPECT_EQ(said({.kind = QuestionKind::compare, .cell = 0, .other_cell = 2, .order = 1}), "no");
  EXPECT_EQ(said({.kind = QuestionKind::largest}), "nine");
  EXPECT_EQ(said({.kind = QuestionKind::largest, .line = 0}), "seven");
  EXPECT_EQ(said({.kind = QuestionKind::smallest}), "one");
  EXPECT_EQ(said({.kind = QuestionKind::smallest, .line = 4}), "seven");
}

TEST(VqaQuestionsTest, HasAnAnswerForEveryQuestionThatItAsks) {
  Random random(1);
  const auto batch = draw_batch(digits().training, grammar(), 300, random);
  for (size_t b = 0; b < batch.drawn.size(); ++b) {
    const auto& board = batch.drawn[b];
    const auto filled = examples::kCells - std::ranges::count(board.digits, kEmpty);
    EXPECT_GE(filled, examples::kFewestDigits);
    EXPECT_LE(filled, examples::kMostDigits);
    ASSERT_EQ(batch.questions[b].size(), static_cast<size_t>(kQuestionsPerBoard));
    for (size_t q = 0; q < batch.questions[b].size(); ++q) {
      const auto& question = batch.questions[b][q];
      EXPECT_EQ(question.answer, answer(board, question.meaning));
      EXPECT_EQ(static_cast<size_t>(question.meaning.kind), q / 2);
      EXPECT_LT(question.words.size(), static_cast<size_t>(TransformerEncoderImpl::kLongest));
      if (question.meaning.kind == QuestionKind::relation) {
        EXPECT_EQ(std::ranges::count(board.digits, *question.meaning.digit), 1) << "which one is meant?";
      }
      if (question.meaning.kind == QuestionKind::exist || question.meaning.kind == QuestionKind::compare) {
        EXPECT_EQ(question.answer, q % 2 == 0 ? kYes : kNo);
      }
    }
  }
}

TEST(VqaQuestionsTest, TheWordsSayWhatIsMeant) {
  Random random(2);
  const auto board = board_of_five();
  for (int i = 0; i < 100; ++i) {
    const auto question = draw_question(QuestionKind::relation, board, true, grammar(), random).value();
    const auto text = examples::join(question.words);
    EXPECT_NE(text.find(kAnswers.at(static_cast<size_t>(*question.meaning.digit))), std::string::npos) << text;
    constexpr std::array<std::array<const char*, 2>, 4> kSides = {
        {{"left of", "to the left of"}, {"right of", "to the right of"}, {"above", "over"}, {"below", "under"}}};
    const auto& sides = kSides.at(static_cast<size_t>(*question.meaning.side));
    EXPECT_TRUE(text.find(sides[0]) != std::string::npos || text.find(sides[1]) != std::string::npos) << text;
  }
}

TEST(VqaQuestionsTest, NoConstantAnswerIsRightMoreThanHalfTheTime) {
  Random random(3);
  const auto batch = draw_batch(digits().held_out, grammar(), 1000, random);
  std::map<QuestionKind, std::map<int64_t, int64_t>> counts;
  for (const auto& questions : batch.questions) {
    for (const auto& question : questions) ++counts[question.meaning.kind][question.answer];
  }
  for (const auto& [kind, answers] : counts) {
    int64_t most = 0;
    for (const auto& [answer, count] : answers) most = std::max(most, count);
    EXPECT_LE(most, 1000) << "of 2000 questions of kind " << kKinds.at(static_cast<size_t>(kind));
  }
}

TEST(VqaQuestionsTest, ComesOutTheSameFromTheSameSeed) {
  Random first(4);
  Random second(4);
  const auto a = draw_batch(digits().training, grammar(), 5, first);
  const auto b = draw_batch(digits().training, grammar(), 5, second);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(a.drawn[i].images, b.drawn[i].images);
    for (size_t q = 0; q < a.questions[i].size(); ++q) EXPECT_EQ(a.questions[i][q].words, b.questions[i][q].words);
  }
}

// Two boards, and their questions.
Tensors some_tensors(uint64_t seed) {
  Random random(seed);
  return encode(draw_batch(digits().training, grammar(), 2, random), digits().training, vocabulary());
}

class VqaModelTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(, VqaModelTest, testing::Values("rnn", "transformer"), [](const auto& info) {
  auto name = info.param;
  name[0] = static_cast<char>(std::toupper(name[0]));
  return name;
});

TEST_P(VqaModelTest, PaddingChangesNoAnswer) {
  torch::manual_seed(5);
  Model model(options_of(GetParam()));
  model->eval();
  const auto batch = some_tensors(5);
  const auto padded = torch::constant_pad_nd(batch.words, {0, 7});
  const auto T = batch.words.size(2);
  const auto answers = model->forward(batch.boards, batch.words);
  const auto same = model->forward(batch.boards, padded);
  EXPECT_TRUE(answers.scores.allclose(same.scores, 1e-4, 1e-5));
  EXPECT_TRUE(answers.answer_weights.allclose(same.answer_weights, 1e-4, 1e-5));
  const auto real = batch.words.ne(Vocabulary::kPadding).unsqueeze(3);
  EXPECT_TRUE((answers.word_weights * real).allclose(same.word_weights.narrow(2, 0, T) * real, 1e-4, 1e-5));
}

TEST_P(VqaModelTest, AnswersEachQuestionByItself) {
  torch::manual_seed(6);
  Model model(options_of(GetParam()));
  model->eval();
  const auto batch = some_tensors(6);
  const auto together = model->forward(batch.boards, batch.words).scores;  // [2, 14, 13]
  for (int64_t q = 0; q < together.size(1); q += 5) {
    const auto alone = model->forward(batch.boards.narrow(0, 1, 1), batch.words.narrow(0, 1, 1).narrow(1, q, 1)).scores;
    EXPECT_TRUE(alone[0][0].allclose(together[1][q], 1e-4, 1e-5)) << "question " << q;
  }
}

TEST_P(VqaModelTest, WeightsOfWordsAndAnswersSumToOne) {
  Model model(options_of(GetParam()));
  const auto batch = some_tensors(7);
  const auto answers = model->forward(batch.boards, batch.words);
  const auto real = batch.words.ne(Vocabulary::kPadding);  // [2, 14, T]
  EXPECT_TRUE(answers.word_weights.sum(-1).masked_select(real).allclose(torch::ones({1}), 1e-4, 1e-5));
  EXPECT_TRUE(answers.answer_weights.sum(-1).allclose(torch::ones({1}), 1e-4, 1e-5));
}

TEST_P(VqaModelTest, OverfitsOneBatch) {
  const OneThread one_thread;
  torch::manual_seed(8);
  Model model(options_of(GetParam()));
  const auto batch = some_tensors(8);
  examples::Trainer trainer(model.ptr(), {.steps = 250, .warm_up = 20, .weight_decay = 0});
  double loss = 0;
  trainer.run([&](Random&) { return learn_from(model, batch); },
              [&](const examples::Progress& progress) { loss = progress.loss; }, [] { return false; });
  EXPECT_LT(loss, 0.01);
  EXPECT_TRUE(model->forward(batch.boards, batch.words).scores.argmax(-1).equal(batch.answers));
}

TEST_P(VqaModelTest, LearnsFromNewBoardsInAFewSteps) {
  const OneThread one_thread;
  torch::manual_seed(9);
  Model model(options_of(GetParam()));
  examples::Trainer trainer(model.ptr(), {.steps = 40, .warm_up = 10});
  trainer.run(training_step(model, digits().training, grammar(), torch::kCPU), [](const auto&) {}, [] { return false; });
  const auto& losses = trainer.curves().at(0).values;
  EXPECT_LT(losses.back(), losses.front() - 0.5);  // from ln 13 = 2.56, the loss of a uniform guess, or above
}

TEST(VqaMeanPoolingTest, GivesEveryPlaceTheSameWeight) {
  auto options = options_of("rnn");
  options.attention = false;
  Model model(options);
  const auto batch = some_tensors(10);
  const auto answers = model->forward(batch.boards, batch.words);
  EXPECT_TRUE(answers.answer_weights.allclose(torch::full({1}, 1.0 / 9)));
}

// TorchScript encoders as a user would bring them.
constexpr auto kImageCode = R"(
def forward(self, boards):
    return torch.adaptive_avg_pool2d(boards, [2, 4]).expand(boards.size(0), 5, 2, 4)
)";
constexpr auto kTextCode = R"(
def forward(self, words):
    return words.unsqueeze(2).expand(words.size(0), words.size(1), 6).float()
)";

std::string save_module(const TempDir& dir, const std::string& name, const std::string& code) {
  torch::jit::Module module("encoder");
  module.define(code);
  module.save(dir.file(name));
  return dir.file(name);
}

TEST(VqaPretrainedTest, AnyTorchScriptModuleIsAFrozenEncoder) {
  const TempDir dir;
  auto options = options_of("rnn");
  options.image_encoder = examples::Pretrained(save_module(dir, "image.pt", kImageCode));
  options.text_encoder = examples::Pretrained(save_module(dir, "text.pt", kTextCode));
  Model model(options);
  EXPECT_EQ(model->rows, 2);
  EXPECT_EQ(model->columns, 4);
  const auto batch = some_tensors(11);
  const auto answers = model->forward(batch.boards, batch.words);
  EXPECT_EQ(answers.answer_weights.sizes(), (std::vector<int64_t>{2, kQuestionsPerBoard, 8}));
  const auto step = learn_from(model, batch);
  step.loss.backward();
  for (const auto& parameter : model->named_parameters()) {
    EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
    EXPECT_EQ(parameter.key().find("image_encoder"), std::string::npos);
    EXPECT_EQ(parameter.key().find("text_encoder"), std::string::npos);
  }
}

TEST(VqaPretrainedTest, EncodesEachQuestionOnceAndWithoutPadding) {
  const TempDir dir;
  const auto code = "def forward(self, words):\n    return torch.rand([words.size(0), words.size(1), 6]) + words.size(1)\n";
  CachedEncoder encoder(examples::Pretrained(save_module(dir, "random.pt", code)));
  const auto words = torch::tensor({{5, 1, 0, 0}, {5, 7, 1, 0}, {5, 1, 0, 0}});
  const auto states = encoder->forward(words);
  EXPECT_EQ(states.sizes(), (std::vector<int64_t>{3, 4, 6}));
  EXPECT_TRUE(states[0].equal(states[2]));
  EXPECT_TRUE(states[0].narrow(0, 0, 2).floor().eq(2).all().item<bool>());
  EXPECT_TRUE(states[1].narrow(0, 0, 3).floor().eq(3).all().item<bool>());
  EXPECT_TRUE(states.masked_select(words.eq(Vocabulary::kPadding).unsqueeze(-1)).eq(0).all().item<bool>());
  EXPECT_TRUE(encoder->forward(words.narrow(0, 1, 1).narrow(1, 0, 3))[0].equal(states[1].narrow(0, 0, 3)));
  EXPECT_FALSE(encoder->forward(torch::tensor({{7, 5, 1}}))[0].equal(states[1].narrow(0, 0, 3)));
}

TEST(VqaPretrainedTest, GoesIntoTheCheckpoint) {
  const TempDir dir;
  auto options = options_of("transformer");
  options.image_encoder = examples::Pretrained(save_module(dir, "image.pt", kImageCode));
  Model model(options);
  model->eval();
  examples::TrainingRun run = {.program = kProgram,
                               .output = dir.file("vqa.safetensors"),
                               .unit = "questions",
                               .metadata = metadata_of(model, grammar()),
                               .extra = pretrained_of(model)};
  examples::Trainer trainer(model.ptr(), {.steps = 1});
  run.run(trainer, training_step(model, digits().training, grammar(), torch::kCPU));
  std::filesystem::remove(dir.file("image.pt"));
  model->eval();
  EXPECT_EQ(
      error_of<xattn::FileError>([&] { load_trained(run.output, torch::kCPU); }),
      run.output +
          ": holds a pretrained encoder, pretrained.image_encoder, which is code that would be run; give --trust-code if you "
          "trust whoever made the file");
  auto trained = load_trained(run.output, torch::kCPU, examples::Code::run);
  const auto batch = some_tensors(12);
  model->freeze();  // as a loaded one is
  EXPECT_TRUE(trained.model->forward(batch.boards, batch.words).scores.equal(model->forward(batch.boards, batch.words).scores));
  EXPECT_FALSE(std::filesystem::exists(run.state_path()));

  // The same with the program, for every way to name a checkpoint.
  std::filesystem::copy(run.output, dir.file("x.training"));
  Random random(0);
  const auto board = examples::board_of("7.3...1..", digits().held_out, random);
  examples::write_png(dir.file("board.png"), examples::board_picture(paint({board}, digits().held_out)[0][0], 1));
  for (const std::string command : {"ask board.png 'is there a one' --checkpoint vqa.safetensors",
                                    "evaluate --boards 2 --checkpoint vqa.safetensors", "train --resume --output x"}) {
    const auto refused = xattn::test::run_here(vqa::run, "vqa " + command + " --device cpu", dir.path());
    EXPECT_EQ(refused.status, 1) << command;
    EXPECT_NE(refused.err.find("give --trust-code"), std::string::npos) << refused.err;
    const auto run_anyway = xattn::test::run_here(vqa::run, "vqa " + command + " --device cpu --trust-code", dir.path());
    EXPECT_EQ(run_anyway.err.find("give --trust-code"), std::string::npos) << run_anyway.err;
    EXPECT_EQ(run_anyway.status, command.starts_with("train") ? 1 : 0) << "a checkpoint is no state: " << run_anyway.err;
  }
}

TEST(VqaPretrainedTest, TakesBytesOfACheckpointWhateverTensorHoldsThem) {
  const auto refused = [](const torch::Tensor& bytes) {
    return error_of<std::runtime_error>([&] { examples::Pretrained(bytes, "it"); });
  };
  const auto one = torch::zeros({1}, torch::kUInt8);
  EXPECT_EQ(refused(one.expand({int64_t{1} << 24})), "it: must be a TorchScript module, as torch.jit.save writes it");
  EXPECT_EQ(refused(one.expand({3, 4})), "it: must be uint8 [N], but is uint8 [3, 4]");
  EXPECT_EQ(refused(torch::zeros({100})), "it: must be uint8 [N], but is float32 [100]");
  EXPECT_EQ(refused(torch::zeros({0}, torch::kUInt8)), "it: must be a TorchScript module, as torch.jit.save writes it");

  const TempDir dir;
  const auto bytes = examples::Pretrained(save_module(dir, "text.pt", kTextCode))->bytes();
  const auto apart = torch::stack({bytes, bytes}, 1).select(1, 0);  // every second byte
  EXPECT_TRUE(examples::Pretrained(apart, "it")->bytes().equal(bytes));
}

TEST(VqaPretrainedTest, RefusesFilesThatAreNoSuchEncoder) {
  const TempDir dir;
  EXPECT_EQ(error_of<std::runtime_error>([&] { examples::Pretrained(dir.file("none.pt")); }),
            "[file] " + dir.file("none.pt") + ": cannot be opened: No such file or directory");
  xattn::test::write_bytes(dir.file("text.pt"), "no archive");
  EXPECT_EQ(error_of<std::runtime_error>([&] { examples::Pretrained(dir.file("text.pt")); }),
            dir.file("text.pt") + ": must be a TorchScript module, as torch.jit.save writes it");
  auto options = options_of("rnn");
  options.image_encoder = examples::Pretrained(save_module(dir, "flat.pt", "def forward(self, x):\n    return x.flatten(1)\n"));
  EXPECT_EQ(error_of<std::runtime_error>([&] { Model model(options); }),
            dir.file("flat.pt") + ": must make features [B, C, h, w] of boards [B, 1, 24, 24], but makes [1, 576]");
  options.image_encoder = examples::Pretrained(save_module(dir, "pair.pt", "def forward(self, x):\n    return (x, x)\n"));
  const auto error = error_of<std::runtime_error>([&] { Model model(options); });
  EXPECT_EQ(error.find(dir.file("pair.pt") + ": must make one tensor of one tensor [1, 1, 24, 24], but does not: "), 0u)
      << error;
}

TEST(VqaCheckpointTest, RefusesFilesOfOtherPrograms) {
  const TempDir dir;
  const auto path = dir.file("other.safetensors");
  xattn::save_safetensors(path, {{"x", torch::zeros(1)}}, {{"program", "caption"}});
  EXPECT_EQ(error_of<xattn::FileError>([&] { load_trained(path, torch::kCPU); }),
            path + ": must be a checkpoint of vqa, but is one of caption; `vqa train` writes one");
  xattn::save_safetensors(path, {{"x", torch::zeros(1)}});
  EXPECT_EQ(error_of<xattn::FileError>([&] { load_trained(path, torch::kCPU); }),
            path + ": must be a checkpoint of vqa, but is one of no program; `vqa train` writes one");
}

TEST(VqaCheckpointTest, NamesTheFileAndWhatIsWrongInIt) {
  const TempDir dir;
  const auto path = dir.file("x.safetensors");
  Model model(options_of("rnn"));
  auto tensors = examples::Trainer(model.ptr(), {.steps = 1}).state();
  const auto sound = metadata_of(model, grammar());
  const auto refused = [&](const std::string& entry, const std::string& text) {
    auto metadata = sound;
    metadata[entry] = text;
    xattn::save_safetensors(path, tensors, metadata);
    const auto message = error_of<xattn::FileError>([&] { load_trained(path, torch::kCPU); });
    EXPECT_NE(message.find(path), std::string::npos) << message;
    return message;
  };
  EXPECT_EQ(refused("model", "{}"), path + ": 'model' in its metadata must have 'text', a string");
  EXPECT_EQ(refused("model", "[1]"), path + ": 'model' in its metadata must have 'text', a string");
  EXPECT_EQ(refused("model", R"({"text":"rnn","attention":1})"),
            path + ": 'model' in its metadata must have 'attention', true or false");
  EXPECT_EQ(refused("model", "{"), "[metadata] " + path + ": 'model': is not JSON in UTF-8, at its byte 2");
  EXPECT_EQ(refused("model", std::string(100'000, '[')), "[metadata] " + path + ": 'model': is nested deeper than 32 levels");
  EXPECT_EQ(refused("model", R"({"text":"cnn","attention":true})"),
            path + ": the text encoder must be rnn or transformer, but is 'cnn'");
  EXPECT_LT(refused("grammar", std::string(900'000, 'x')).size(), 1'000U);
  EXPECT_LT(refused("program", std::string(900'000, 'x')).size(), 1'000U);
  tensors["curve.loss"] = torch::zeros({3});
  EXPECT_EQ(refused("x", ""), path + ": must hold curve.loss, float64 [2, N]");
  tensors.erase("curve.loss");
  EXPECT_EQ(refused("x", ""), path + ": must hold curve.loss, float64 [2, N]");

  const auto training = [&](const std::string& text) {
    return error_of<xattn::FileError>([&] { examples::training_of({path, {{"training", text}}, {}}); });
  };
  EXPECT_EQ(training("{}"), path + ": 'training' in its metadata must have 'steps', an integer");
  EXPECT_EQ(training(R"({"steps":-1,"seed":0})"), path + ": its steps must be from 1 to 10000000, but are -1");
  EXPECT_EQ(training(R"({"steps":1e3,"seed":0})"), path + ": 'training' in its metadata must have 'steps', an integer");
  EXPECT_EQ(training(R"({"steps":5,"seed":-1})"),
            path + ": 'training' in its metadata must have 'seed', a non-negative integer");
}

// The shipped checkpoint.
TEST(VqaShippedTest, ReproducesItsPublishedAccuracy) {
  auto trained = load_trained(XATTN_EXAMPLE_DATA "/vqa.safetensors", torch::kCPU);
  const auto score = evaluate(trained.model, digits().held_out, trained.grammar, torch::kCPU, /*boards=*/1000, /*seed=*/12345);
  EXPECT_NEAR(score.accuracy(), kPublishedAccuracy,
              0.002);  // src/examples/README.md; other instruction sets may change a few of 14,000 answers
  EXPECT_GE(score.accuracy(), 0.97);
  for (size_t kind = 0; kind < score.kinds.size(); ++kind) {
    const auto& [name, right, total] = score.kinds[kind];
    EXPECT_GE(static_cast<double>(right), 0.92 * static_cast<double>(total)) << name;
    EXPECT_LE(score.best_constant[kind], 0.5) << name;
  }
}

TEST(VqaShippedTest, LooksWhereTheAnswerIs) {
  // No loss depends on the attention, yet the cell in question gets the most of it for nearly all questions of place.
  auto trained = load_trained(XATTN_EXAMPLE_DATA "/vqa.safetensors", torch::kCPU);
  Random random(13);
  const auto batch = draw_batch(digits().held_out, trained.grammar, 50, random);
  const auto tensors = encode(batch, digits().held_out, Vocabulary(trained.grammar.vocabulary()));
  const auto most = trained.model->forward(tensors.boards, tensors.words).answer_weights.argmax(-1);  // [50, 14]
  int64_t looked = 0;
  for (size_t b = 0; b < batch.questions.size(); ++b) {
    for (const int64_t q : {0, 1}) {
      looked += most[static_cast<int64_t>(b)][q].item<int64_t>() == batch.questions[b][static_cast<size_t>(q)].meaning.cell;
    }
  }
  EXPECT_GE(looked, 70) << "of 100";
}

TEST(VqaExampleTest, ShowsAMapForEveryWord) {
  auto trained = load_trained(XATTN_EXAMPLE_DATA "/vqa.safetensors", torch::kCPU);
  std::vector<examples::Example> shown;
  evaluate(trained.model, digits().held_out, trained.grammar, torch::kCPU, /*boards=*/20, /*seed=*/1, &shown);
  ASSERT_FALSE(shown.empty());
  for (const auto& example : shown) {
    EXPECT_EQ(example.right, example.answer == example.truth);
    EXPECT_EQ(example.picture.sizes(), (std::vector<int64_t>{288, 288, 3}));
    EXPECT_NEAR(example.map.sum().item<double>(), 1, 1e-4);
    for (const auto& word : example.words) EXPECT_NEAR(word.map.sum().item<double>(), 1, 1e-4) << word.text;
  }
}

}  // namespace
}  // namespace vqa
