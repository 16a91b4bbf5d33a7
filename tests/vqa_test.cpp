// SPDX-License-Identifier: Apache-2.0

// The parts of the program vqa: its data, its questions, its model and its picture.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <png.h>
#include <torch/nn/functional/loss.h>
#include <torch/optim/adam.h>
#include <torch/utils.h>
#include <xattn/file_error.h>
#include <xattn/safetensors.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "test_util.h"
#include "vqa/board.h"
#include "vqa/canvas.h"
#include "vqa/digits.h"
#include "vqa/model.h"
#include "vqa/picture.h"
#include "vqa/questions.h"
#include "vqa/train.h"

namespace vqa {
namespace {

const DigitSets& digits() {
  static const auto sets = load_digits(XATTN_EXAMPLE_DATA "/digits.safetensors");
  return sets;
}

at::Generator seeded(uint64_t seed) {
  return at::make_generator<at::CPUGeneratorImpl>(seed);
}

// Where each of a [N, 8, 8] is found among b [M, 8, 8]: bool [N, M].
torch::Tensor same_images(const torch::Tensor& a, const torch::Tensor& b) {
  return a.flatten(1).unsqueeze(1).eq(b.flatten(1).unsqueeze(0)).all(-1);
}

// boards [B, 1, 24, 24], cells [B, Q] -> the asked digits, [B * Q, 8, 8].
torch::Tensor asked_images(const Batch& batch) {
  std::vector<torch::Tensor> images;
  for (int64_t b = 0; b < batch.cells.size(0); ++b) {
    for (int64_t q = 0; q < batch.cells.size(1); ++q) {
      const auto cell = batch.cells[b][q].item<int64_t>();
      images.push_back(batch.boards[b][0].narrow(0, cell / 3 * 8, 8).narrow(1, cell % 3 * 8, 8));
    }
  }
  return torch::stack(images);
}

// For equal bits; and small products on many threads crawl on a busy machine.
class OneThread {
 public:
  OneThread() { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before_); }

