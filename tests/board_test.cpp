// SPDX-License-Identifier: Apache-2.0

// The boards of the examples: their digits, their pictures, their files.
#include "common/board.h"

#include <gtest/gtest.h>
#include <xattn/file_error.h>
#include <xattn/safetensors.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/png.h"
#include "test_util.h"

namespace examples {
namespace {

using xattn::test::error_of;
using xattn::test::TempDir;

const DigitSets& digits() {
  static const auto sets = load_digits(XATTN_EXAMPLE_DATA "/digits.safetensors");
  return sets;
}

// Whether each image of a [N, 8, 8] equals each of b [M, 8, 8]: bool [N, M].
torch::Tensor same_images(const torch::Tensor& a, const torch::Tensor& b) {
  return a.flatten(1).unsqueeze(1).eq(b.flatten(1).unsqueeze(0)).all(-1);
}

// board [1, 24, 24] -> [8, 8].
torch::Tensor cell_of(const torch::Tensor& board, int64_t cell) {
  return board[0].narrow(0, cell / 3 * 8, 8).narrow(1, cell % 3 * 8, 8);
}

TEST(DigitsTest, HoldsOutEveryFifthOfEachDigit) {
  EXPECT_EQ(digits().training.labels.size(0) + digits().held_out.labels.size(0), 1797);
  for (int64_t digit = 0; digit < 10; ++digit) {
    const auto trained = digits().training.labels.eq(digit).sum().item<int64_t>();
    const auto held_out = digits().held_out.labels.eq(digit).sum().item<int64_t>();
    EXPECT_EQ(held_out, (trained + held_out) / 5) << "of digit " << digit;
  }
}

TEST(DigitsTest, SharesNoImageBetweenTheSets) {
  EXPECT_FALSE(same_images(digits().held_out.images, digits().training.images).any().item<bool>());
}

TEST(DigitsTest, RefusesOtherFilesByName) {
  const TempDir dir;
  const auto path = dir.file("not_digits.safetensors");
  xattn::save_safetensors(path,
                          {{"images", torch::zeros({20, 4, 4}, torch::kUInt8)}, {"labels", torch::zeros(20, torch::kUInt8)}});
  EXPECT_EQ(error_of<xattn::FileError>([&] { load_digits(path); }),
            path + ": images must be uint8 [N, 8, 8]; scripts/make_digits.py writes such a file");
}

TEST(DigitsTest, JitterMovesALittleAndDiffersEachTime) {
  Random random(1);
  const auto images = digits().training.images.narrow(0, 0, 200);
  const auto moved = jitter(images, random.generator());
  const auto again = jitter(images, random.generator());
  const auto mean_difference = (moved - images).abs().mean().item<double>();
  EXPECT_GT(mean_difference, 0.02);
  EXPECT_LT(mean_difference, 0.2);
  EXPECT_FALSE(moved.equal(again));
}

TEST(BoardTest, ShowsTheImagesOfItsDigits) {
  Random random(2);
  for (int64_t count = kFewestDigits; count <= kMostDigits; ++count) {
    const auto board = draw_board(digits().held_out, count, random);
    EXPECT_EQ(kCells - std::ranges::count(board.digits, kEmpty), count);
    const auto painted = paint({board}, digits().held_out)[0];
    for (int64_t cell = 0; cell < kCells; ++cell) {
      const auto digit = board.digits.at(static_cast<size_t>(cell));
      const auto image = board.images.at(static_cast<size_t>(cell));
      if (digit == kEmpty) {
        EXPECT_EQ(cell_of(painted, cell).abs().max().item<float>(), 0);
      } else {
        EXPECT_TRUE(cell_of(painted, cell).equal(digits().held_out.images[image]));
        EXPECT_EQ(digits().held_out.labels[image].item<int64_t>(), digit);
      }
    }
  }
}

TEST(BoardTest, FillsAllCellsEquallyOften) {
  Random random(3);
  std::array<int64_t, kCells> filled = {};
  for (int i = 0; i < 3000; ++i) {
    const auto board = draw_board(digits().training, 3, random);
    for (size_t cell = 0; cell < filled.size(); ++cell) filled.at(cell) += board.digits.at(cell) != kEmpty;
  }
  for (const auto count : filled) EXPECT_NEAR(static_cast<double>(count), 1000, 130);  // five standard deviations
}

TEST(BoardTest, ComesFromNineCharacters) {
  Random random(4);
  const auto board = board_of("7.3...1..", digits().held_out, random);
  EXPECT_EQ(board.digits, (std::array<int64_t, kCells>{7, kEmpty, 3, kEmpty, kEmpty, kEmpty, 1, kEmpty, kEmpty}));
  for (const auto* cells : {"7.3", "7.3...1.x", ""}) {
    EXPECT_EQ(error_of<std::runtime_error>([&] { board_of(cells, digits().held_out, random); }),
              "a board is written as nine cells, row by row, each a digit or '.', as in 7.3...1.., not as '" +
                  std::string(cells) + "'");
  }
}

TEST(BoardTest, ReadsBackFromAPictureInAnyZoomAndPolarity) {
  Random random(5);
  const auto painted = paint({draw_board(digits().held_out, kMostDigits, random)}, digits().held_out)[0];  // [1, 24, 24]
  const TempDir dir;
  const auto path = dir.file("board.png");
  for (const int64_t zoom : {1, 5}) {
    const auto dark_on_light = board_picture(painted[0], zoom);
    for (const auto& picture : {dark_on_light, 255 - dark_on_light}) {
      write_png(path, picture);
      EXPECT_LT((read_board(path) - painted).abs().max().item<float>(), 0.003F);  // half a step of 255
    }
  }
}

TEST(BoardTest, RefusesPicturesOfOtherSizesByName) {
  const TempDir dir;
  const auto path = dir.file("photo.png");
  write_png(path, torch::zeros({24, 48, 3}, torch::kUInt8));
  EXPECT_EQ(error_of<std::runtime_error>([&] { read_board(path); }),
            path + ": a board must be square, its side a multiple of 24 pixels, but it is 48 x 24");
}

}  // namespace
}  // namespace examples
