// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Generator.h>
#include <torch/types.h>

#include <cstdint>

#include "digits.h"

namespace vqa {

inline constexpr int64_t kCellsPerSide = 3;
inline constexpr int64_t kCells = kCellsPerSide * kCellsPerSide;
inline constexpr int64_t kBoardSize = kCellsPerSide * kDigitSize;  ///< 24 pixels, both ways

/// B boards of 3x3 digits, and Q questions about each: which digit is in this cell?
struct Batch {
  torch::Tensor boards;   ///< float32 [B, 1, 24, 24], ink from 0 to 1
  torch::Tensor words;    ///< int64 [B, Q, 5], the questions; see questions.h
  torch::Tensor cells;    ///< int64 [B, Q], the cells that they ask for, counted row by row
  torch::Tensor answers;  ///< int64 [B, Q], the digits in those cells

  Batch to(torch::Device device) const;
};

/// Fills boards with digits drawn at random from `digits`, and asks for cells drawn at random, in phrases drawn at random.
Batch draw_batch(const Digits& digits, int64_t boards, int64_t questions, at::Generator& generator);

}  // namespace vqa
