// SPDX-License-Identifier: Apache-2.0
#include "picture.h"

#include <ATen/ops/upsample_bicubic2d.h>
#include <fmt/format.h>

#include "board.h"
#include "canvas.h"
#include "model.h"

namespace vqa {
namespace {

constexpr Color kPaper = {255, 255, 255};
constexpr Color kInk = {40, 40, 48};
constexpr Color kGrey = {120, 120, 130};
constexpr Color kLines = {205, 205, 212};
constexpr Color kAsked = {20, 110, 235};
constexpr Color kRight = {10, 130, 60};
constexpr Color kWrong = {205, 25, 35};

// All in pixels of the picture.
constexpr int64_t kCell = 72;
constexpr int64_t kBoard = kCellsPerSide * kCell;
constexpr int64_t kGap = 24;
constexpr int64_t kLabels = 118;        // width of the words at the left
constexpr int64_t kScale = 2;           // of the text
constexpr int64_t kLine = 11 * kScale;  // from one line of text to the next
constexpr int64_t kQuestionY = kGap;
constexpr int64_t kBoardY = kQuestionY + 2 * kLine + 8;
constexpr int64_t kAttentionY = kBoardY + kBoard + kGap;
constexpr int64_t kAnswerY = kAttentionY + kBoard + 16;
constexpr int64_t kLegendY = kAnswerY + 2 * kLine + 12;
constexpr int64_t kHeight = kLegendY + kLine + kGap / 2;

// Ink on paper. Smooth, because handwriting of 8x8 pixels is easier to read that way; each digit by itself, because the pixels
// of one are no part of the next. board [24, 24] -> float32 [216, 216, 1], ink from 0 to 1.
torch::Tensor zoom_board(const torch::Tensor& board) {
  constexpr auto n = kCellsPerSide;
  const auto digits = board
                          .reshape({n, kDigitSize, n, kDigitSize})                // [cell row, y, cell column, x]
                          .transpose(1, 2)                                        // [cell row, cell column, y, x]
                          .reshape({kCells, 1, kDigitSize, kDigitSize});          // [9, 1, 8, 8]
  return at::upsample_bicubic2d(digits, {kCell, kCell}, /*align_corners=*/false)  // [9, 1, 72, 72]
      .view({n, n, kCell, kCell})                                                 // [cell row, cell column, y, x]
      .transpose(1, 2)                                                            // [cell row, y, cell column, x]
      .reshape({kBoard, kBoard, 1})
      .clamp(0, 1);
}

// A square for each feature, from 0 where the model did not look to 1 where it looked most.
// attention [36] -> float32 [216, 216, 1].
torch::Tensor zoom_attention(const torch::Tensor& attention) {
  constexpr auto square = kBoard / kFeaturesPerSide;
  const auto grid = attention.view({kFeaturesPerSide, kFeaturesPerSide}) / attention.max();
  return grid.repeat_interleave(square, 0).repeat_interleave(square, 1).unsqueeze(2);
}

// Paper turns from white through yellow to red as the attention grows. heat [216, 216, 1] -> [216, 216, 3].
torch::Tensor paper(const torch::Tensor& heat) {
  const auto green = 1 - heat * 0.65;
  const auto blue = (1 - heat * 1.6).clamp_min(0.1);
  return torch::cat({torch::ones_like(heat), green, blue}, /*dim=*/2);
}

// board [216, 216, 1], paper [216, 216, 1|3] -> [216, 216, 3].
torch::Tensor print_on(const torch::Tensor& paper, const torch::Tensor& board) {
  const auto ink = torch::tensor({kInk[0] / 255.0F, kInk[1] / 255.0F, kInk[2] / 255.0F});  // [3]
  return paper * (1 - board) + ink * board;
}

void draw_board(const torch::Tensor& picture, int64_t y, int64_t x, const torch::Tensor& pixels, int64_t asked) {
  part(picture, {y, x, kBoard, kBoard}).copy_((pixels * 255).round());
  for (int64_t i = 0; i < kCells; ++i) {
    draw_frame(picture, {y + i / kCellsPerSide * kCell, x + i % kCellsPerSide * kCell, kCell, kCell}, 1, kLines);
  }
  draw_frame(picture, {y + asked / kCellsPerSide * kCell - 2, x + asked % kCellsPerSide * kCell - 2, kCell + 4, kCell + 4}, 4,
             kAsked);
}

// The question in one or two lines, broken at a blank.
void draw_question(const torch::Tensor& picture, int64_t x, const std::string& question) {
  constexpr auto fits = static_cast<size_t>(kBoard / (kTextWidth * kScale));
  const auto text = question + "?";
  const auto end = text.size() <= fits ? text.size() : text.rfind(' ', fits);
  draw_text(picture, kQuestionY, x, text.substr(0, end), kScale, kAsked);
  if (end < text.size()) {
    draw_text(picture, kQuestionY + kLine, x, text.substr(end + 1), kScale, kAsked);
  }
}

void draw_labels(const torch::Tensor& picture) {
  const auto middle = kBoard / 2 - kLine;
  draw_text(picture, kQuestionY, kGap, "question", kScale, kGrey);
  draw_text(picture, kBoardY + middle, kGap, "board", kScale, kGrey);
  draw_text(picture, kAttentionY + middle, kGap, "where it", kScale, kGrey);
  draw_text(picture, kAttentionY + middle + kLine, kGap, "looked", kScale, kGrey);
  draw_text(picture, kAnswerY, kGap, "answer", kScale, kGrey);
  draw_text(picture, kAnswerY + kLine, kGap, "truth", kScale, kGrey);
  draw_text(picture, kLegendY, kGap,
            "blue: the asked cell. red: most attention. each of the 36 squares is a feature that sees its whole cell.", kScale,
            kGrey);
}

void draw_column(const torch::Tensor& picture, int64_t x, const Answered& answered) {
  const auto board = zoom_board(answered.board);
  draw_question(picture, x, answered.question);
  draw_board(picture, kBoardY, x, print_on(torch::ones({1}), board), answered.cell);
  draw_board(picture, kAttentionY, x, print_on(paper(zoom_attention(answered.attention)), board), answered.cell);
  const bool right = answered.answer == answered.truth;
  draw_text(picture, kAnswerY, x, fmt::format("{} {}", answered.answer, right ? "right" : "wrong"), kScale,
            right ? kRight : kWrong);
  draw_text(picture, kAnswerY + kLine, x, fmt::format("{}", answered.truth), kScale, kInk);
}

}  // namespace

torch::Tensor draw_answers(const std::vector<Answered>& answered) {
  const auto columns = static_cast<int64_t>(answered.size());
  const auto picture = make_picture(kHeight, kGap + kLabels + columns * (kBoard + kGap), kPaper);
  draw_labels(picture);
  for (int64_t i = 0; i < columns; ++i) {
    draw_column(picture, kGap + kLabels + i * (kBoard + kGap), answered[i]);
  }
  return picture;
}

}  // namespace vqa