 private:
  int before_ = at::get_num_threads();
};

TEST(VqaDigitsTest, HoldsOutEveryFifthOfEachDigit) {
  EXPECT_EQ(digits().training.labels.size(0) + digits().held_out.labels.size(0), 1797);
  for (int64_t digit = 0; digit < 10; ++digit) {
    const auto trained = digits().training.labels.eq(digit).sum().item<int64_t>();
    const auto held_out = digits().held_out.labels.eq(digit).sum().item<int64_t>();
    EXPECT_EQ(held_out, (trained + held_out) / 5) << "of digit " << digit;
  }
}

TEST(VqaDigitsTest, SharesNoImageBetweenTheSets) {
  EXPECT_FALSE(same_images(digits().held_out.images, digits().training.images).any().item<bool>());
}

TEST(VqaDigitsTest, RefusesOtherFilesByName) {
  const xattn::test::TempDir dir;
  const auto path = dir.file("not_digits.safetensors");
  xattn::save_safetensors(path,
                          {{"images", torch::zeros({20, 4, 4}, torch::kUInt8)}, {"labels", torch::zeros(20, torch::kUInt8)}});
  EXPECT_EQ(xattn::test::error_of<xattn::FileError>([&] { load_digits(path); }),
            path + ": images must be uint8 [N, 8, 8]; scripts/make_digits.py writes such a file");
}

TEST(VqaBoardTest, AnswersNameTheDigitInTheAskedCell) {
  auto generator = seeded(1);
  const auto batch = draw_batch(digits().held_out, /*boards=*/20, /*questions=*/9, generator);
  ASSERT_EQ(batch.boards.sizes(), (std::vector<int64_t>{20, 1, 24, 24}));
  const auto matches = same_images(asked_images(batch), digits().held_out.images);  // [180, 355]
  ASSERT_TRUE(matches.any(1).all().item<bool>()) << "a cell shows something else than one of the given digits";
  const auto truths = digits().held_out.labels.index({matches.to(torch::kUInt8).argmax(1)});
  EXPECT_TRUE(truths.equal(batch.answers.flatten()));
}

TEST(VqaBoardTest, ComesOutTheSameFromTheSameSeed) {
  auto first = seeded(2);
  auto second = seeded(2);
  const auto a = draw_batch(digits().training, 3, 4, first);
  const auto b = draw_batch(digits().training, 3, 4, second);
  EXPECT_TRUE(a.boards.equal(b.boards) && a.words.equal(b.words) && a.cells.equal(b.cells) && a.answers.equal(b.answers));
}

TEST(VqaQuestionsTest, EachPhraseAsksForOneCell) {
  const auto& words = question_words();
  EXPECT_EQ(question_text(words[0][0]), "top left");
  EXPECT_EQ(question_text(words[4][3]), "centre of the board");
  EXPECT_EQ(question_text(words[8][3]), "bottom of the right column");
  EXPECT_LT(words.max().item<int64_t>(), vocabulary_size());
  const auto phrases = words.flatten(0, 1);  // [36, 5]
  EXPECT_EQ(std::get<0>(torch::unique_dim(phrases, 0)).size(0), phrases.size(0));
}

TEST(VqaModelTest, PaddingChangesNothing) {
  torch::manual_seed(3);
  Model model;
  model->eval();
  auto generator = seeded(3);
  const auto batch = draw_batch(digits().training, 2, 9, generator);
  const auto padded = torch::constant_pad_nd(batch.words, {0, 3});  // [2, 9, 8]
  const auto [scores, attention] = model->forward(batch.boards, batch.words);
  const auto [same_scores, same_attention] = model->forward(batch.boards, padded);
  EXPECT_TRUE(scores.allclose(same_scores));
  EXPECT_TRUE(attention.allclose(same_attention));
}

TEST(VqaModelTest, CountsTheAttentionInTheAskedCell) {
  auto attention = torch::zeros({1, 2, 36});
  attention[0][0][3 * 6 + 4] = 0.75;  // row 3, column 4 of 6x6: in the middle row, right column, which is cell 5
  attention[0][0][2 * 6 + 3] = 0.25;  // cell 4
  attention[0][1][0] = 1;             // cell 0
  const auto share = share_in_cell(attention, torch::tensor({5, 8}).view({1, 2}));
  EXPECT_TRUE(share.equal(torch::tensor({0.75F, 0.0F}).view({1, 2})));
}

TEST(VqaTrainTest, OverfitsOneBatch) {
  const OneThread one_thread;
  torch::manual_seed(4);
  Model model;
  auto generator = seeded(4);
  const auto batch = draw_batch(digits().training, 8, 9, generator);
  torch::optim::Adam optimizer(model->parameters(), 3e-3);
  double last = 0;
  for (int step = 0; step < 80; ++step) {
    const auto scores = std::get<0>(model->forward(batch.boards, batch.words));
    const auto loss = torch::nn::functional::cross_entropy(scores.flatten(0, 1), batch.answers.flatten());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
  }
  EXPECT_LT(last, 0.01);
  EXPECT_TRUE(std::get<0>(model->forward(batch.boards, batch.words)).argmax(-1).equal(batch.answers));
}

TEST(VqaTrainTest, SameSeedGivesTheSameLosses) {
  const OneThread one_thread;
  const auto losses = [](uint64_t seed) {
    torch::manual_seed(seed);
    Model model;
    std::vector<double> seen;
    train(model, digits().training, {.steps = 20, .boards = 4, .seed = seed},
          [&seen](const Progress& progress) { seen.push_back(progress.loss); });
    return seen;
  };
  const auto first = losses(5);
  EXPECT_EQ(first.size(), 2u);
  EXPECT_EQ(first, losses(5));
  EXPECT_NE(first, losses(6));
}

TEST(VqaPictureTest, IsAPngThatReadsBackTheSame) {
  const Answered answered = {"bottom of the middle column", 7, 3, 8, torch::rand({24, 24}), torch::rand({36}).softmax(0)};
  const auto picture = draw_answers({answered, answered});
  const xattn::test::TempDir dir;
  const auto path = dir.file("answers.png");
  write_png(path, picture);

  png_image image = {};
  image.version = PNG_IMAGE_VERSION;
  ASSERT_NE(png_image_begin_read_from_file(&image, path.c_str()), 0) << image.message;
  image.format = PNG_FORMAT_RGB;
  ASSERT_EQ(picture.sizes(), (std::vector<int64_t>{image.height, image.width, 3}));
  const auto read = torch::zeros_like(picture);
  ASSERT_NE(png_image_finish_read(&image, nullptr, read.mutable_data_ptr(), 0, nullptr), 0) << image.message;
  EXPECT_TRUE(read.equal(picture));
}

TEST(VqaPictureTest, SaysWhichFileCannotBeWritten) {
  const xattn::test::TempDir dir;
  const auto path = dir.file("no/such/folder.png");
  EXPECT_EQ(xattn::test::error_of<std::runtime_error>([&] { write_png(path, make_picture(2, 2, {0, 0, 0})); }),
            "cannot write " + path + ": No such file or directory");
}

TEST(VqaCanvasTest, DrawsTextInsideThePictureOnly) {
  const auto picture = make_picture(20, 20, {0, 0, 0});
  draw_text(picture, 0, 0, "1", 1, {255, 255, 255});
  EXPECT_EQ(picture.ne(0).sum().item<int64_t>(), 3 * 10);  // the ten pixels of a 1, in three colours
  draw_text(picture, 15, 15, "long text", 2, {255, 255, 255});
}

}  // namespace
}  // namespace vqa
