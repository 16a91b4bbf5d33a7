// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/digits.h"
#include "common/random.h"

namespace examples {

inline constexpr int64_t kCellsPerSide = 3;
inline constexpr int64_t kCells = kCellsPerSide * kCellsPerSide;
inline constexpr int64_t kBoardSize = kCellsPerSide * kDigitSize;  ///< 24 pixels, both ways
inline constexpr int64_t kEmpty = -1;                              ///< in place of a digit
inline constexpr int64_t kFewestDigits = 2;
inline constexpr int64_t kMostDigits = 6;

/// A board of 3x3 cells, counted row by row from the top left.
struct Board {
  std::array<int64_t, kCells> digits;  ///< what each cell shows, 0 to 9 or kEmpty
  std::array<int64_t, kCells> images;  ///< by which image of the set, or kEmpty
};

/// The rows 0 to 2 and the columns 3 to 5: their three cells.
const std::array<std::array<int64_t, kCellsPerSide>, 2 * kCellsPerSide>& board_lines();

/// A board of `count` digits in cells drawn at random, by images drawn at random.
Board draw_board(const Digits& digits, int64_t count, Random& random);

/// A board like "7.3...1..", cells row by row, by images drawn at random. Throws std::runtime_error unless it is nine
/// characters of 0 to 9 and a point.
Board board_of(const std::string& cells, const Digits& digits, Random& random);

/// float32 [B, 1, 24, 24], ink from 0 to 1. With `hands` the digits are written by other hands; see `jitter`.
torch::Tensor paint(const std::vector<Board>& boards, const Digits& digits, Random* hands = nullptr);

/// A board for the eye and for files: [24, 24], ink from 0 to 1 -> dark on white, uint8 [24 * zoom, 24 * zoom, 3].
torch::Tensor board_picture(const torch::Tensor& board, int64_t zoom);

/// The board in a PNG file, [1, 24, 24], ink from 0 to 1. The picture must be square, its side a multiple of 24; it is
/// averaged down to 24. Dark on light and light on dark are told apart by the brighter half of the pixels: paper is what there
/// is more of. Throws std::runtime_error, naming the file.
torch::Tensor read_board(const std::string& path);

}  // namespace examples
