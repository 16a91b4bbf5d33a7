// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>
#include <torch/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/random.h"

// Handwritten digits, and boards of them.
namespace examples {

inline constexpr int64_t kDigitSize = 8;  ///< pixels, both ways
inline constexpr int64_t kDigitKinds = 10;

/// Images of handwritten digits, and their values.
struct Digits {
  torch::Tensor images;  ///< float32 [N, 8, 8], ink from 0 to 1
  torch::Tensor labels;  ///< int64 [N], 0 to 9
};

/// Two sets without a common image. Some writers are in both.
struct DigitSets {
  Digits training;
  Digits held_out;
};

/// The images [N, 8, 8] as another hand might have written them: each slightly rotated, stretched, slanted and shifted at
/// random, with more or less ink, and with some noise.
torch::Tensor jitter(const torch::Tensor& images, at::Generator& generator);

/// Reads the file that scripts/make_digits.py writes. Every fifth image of each digit is held out, always the same ones.
/// Throws xattn::FileError, naming the file, if it cannot be read or holds something else.
DigitSets load_digits(const std::string& path);

inline constexpr int64_t kCellsPerSide = 3;
inline constexpr int64_t kCells = kCellsPerSide * kCellsPerSide;
inline constexpr int64_t kBoardSize = kCellsPerSide * kDigitSize;  ///< 24 pixels, both ways
inline constexpr int64_t kEmpty = -1;                              ///< instead of a digit
inline constexpr int64_t kFewestDigits = 2;
inline constexpr int64_t kMostDigits = 6;

/// A board of 3 x 3 cells, numbered row by row from the top left.
struct Board {
  std::array<int64_t, kCells> digits;  ///< the digit in each cell, 0 to 9 or kEmpty
  std::array<int64_t, kCells> images;  ///< the number of its image in the set, or kEmpty
};

/// The cells of each line: lines 0 to 2 are rows, 3 to 5 are columns.
const std::array<std::array<int64_t, kCellsPerSide>, 2 * kCellsPerSide>& board_lines();

/// A board of `count` digits: cells and images are drawn at random.
Board draw_board(const Digits& digits, int64_t count, Random& random);

/// A board from its cells row by row, such as "7.3...1..", with images drawn at random. Throws std::runtime_error unless there
/// are nine characters, each a digit or a point.
Board board_of(const std::string& cells, const Digits& digits, Random& random);

/// float32 [B, 1, 24, 24], ink from 0 to 1. With `hands` the digits are changed by `jitter`.
torch::Tensor paint(const std::vector<Board>& boards, const Digits& digits, Random* hands = nullptr);

/// A picture of a board: [24, 24], ink from 0 to 1 -> dark on white, uint8 [24 * zoom, 24 * zoom, 3].
torch::Tensor board_picture(const torch::Tensor& board, int64_t zoom);

/// The board in a PNG file, [1, 24, 24], ink from 0 to 1. The picture must be square, and its side a multiple of 24; it is
/// averaged down to 24. The median pixel decides whether ink is dark or light: most of a board is paper. Throws
/// std::runtime_error, naming the file.
torch::Tensor read_board(const std::string& path);

}  // namespace examples
