// SPDX-License-Identifier: Apache-2.0
#include "board.h"

#include "questions.h"

namespace vqa {

Batch Batch::to(torch::Device device) const {
  return {boards.to(device), words.to(device), cells.to(device), answers.to(device)};
}

Batch draw_batch(const Digits& digits, int64_t boards, int64_t questions, at::Generator& generator) {
  const auto B = boards;
  const auto Q = questions;
  const auto n = kCellsPerSide;
  const auto draw = [&generator](int64_t below, torch::IntArrayRef shape) {
    return torch::randint(below, shape, generator, torch::TensorOptions(torch::kInt64));
  };

  const auto drawn = draw(digits.labels.size(0), {B, kCells});
  const auto images = digits.images
                          .index({drawn})                            // [B, 9, 8, 8]
                          .view({B, n, n, kDigitSize, kDigitSize})   // [B, cell row, cell column, y, x]
                          .transpose(2, 3)                           // [B, cell row, y, cell column, x]
                          .reshape({B, 1, kBoardSize, kBoardSize});  // [B, 1, 24, 24]

  const auto cells = draw(kCells, {B, Q});
  const auto phrases = draw(question_words().size(1), {B, Q});
  const auto words = question_words().index({cells, phrases});         // [B, Q, 5]
  const auto answers = digits.labels.index({drawn}).gather(1, cells);  // [B, 9] -> [B, Q]
  return {images, words, cells, answers};
}

}  // namespace vqa
