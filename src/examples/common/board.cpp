// SPDX-License-Identifier: Apache-2.0
#include "common/board.h"

#include <ATen/ops/avg_pool2d.h>
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "common/png.h"

namespace examples {
namespace {

Board empty_board() {
  Board board;
  board.digits.fill(kEmpty);
  board.images.fill(kEmpty);
  return board;
}

}  // namespace

const std::array<std::array<int64_t, kCellsPerSide>, 2 * kCellsPerSide>& board_lines() {
  static constexpr std::array<std::array<int64_t, 3>, 6> kLines = {
      {{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {0, 3, 6}, {1, 4, 7}, {2, 5, 8}}};
  return kLines;
}

Board draw_board(const Digits& digits, int64_t count, Random& random) {
  std::array<int64_t, kCells> cells;
  std::iota(cells.begin(), cells.end(), 0);
  random.shuffle(cells);
  auto board = empty_board();
  const auto* labels = digits.labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const auto cell = static_cast<size_t>(cells.at(static_cast<size_t>(i)));
    board.images.at(cell) = random.below(digits.labels.size(0));
    board.digits.at(cell) = labels[board.images.at(cell)];
  }
  return board;
}

Board board_of(const std::string& cells, const Digits& digits, Random& random) {
  if (cells.size() != kCells || cells.find_first_not_of("0123456789.") != std::string::npos) {
    throw std::runtime_error(
        fmt::format("a board is written as nine cells, row by row, each a digit or '.', as in 7.3...1.., not as '{}'", cells));
  }
  auto board = empty_board();
  for (size_t cell = 0; cell < cells.size(); ++cell) {
    if (cells[cell] == '.') continue;
    board.digits.at(cell) = cells[cell] - '0';
    const auto such = digits.labels.eq(board.digits.at(cell)).nonzero().flatten();  // [number of such images]
    board.images.at(cell) = such[random.below(such.size(0))].item<int64_t>();
  }
  return board;
}

torch::Tensor paint(const std::vector<Board>& boards, const Digits& digits, Random* hands) {
  const auto B = static_cast<int64_t>(boards.size());
  const auto n = kCellsPerSide;
  const auto chosen = torch::empty({B, kCells}, torch::kInt64);
  for (int64_t b = 0; b < B; ++b) {
    std::ranges::copy(boards[static_cast<size_t>(b)].images, chosen.mutable_data_ptr<int64_t>() + b * kCells);
  }
  const auto filled = chosen.ne(kEmpty).view({B * kCells, 1, 1});
  auto images = digits.images.index({chosen.clamp_min(0).flatten()}) * filled;  // [B * 9, 8, 8]
  if (hands != nullptr) images = jitter(images, hands->generator());
  return images
      .view({B, n, n, kDigitSize, kDigitSize})   // [B, cell row, cell column, y, x]
      .transpose(2, 3)                           // [B, cell row, y, cell column, x]
      .reshape({B, 1, kBoardSize, kBoardSize});  // [B, 1, 24, 24]
}

torch::Tensor board_picture(const torch::Tensor& board, int64_t zoom) {
  return ((1 - board) * 255)
      .round()
      .to(torch::kUInt8)           // [24, 24]
      .repeat_interleave(zoom, 0)  // [24 * zoom, 24]
      .repeat_interleave(zoom, 1)  // [24 * zoom, 24 * zoom]
      .unsqueeze(2)
      .expand({-1, -1, 3});
}

torch::Tensor read_board(const std::string& path) {
  const auto picture = read_png(path);  // [H, W, 3]
  const auto size = picture.size(0);
  if (size != picture.size(1) || size == 0 || size % kBoardSize != 0) {
    throw std::runtime_error(fmt::format("{}: a board must be square, its side a multiple of {} pixels, but it is {} x {}",
                                         path, kBoardSize, picture.size(1), size));
  }
  const auto grey = picture.to(torch::kFloat32).mean(2) / 255;  // [H, W], 1 is white
  const auto pixels = at::avg_pool2d(grey.unsqueeze(0), size / kBoardSize);
  const bool dark_on_light = grey.median().item<float>() > 0.5F;
  return dark_on_light ? 1 - pixels : pixels;  // [1, 24, 24]
}

}  // namespace examples
