// SPDX-License-Identifier: Apache-2.0
#include "common/board.h"

#include <ATen/ops/affine_grid_generator.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/grid_sampler.h>
#include <fmt/format.h>
#include <xattn/checkpoint.h>
#include <xattn/file_error.h>

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

void check(bool ok, const std::string& path, const std::string& expectation) {
  if (!ok) {
    throw xattn::FileError(fmt::format("{}: {}; scripts/make_digits.py writes such a file", path, expectation));
  }
}

Digits select(const torch::Tensor& images, const torch::Tensor& labels, const torch::Tensor& chosen) {
  return {images.index({chosen}).to(torch::kFloat32) / 16, labels.index({chosen}).to(torch::kInt64)};
}

}  // namespace

torch::Tensor jitter(const torch::Tensor& images, at::Generator& generator) {
  constexpr double kMost = 0.15;    // change of each entry of the affine map; 0.15 moves by 0.6 pixels
  constexpr double kMostInk = 0.2;  // relative change of the ink
  constexpr double kNoise = 0.05;   // standard deviation; keeps the model from memorising single pixels
  const auto N = images.size(0);
  const auto draw = [&](torch::IntArrayRef shape, double most) { return (torch::rand(shape, generator) * 2 - 1) * most; };
  const auto maps = torch::eye(2, 3) + draw({N, 2, 3}, kMost);  // [N, 2, 3]
  const auto grid = at::affine_grid_generator(maps, {N, 1, kDigitSize, kDigitSize}, /*align_corners=*/false);
  const auto moved = at::grid_sampler(images.unsqueeze(1), grid, /*interpolation_mode=*/0, /*padding_mode=*/0,  // [N, 1, 8, 8]
                                      /*align_corners=*/false);
  const auto inked = moved.squeeze(1) * (1 + draw({N, 1, 1}, kMostInk));
  return inked + torch::randn(inked.sizes(), generator) * kNoise;
}

DigitSets load_digits(const std::string& path) {
  const auto file = xattn::open_checkpoint(path);
  const auto images = file.tensor("images");  // [N, 8, 8], ink from 0 to 16
  const auto labels = file.tensor("labels");  // [N]
  check(images.scalar_type() == torch::kUInt8 && images.dim() == 3 && images.size(1) == kDigitSize &&
            images.size(2) == kDigitSize,
        path, "images must be uint8 [N, 8, 8]");
  check(labels.scalar_type() == torch::kUInt8 && labels.dim() == 1 && labels.size(0) == images.size(0), path,
        "labels must be uint8 [N], one for each image");
  check((images <= 16).all().item<bool>() && (labels < kDigitKinds).all().item<bool>(), path,
        "ink must lie in 0 to 16, labels in 0 to 9");

  // Counted for each digit separately, so that the held-out set has equal parts of all.
  auto held_out = torch::zeros(labels.sizes(), torch::kBool);  // [N]
  for (int64_t digit = 0; digit < kDigitKinds; ++digit) {
    const auto places = (labels == digit).nonzero().flatten();  // [number of such images]
    check(places.size(0) >= 5, path, fmt::format("there must be at least five images of a {}", digit));
    held_out.index_fill_(0, places.slice(/*dim=*/0, /*start=*/4, /*end=*/std::nullopt, /*step=*/5), true);
  }
  return {select(images, labels, ~held_out), select(images, labels, held_out)};
}

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
