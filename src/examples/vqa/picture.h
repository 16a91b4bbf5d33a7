// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace vqa {

/// A question with its answer, and all that one wants to see of it.
struct Answered {
  std::string question;
  int64_t cell;    ///< the asked one, counted row by row
  int64_t answer;  ///< the model's
  int64_t truth;
  torch::Tensor board;      ///< [24, 24], ink from 0 to 1
  torch::Tensor attention;  ///< [36]
};

/// One column for each question: the board with the asked cell framed, where the model looked, and its answer beside the truth.
/// Returns uint8 [height, width, 3].
torch::Tensor draw_answers(const std::vector<Answered>& answered);

}  // namespace vqa
