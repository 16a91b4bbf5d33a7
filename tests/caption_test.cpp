// SPDX-License-Identifier: Apache-2.0

// The parts of the program caption: its sentences, its decoder, its search.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <xattn/file_error.h>
#include <xattn/safetensors.h>

#include <array>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "caption/captions.h"
#include "caption/commands.h"
#include "caption/model.h"
#include "caption/task.h"
#include "common/board.h"
#include "common/png.h"
#include "one_thread.h"
#include "run_program.h"
#include "test_util.h"

namespace caption {
namespace {

using examples::kCells;
using examples::kEmpty;
using xattn::test::OneThread;

constexpr double kPublishedExactMatch = 0.964;  // of the shipped checkpoint, in src/examples/README.md

const examples::DigitSets& digits() {
  static const auto sets = examples::load_digits(XATTN_EXAMPLE_DATA "/digits.safetensors");
  return sets;
}

const Grammar& grammar() {
  static const auto read = examples::read_grammar(XATTN_EXAMPLE_DATA "/captions.txt", caption_rules());
  return read;
}

Model make() {
  return make_model(grammar()).model;
}

TEST(CaptionsTest, SayWhatIsOnTheBoardInEveryForm) {
  Random random(1);
  const CaptionReader reader(grammar());
  std::set<std::string> beginnings;
  for (const auto& board : draw_boards(digits().training, 300, random)) {
    const auto caption = draw_caption(board, grammar(), random);
    const auto said = reader.read(caption);
    ASSERT_TRUE(said) << examples::join(caption);
    EXPECT_EQ(*said, board.digits) << examples::join(caption);
    EXPECT_LE(static_cast<int64_t>(caption.size()), longest_caption(grammar()));
    beginnings.insert(caption.at(0));
  }
  EXPECT_EQ(beginnings, (std::set<std::string>{"there", "a", "an", "the", "you"}));
}

TEST(CaptionsTest, ReadsItemsInAnyOrderAndRefusesWhatIsNotInTheGrammar) {
  const CaptionReader reader(grammar());
  const auto read = [&](const std::string& text) { return reader.read(examples::split(text)); };
  std::array<int64_t, kCells> expected;
  expected.fill(kEmpty);
  expected[0] = 7;
  expected[4] = 8;
  EXPECT_EQ(read("there is an eight in the centre and a seven in the top left"), expected);
  EXPECT_EQ(read("a seven at the upper left and an eight at the middle"), expected);
  for (const auto* wrong : {"", "there is",
                            "there is a seven in the top left, an eight in the centre",               // , in place of and
                            "there is a seven in the top left and an eight in the centre and",        // an empty item
                            "there is a seven in the top left and an eight at the centre",            // two forms
                            "there is a seven in the top left and an eight in the top left",          // one cell twice
                            "there is a eight in the centre and a seven in the top left",             // not a phrase
                            "there are a seven in the top left and an eight in the centre",           // not a form
                            "there is a seven in the top left and an eight in the centre please"}) {  // words left over
    EXPECT_EQ(read(wrong), std::nullopt) << wrong;
  }
}

TEST(CaptionsTest, LongestCaptionIsOfTheLongestPhrases) {
  EXPECT_EQ(longest_caption(grammar()),
            3 + 6 * (2 + 2 + 2) + 5 * 1);  // "the board shows", "a one", "in the", "top left", "and"
}

// A grammar whose items can be said in billions of ways.
TEST(CaptionsTest, NotEveryWayToSayAnItemIsListed) {
  std::string text = "caption: {items}\nitem: {digit} {cell}\nbetween: ,\nbefore_last: and\n";
  for (const auto& [slot, values] : {std::pair("digit", 10), {"cell", 9}}) {
    for (int value = 0; value < values; ++value) {
      text += "slot " + std::string(slot) + " " + std::to_string(value) + ": ";
      for (int i = 0; i < 600; ++i)
        text += (i == 0 ? "" : "|") + std::string(1, slot[0]) + std::to_string(value) + " x" + std::to_string(i);
      text += "\n";
    }
  }
  ASSERT_GT(text.size(), 60'000U);
  const Grammar large(text, "large", caption_rules());
  EXPECT_EQ(longest_caption(large), 6 * 4 + 5);
  const CaptionReader reader(large);
  std::array<int64_t, kCells> expected;
  expected.fill(kEmpty);
  expected[0] = 7;
  expected[4] = 8;
  EXPECT_EQ(reader.read(examples::split("d7 x599 c0 x3 and d8 x0 c4 x17")), expected);
  EXPECT_EQ(reader.read(examples::split("d7 x599 c0 x600")), std::nullopt);
}

TEST(CaptionsTest, CaptionsOfACheckpointCannotDriveTheTerminal) {
  const xattn::test::TempDir dir;
  auto text = grammar().text();
  for (auto place = text.find("a seven"); place != std::string::npos; place = text.find("a seven", place)) {
    text.replace(place, 7, "a \x1b[2J");
  }
  const Grammar hostile(text, "hostile", caption_rules());
  const auto shipped = xattn::load_tensors(XATTN_EXAMPLE_DATA "/caption.safetensors");
  xattn::save_safetensors(dir.file("x"), shipped, metadata_of(hostile));
  Random random(0);
  const auto board = examples::board_of("7........", digits().held_out, random);
  examples::write_png(dir.file("board.png"), examples::board_picture(paint({board}, digits().held_out)[0][0], 1));
  const auto result = xattn::test::run_here(caption::run, "caption describe board.png --checkpoint x --device cpu", dir.path());
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_NE(result.out.find("a \\x1b[2J"), std::string::npos) << result.out;
  EXPECT_EQ(result.out.find('\x1b'), std::string::npos);
}

TEST(CaptionModelTest, WordsSeeNoLaterWord) {
  torch::manual_seed(2);
  auto model = make();
  model->eval();
  const auto images = model->contexts(torch::rand({2, 9, ModelImpl::kFeatures}));
  const auto words = torch::randint(2, model->options.vocabulary, {2, 3, 8}, torch::kInt64);
  auto changed = words.clone();
  changed.slice(2, 5) = torch::randint(2, model->options.vocabulary, {2, 3, 3}, torch::kInt64);
  const auto [scores, weights] = model->predict(words, images);
  const auto [others, other_weights] = model->predict(changed, images);
  EXPECT_TRUE(scores.slice(2, 0, 5).allclose(others.slice(2, 0, 5), 1e-4, 1e-5));
  EXPECT_TRUE(weights.slice(2, 0, 5).allclose(other_weights.slice(2, 0, 5), 1e-4, 1e-5));
  EXPECT_FALSE(scores.slice(2, 5).allclose(others.slice(2, 5), 1e-4, 1e-5));
}

TEST(CaptionModelTest, PaddingAndOtherSentencesChangeNothing) {
  torch::manual_seed(3);
  auto model = make();
  model->eval();
  const auto features = torch::rand({2, 9, ModelImpl::kFeatures});
  const auto words = torch::randint(2, model->options.vocabulary, {2, 3, 6}, torch::kInt64);
  const auto together = std::get<0>(model->predict(torch::constant_pad_nd(words, {0, 4}), model->contexts(features)));
  for (int64_t b = 0; b < 2; ++b) {
    const auto image = model->contexts(features.narrow(0, b, 1));
    for (int64_t n = 0; n < 3; ++n) {
      const auto alone = std::get<0>(model->predict(words.narrow(0, b, 1).narrow(1, n, 1), image));
      EXPECT_TRUE(alone[0][0].allclose(together[b][n].narrow(0, 0, 6), 1e-4, 1e-5));
    }
  }
}

TEST(CaptionTaskTest, EachWordIsToldFromTheTrueWordsBeforeIt) {
  Random random(4);
  const auto boards = draw_boards(digits().training, 2, random);
  const auto batch = encode(boards, {{"a", "one"}, {"there"}}, digits().training, Vocabulary({"a", "one", "there"}));
  EXPECT_TRUE(batch.words.equal(torch::tensor({1, 2, 3, 1, 4, 1}, torch::kInt64).view({2, 1, 3})));
  EXPECT_TRUE(batch.next.equal(torch::tensor({2, 3, 1, 4, 1, 0}, torch::kInt64).view({2, 1, 3})));
}

TEST(CaptionTaskTest, OverfitsOneBatch) {
  const OneThread one_thread;
  torch::manual_seed(5);
  auto model = make();
  Random random(5);
  const auto boards = draw_boards(digits().training, 4, random);
  std::vector<Words> captions;
  for (const auto& board : boards) captions.push_back(draw_caption(board, grammar(), random));
  const Vocabulary vocabulary(grammar().vocabulary());
  const auto batch = encode(boards, captions, digits().training, vocabulary);
  examples::Trainer trainer(model.ptr(), {.steps = 200, .warm_up = 20, .weight_decay = 0});
  double loss = 0;
  trainer.run([&](Random&) { return learn_from(model, batch); },
              [&](const examples::Progress& progress) { loss = progress.loss; }, [] { return false; });
  EXPECT_LT(loss, 0.01);
  // In training mode, because the norms have seen this batch alone.
  const auto decoded = decode(model, model->contexts(model->encode(batch.boards)), /*beams=*/1);
  for (size_t b = 0; b < captions.size(); ++b)
    EXPECT_EQ(vocabulary.decode(decoded.words[static_cast<int64_t>(b)]), captions[b]);
}

// A model trained for a few steps only, so that its search finds endings of all kinds.
Model half_trained() {
  torch::manual_seed(6);
  auto model = make();
  examples::Trainer trainer(model.ptr(), {.steps = 60, .warm_up = 10});
  trainer.run(training_step(model, digits().training, grammar(), torch::kCPU), [](const auto&) {}, [] { return false; });
  model->eval();
  return model;
}

// The log-probability of each sentence [B, T] by teacher forcing, up to its kEnd.
torch::Tensor log_probability(Model& model, const torch::Tensor& words, const std::vector<ImageContext>& images) {
  const auto begin = torch::full({words.size(0), 1}, Vocabulary::kEnd, torch::kInt64);
  const auto given = torch::cat({begin, words.slice(1, 0, -1)}, 1).unsqueeze(1);  // [B, 1, T]
  auto next = std::get<0>(model->predict(given, images)).squeeze(1);              // [B, T, vocabulary]
  next.select(2, Vocabulary::kPadding).fill_(-1e9);                               // the search never emits it
  const auto of_words = next.log_softmax(-1).gather(2, words.unsqueeze(2)).squeeze(2);
  return (of_words * words.ne(Vocabulary::kPadding)).sum(1);
}

TEST(CaptionDecodeTest, FindsWhatTeacherForcingGivesTheSameProbability) {
  const OneThread one_thread;
  auto model = half_trained();
  const torch::NoGradGuard no_grad;
  Random random(7);
  const auto images = model->contexts(model->encode(paint(draw_boards(digits().held_out, 6, random), digits().held_out)));
  double greedy = 0;
  for (const int64_t beams : {1, 2, 8}) {
    const auto decoded = decode(model, images, beams);
    EXPECT_TRUE(decoded.log_probability.allclose(log_probability(model, decoded.words, images), 1e-3, 1e-3))
        << beams << " beams";
    const auto found = decoded.log_probability.sum().item<double>();
    if (beams == 1) greedy = found;
    EXPECT_GE(found, greedy) << beams << " beams";
  }
}

TEST(CaptionDecodeTest, OneBeamTakesTheMostProbableWordEachTime) {
  const OneThread one_thread;
  auto model = half_trained();
  const torch::NoGradGuard no_grad;
  Random random(8);
  const auto images = model->contexts(model->encode(paint(draw_boards(digits().held_out, 1, random), digits().held_out)));
  const auto decoded = decode(model, images, 1).words[0];  // [T]
  auto said = torch::full({1, 1, 1}, Vocabulary::kEnd, torch::kInt64);
  for (int64_t i = 0; i < decoded.size(0); ++i) {
    auto scores = std::get<0>(model->predict(said, images))[0][0][-1];
    scores[Vocabulary::kPadding] = -1e9;
    ASSERT_EQ(scores.argmax().item<int64_t>(), decoded[i].item<int64_t>()) << "word " << i;
    said = torch::cat({said, scores.argmax().view({1, 1, 1})}, 2);
  }
}

TEST(CaptionDecodeTest, ContextsDoNotGrowWithTheNumberOfBeams) {
  auto model = make();
  model->eval();
  const auto images = model->contexts(torch::rand({3, 9, ModelImpl::kFeatures}));
  const auto bytes = [&] {
    size_t sum = 0;
    for (const auto& image : images) {
      const auto& context = std::get<xattn::Context>(image);
      sum += context.key().storage().nbytes() + context.value().storage().nbytes();
    }
    return sum;
  };
  const auto once = bytes();
  EXPECT_EQ(once,
            2 * ModelImpl::kLayers * 3 * 9 * ModelImpl::kFeatures * sizeof(float));  // keys and values of 9 places of 3 images
  for (const int64_t beams : {1, 16}) {
    decode(model, images, beams);
    EXPECT_EQ(bytes(), once) << beams << " beams";
  }
  // All beams of an image are queries of its one batch entry, so more beams attend to the same keys.
  const auto words = torch::full({3, 16, 2}, Vocabulary::kEnd, torch::kInt64);
  EXPECT_EQ(std::get<1>(model->predict(words, images)).sizes(), (std::vector<int64_t>{3, 16, 2, 9}));
  EXPECT_EQ(std::get<xattn::Context>(images.at(0)).batch_size(), 3);
}

TEST(CaptionDecodeTest, AFrozenModelFindsTheSameCaptions) {
  const OneThread one_thread;
  auto model = half_trained();
  const torch::NoGradGuard no_grad;
  const auto features = torch::rand({3, 9, ModelImpl::kFeatures});
  const auto words = torch::full({3, 2, 4}, Vocabulary::kEnd, torch::kInt64);
  const auto scores = model->predict(words, model->contexts(features));
  const auto found = decode(model, model->contexts(features), 4);
  model->freeze();
  const auto frozen = model->predict(words, model->contexts(features));
  EXPECT_TRUE(std::get<0>(frozen).allclose(std::get<0>(scores), 1e-4, 1e-4));
  EXPECT_TRUE(std::get<1>(frozen).allclose(std::get<1>(scores), 1e-4, 1e-5));
  EXPECT_TRUE(decode(model, model->contexts(features), 4).words.equal(found.words));
}

TEST(CaptionShippedTest, ReproducesItsPublishedAccuracy) {
  auto trained = load_trained(XATTN_EXAMPLE_DATA "/caption.safetensors", torch::kCPU);
  const auto score = evaluate(trained.model, digits().held_out, trained.grammar, torch::kCPU, /*boards=*/1000, /*beams=*/1,
                              /*seed=*/12345);
  EXPECT_EQ(score.boards, 1000);
  EXPECT_NEAR(static_cast<double>(score.right), 1000 * kPublishedExactMatch, 5);  // src/examples/README.md
  EXPECT_GE(score.right, 900);
}

TEST(CaptionShippedTest, LooksAtTheDigitThatItNames) {
  auto trained = load_trained(XATTN_EXAMPLE_DATA "/caption.safetensors", torch::kCPU);
  Random random(9);
  const auto board = examples::board_of("7.3.5...1", digits().held_out, random);
  const auto example = describe(trained.model, paint({board}, digits().held_out)[0], Vocabulary(trained.grammar.vocabulary()),
                                torch::kCPU, /*beams=*/4);
  for (const auto& [word, cell] : {std::pair{"seven", 0}, {"three", 2}, {"five", 4}, {"one", 8}}) {
    const auto said = std::ranges::find(example.words, word, &examples::Word::text);
    ASSERT_NE(said, example.words.end()) << word << " in: " << example.title;
    EXPECT_EQ(said->map.argmax().item<int64_t>(), cell) << word;
  }
}

}  // namespace
}  // namespace caption
